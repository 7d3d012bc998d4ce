"""What a client hears of limits: the headers of an answer, and the error of a refusal."""

import math
from collections.abc import Iterable, Sequence

from tuneloom.errors import RateLimited, TokensLimited
from tuneloom.serve.limits_window import Charge, Level, Place, Taken

# A project is an owner here.
PROJECT_TOKENS, PROJECT_KEY = "project-tokens", "tm:owner:"
HEADERS = tuple(
    f"x-ratelimit-{what}-{kind}"
    for what in ("limit", "remaining", "reset")
    for kind in ("requests", "tokens", PROJECT_TOKENS)
)
# When a place becomes free is not known.
PLACE_RETRY_S = 1.0
CLIENT_WAIT_S = 60.0


def headers_of(charges: Sequence[Charge], taken: Taken) -> dict[str, str]:
    """`x-ratelimit-*` of the tightest limit of requests, of tokens and of the project's tokens, after this request."""
    tightest: dict[str, tuple[int, Charge, Level]] = {}
    for charge, level in zip(charges, taken.levels, strict=True):
        remaining = level.remaining(charge)
        if charge.kind not in tightest or remaining < tightest[charge.kind][0]:
            tightest[charge.kind] = (remaining, charge, level)
        if charge.key.startswith(PROJECT_KEY):
            tightest[PROJECT_TOKENS] = (remaining, charge, level)
    found: dict[str, str] = {}
    for kind, (remaining, charge, level) in tightest.items():
        found[f"x-ratelimit-limit-{kind}"] = str(charge.limit)
        found[f"x-ratelimit-remaining-{kind}"] = str(remaining)
        found[f"x-ratelimit-reset-{kind}"] = duration(level.reset_ms(charge.size_ms))
    return found


def refusal(charges: Sequence[Charge], places: Sequence[Place], taken: Taken) -> RateLimited:
    """The error of a request that was not admitted: of all limits that refuse it the one that does so longest."""
    waits = [(level.wait_ms(charge), charge, level) for charge, level in zip(charges, taken.levels, strict=True)]
    never = [(charge, level) for wait_ms, charge, level in waits if wait_ms is None]
    if never:
        return _too_large(never[0][0])
    full = [place for place, held in zip(places, taken.held, strict=True) if held >= place.limit]
    wait_ms, charge, level = max(
        ((w or 0, c, v) for w, c, v in waits), key=lambda each: each[0], default=(0, None, None)
    )
    if charge is None or level is None or (not wait_ms and full):
        place = full[0]
        return RateLimited(
            f"Rate limit reached for {place.whose}: {place.limit} requests {place.what}, the limit is {place.limit}. "
            f"Try again in {duration(PLACE_RETRY_S * 1000)}, when one has ended.",
            retry_after_s=PLACE_RETRY_S,
        )
    # Between the decision and this line nothing has passed, but sums are rounded.
    wait_ms = max(wait_ms, 1)
    used = level.count(charge.size_ms)
    error = TokensLimited if charge.kind == "tokens" else RateLimited
    return error(
        f"Rate limit reached for {charge.whose} on {_unit(charge)}: Limit {charge.limit}, Used {used}, Requested "
        f"{charge.cost}. Try again in {duration(wait_ms)}.",
        retry_after_s=_retry_after_s(wait_ms / 1000),
    )


def _retry_after_s(wait_s: float) -> float:
    """OpenAI's clients wait up to a minute, and if told of more they soon give up: so they come twice."""
    return min(wait_s, CLIENT_WAIT_S) if wait_s <= 2 * CLIENT_WAIT_S else wait_s


def duration(milliseconds: float) -> str:
    """As OpenAI writes it: `120ms`, `1s`, `6m0s`, `23h59m59.5s`."""
    whole = math.ceil(milliseconds)
    if whole < 1000:
        return f"{whole}ms"
    minutes, seconds = divmod(whole / 1000, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + text


def standing(charges: Iterable[Charge], levels: Iterable[Level]) -> list[dict[str, object]]:
    """The limits of a caller and what is left of each, for people."""
    return [
        {
            "whose": charge.whose,
            "limit": _unit(charge),
            "value": charge.limit,
            "remaining": level.remaining(charge),
            "resets_in_s": round(level.reset_ms(charge.size_ms) / 1000, 3),
        }
        for charge, level in zip(charges, levels, strict=True)
    ]


def _unit(charge: Charge) -> str:
    return f"{charge.kind} per {charge.item.GRANULARITY.name}"


def _too_large(charge: Charge) -> RateLimited:
    error = (TokensLimited if charge.kind == "tokens" else RateLimited)(
        f"Request too large for {charge.whose} on {_unit(charge)}: Limit {charge.limit}, Requested {charge.cost}. "
        "Send less at once."
    )
    # It would be as large again.
    error.should_retry = False
    return error
