"""Which limits hold for whom, as charges and places of a request: by settings, by an admin, and the key's own."""

import asyncio
import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, Protocol, TypeVar

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute

from tuneloom.config import LimitsSettings
from tuneloom.domain import LOCAL_OWNER, Allowance, OwnerLimits, Principal, Rates
from tuneloom.domain.limits import over
from tuneloom.errors import InsufficientQuota, TuneloomError
from tuneloom.serve.limits_admission import WAITING
from tuneloom.serve.limits_window import Charge, Kind, Place
from tuneloom.serve.reads import Reads
from tuneloom.store.records import Records
from tuneloom.store.usage import Spent

logger = logging.getLogger(__name__)

MAX_CACHED = 4096
# A change of an owner's limits counts after at most the second of these. In between the old ones are used while they
# are read anew, so that nobody waits.
LIMITS_FRESH_S, LIMITS_KEPT_S = 2.0, 4.0
# The same for what was spent. Usage itself is written every five seconds, so that a quota is overshot by what is asked
# for in about fifteen, and by what is under way then.
SPENT_FRESH_S, SPENT_KEPT_S = 5.0, 10.0

T = TypeVar("T")


class ReadsSpent(Protocol):
    """`store.usage.spent`: what an owner has used since a time. Blocks."""

    def __call__(self, records: Records, owner: str, since_s: float) -> Spent: ...


@dataclass(frozen=True)
class Caller:
    """Whose request it is, and what they may do."""

    principal: Principal
    address: str
    allowance: Allowance


