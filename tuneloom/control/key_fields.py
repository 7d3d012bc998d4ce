"""What the fields of a key may be, and durations as people write them. No store but to see whether models exist."""

import re
from collections.abc import Callable, Collection, Iterable

from tuneloom.domain import ALL_SCOPES, OWNER, Scope, model_id
from tuneloom.errors import InvalidRequest
from tuneloom.store.records import Records

MAX_LIFE_S = 10 * 365 * 86400.0
MAX_OVERLAP_S = 90 * 86400.0
MAX_MODELS = 100

_DURATION = re.compile(r"([0-9]{1,10})([smhdw]?)")
_UNIT_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

FindBase = Callable[[str], str | None]


def expiry(expires_in: str | int | None, now: float) -> float | None:
    life_s = parse_duration(expires_in)
    return None if life_s is None else now + life_s


def parse_duration(
    value: str | int | None, *, param: str = "expires_in", most_s: float = MAX_LIFE_S, most: str = "ten years"
) -> float | None:
    """Seconds of `30d`, `12h`, `90m`, `2w` or a number of seconds; None stays None."""
    if value is None:
        return None
    match = _DURATION.fullmatch(str(value).strip())
    seconds = int(match[1]) * _UNIT_S[match[2]] if match else 0
    if not 0 < seconds <= most_s:
        raise InvalidRequest(
            f"Invalid `{param}`: {str(value)[:40]!r}. Use seconds or a duration such as `12h`, `30d` or `4w`, "
            f"at most {most}.",
            param=param,
        )
    return float(seconds)


def parse_overlap(value: str | int | None) -> float:
    if value is None or str(value).strip() == "0":
        return 0.0
    return parse_duration(value, param="overlap", most_s=MAX_OVERLAP_S, most="90 days") or 0.0


def check_models(
    records: Records,
    owner: str,
    names: Collection[str],
    find_base: FindBase,
    may_use: Callable[[str], bool] = lambda name: True,
) -> tuple[str, ...]:
    """The names of what a key shall be for, a base by its id; each is a Model of the owner or a base that is served.

    What the caller `may_use` not looks absent.

    Raises:
        InvalidRequest: one is neither.
    """
    if len(names) > MAX_MODELS:
        raise InvalidRequest(f"`models` has {len(names)} names, the most is {MAX_MODELS}.", param="models")
    found = []
    for name in names:
        base = find_base(name)
        is_there = base is not None or records.models.find(model_id(owner, name)) is not None
        if not is_there or not may_use(base or name):
            raise InvalidRequest(
                f"`models`: there is no model or base `{name[:200]}`. Use the plain names of models, such as "
                "`support-bot`: the key then reaches each of their versions.",
                param="models",
            )
        found.append(base or name)
    return tuple(dict.fromkeys(found))


def check_reach(models: tuple[str, ...], scopes: tuple[Scope, ...]) -> tuple[str, ...]:
    """Return `models` unless an admin's key shall be for some only: it could make itself another."""
    if models and "admin" in scopes:
        raise InvalidRequest("A key with the scope `admin` is for all models. Leave `models` out.", param="models")
    return models


def check_owner(owner: str) -> str:
    """Return `owner` if it may name an owner; it becomes a part of ids and model names."""
    if not OWNER.fullmatch(owner):
        raise InvalidRequest(
            f"Invalid `owner`: {owner[:80]!r}. Use 1 to 128 letters, digits, `.`, `_` or `-`, starting and ending "
            "with a letter or digit.",
            param="owner",
        )
    return owner


def check_name(name: str) -> str:
    if len(name) > 128 or not name.isprintable():
        raise InvalidRequest("Invalid `name`. Use at most 128 printable characters.", param="name")
    return name


def check_scopes(scopes: Iterable[str]) -> tuple[Scope, ...]:
    wanted = set(scopes)
    unknown = sorted(wanted - set(ALL_SCOPES))
    if unknown or not wanted:
        what = f"Unknown scope {unknown[0][:40]!r}" if unknown else "`scopes` is empty"
        choices = ", ".join(f"`{scope}`" for scope in ALL_SCOPES)
        raise InvalidRequest(f"{what}. Choose among {choices}.", param="scopes")
    return tuple(scope for scope in ALL_SCOPES if scope in wanted)