class Policies:
    """Finds what holds for a caller. Remembered for seconds."""

    def __init__(
        self,
        settings: LimitsSettings,
        records: Records,
        reads: Reads,
        spent: ReadsSpent,
        *,
        stale_s: float,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._now = now
        # What follows from the limits that were read last.
        self._allowances: dict[tuple[str, str], tuple[OwnerLimits, Allowance]] = {}

        def cached(read: Callable[[str], Any], fresh_s: float, kept_s: float) -> Cached[Any]:
            return Cached(read, reads, fresh_s=fresh_s, kept_s=kept_s, stale_s=stale_s, clock=clock)

        self._limits: Cached[OwnerLimits | None] = cached(
            lambda owner: _find(records, owner), LIMITS_FRESH_S, LIMITS_KEPT_S
        )
        self._spent: Cached[Spent] = cached(
            lambda owner: spent(records, owner, month_start(now())), SPENT_FRESH_S, SPENT_KEPT_S
        )

    async def find(self, principal: Principal, address: str) -> Caller:
        stored = await self._limits.get(principal.owner)
        if stored is None:
            return Caller(principal, address, self._settings.allowance(principal, None))
        name = (principal.owner, principal.kind)
        known = self._allowances.get(name)
        if known is None or known[0] is not stored:
            if len(self._allowances) >= MAX_CACHED:
                self._allowances.clear()
            known = self._allowances[name] = (stored, self._settings.allowance(principal, stored))
        return Caller(principal, address, known[1])

    async def check_spent(self, caller: Caller) -> None:
        """Raise InsufficientQuota if the owner's tokens or money of this month are used up."""
        allowance = caller.allowance
        if allowance.tokens_per_month is None and allowance.budget_per_month is None:
            return
        spent = await self._spent.get(caller.principal.owner)
        tokens = spent.input_tokens + spent.output_tokens + spent.trained_tokens
        if allowance.tokens_per_month is not None and tokens >= allowance.tokens_per_month:
            raise _spent_error(f"the quota of {allowance.tokens_per_month:,} tokens", self._now())
        if allowance.budget_per_month is not None and (spent.cost or 0.0) >= allowance.budget_per_month:
            raise _spent_error(f"the budget of {allowance.budget_per_month:g}", self._now())

    async def spent(self, caller: Caller) -> Spent:
        return await self._spent.get(caller.principal.owner)

    def call_charges(self, caller: Caller, model: str | None, prompt_tokens: int, answer_tokens: int) -> list[Charge]:
        """Of a call of a model, None: of one that is not known.

        An answer of unknown length counts as far as an empty window holds it.
        """
        found = []
        for scope, id, whose, rates in self._rates(caller, model):
            for charge in _charges(scope, id, whose, rates):
                if charge.kind == "tokens":
                    cost = max(prompt_tokens, min(prompt_tokens + answer_tokens, charge.limit))
                    charge = charge.costing(cost)
                found.append(charge)
        return found

    def other_charges(self, caller: Caller, is_costly: bool) -> list[Charge]:
        """Of a request that calls no model. What is costly counts for an anonymous person's address too."""
        allowance, owner = caller.allowance, caller.principal.owner
        whose = f"owner `{owner}`"
        wanted = [("lm", RateLimitItemPerMinute, allowance.light_per_minute)]
        if is_costly:
            wanted = [
                ("cm", RateLimitItemPerMinute, allowance.costly_per_minute),
                ("cd", RateLimitItemPerDay, allowance.costly_per_day),
            ]
        found = [
            Charge(f"{name}:owner:{owner}", _item(per, amount), "requests", whose)
            for name, per, amount in wanted
            if amount is not None
        ]
        if is_costly and caller.principal.kind == "anonymous":
            found += [charge for charge in _charges(*self._address_rates(caller)) if charge.kind == "requests"]
        return found

    def wrong_key_charge(self, address: str) -> Charge:
        item = _item(RateLimitItemPerMinute, self._settings.refused_per_minute)
        return Charge(f"wm:address:{address}", item, "requests", "wrong keys from this address")

    def places(self, caller: Caller) -> list[Place]:
        """The places that a call holds; the one among those that wait comes first."""
        allowance, principal = caller.allowance, caller.principal
        owner, key = f"owner `{principal.owner}`", "this key"
        wanted = (
            (f"pw:{principal.owner}", allowance.max_waiting, owner, WAITING),
            (f"po:{principal.owner}", allowance.max_concurrent, owner, "under way"),
            (
                f"pk:{principal.key_id}",
                allowance.max_concurrent_per_key if principal.key_id else None,
                key,
                "under way",
            ),
        )
        return [Place(name, limit, whose, what) for name, limit, whose, what in wanted if limit is not None]

    def _rates(self, caller: Caller, model: str | None) -> Iterator[tuple[str, str, str, Rates]]:
        principal, allowance = caller.principal, caller.allowance
        if principal.kind == "key":
            default = Rates() if principal.owner == LOCAL_OWNER else self._settings.key
            yield "key", principal.key_id, f"key `{principal.key_id}`", over(principal.rates, default)
        yield "owner", principal.owner, f"owner `{principal.owner}`", allowance.rates
        if model is not None:
            yield "model", f"{principal.owner}/{model}", f"model `{model}`", allowance.model_rates
        if principal.kind == "anonymous":
            yield self._address_rates(caller)

    def _address_rates(self, caller: Caller) -> tuple[str, str, str, Rates]:
        return "address", caller.address, "this address", self._settings.anonymous_address


class Cached(Generic[T]):
    """What `read` gives for a name. After `fresh_s` it is read anew in the background; it is used up to `kept_s`.

    While the store does not answer, it is used up to `stale_s`.
    """

    def __init__(
        self,
        read: Callable[[str], T],
        reads: Reads,
        *,
        fresh_s: float,
        kept_s: float,
        stale_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._reads = reads
        self._fresh_s = fresh_s
        self._kept_s = kept_s
        self._stale_s = stale_s
        self._clock = clock
        self._found: OrderedDict[str, tuple[T, float]] = OrderedDict()
        self._reading: dict[str, asyncio.Task[T]] = {}

    async def get(self, name: str) -> T:
        """Raises TuneloomError where the store does not answer, and has not lately."""
        found = self._found.get(name)
        age_s = float("inf") if found is None else self._clock() - found[1]
        if found is not None and age_s < self._fresh_s:
            return found[0]
        reading = self._reading.get(name)
        if reading is None:
            reading = self._reading[name] = asyncio.create_task(self._load(name, has_older=found is not None))
            reading.add_done_callback(lambda done: self._end(name, done))
        if found is not None and age_s < self._kept_s:
            return found[0]
        try:
            # Others wait for it too: one who leaves does not end it.
            return await asyncio.shield(reading)
        except TuneloomError:
            if found is None or self._clock() - found[1] > self._stale_s:
                raise
            return found[0]

    async def _load(self, name: str, *, has_older: bool) -> T:
        # Before the read: what is written meanwhile must not count as seen.
        read_at = self._clock()
        value = await self._reads.read(lambda: self._read(name), has_older=has_older)
        self._found[name] = (value, read_at)
        self._found.move_to_end(name)
        while len(self._found) > MAX_CACHED:
            self._found.popitem(last=False)
        return value

    def _end(self, name: str, reading: "asyncio.Task[T]") -> None:
        self._reading.pop(name, None)
        if not reading.cancelled() and (error := reading.exception()) is not None:
            logger.warning("limits of `%s` could not be read: %s", name, error)


def month_start(now: float) -> float:
    at = datetime.fromtimestamp(now, UTC)
    return at.replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()


def next_month(now: float) -> datetime:
    at = datetime.fromtimestamp(month_start(now), UTC)
    return at.replace(year=at.year + at.month // 12, month=at.month % 12 + 1)


def _spent_error(what: str, now: float) -> InsufficientQuota:
    return InsufficientQuota(
        f"You have used up {what} of this month. It begins anew on {next_month(now):%Y-%m-%d} (UTC); an admin can "
        "raise it."
    )


def _find(records: Records, owner: str) -> OwnerLimits | None:
    stored = records.owner_limits.find(owner)
    return None if stored is None else stored.value


@functools.lru_cache(maxsize=MAX_CACHED)
def _charges(scope: str, id: str, whose: str, rates: Rates) -> tuple[Charge, ...]:
    """Of one of each."""
    wanted: tuple[tuple[str, type[RateLimitItem], Kind, int | None], ...] = (
        ("rm", RateLimitItemPerMinute, "requests", rates.requests_per_minute),
        ("rd", RateLimitItemPerDay, "requests", rates.requests_per_day),
        ("tm", RateLimitItemPerMinute, "tokens", rates.tokens_per_minute),
    )
    return tuple(
        Charge(f"{name}:{scope}:{id}", _item(per, amount), kind, whose)
        for name, per, kind, amount in wanted
        if amount is not None
    )


@functools.lru_cache(maxsize=1024)
def _item(per: type[RateLimitItem], amount: int) -> RateLimitItem:
    return per(amount)
