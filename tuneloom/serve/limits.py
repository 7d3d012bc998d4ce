"""Limits of requests, tokens and calls under way, kept over all gateways: who may go on, who waits, who has used it up.

A call of a model is admitted in one step that takes from all its limits or from none, and is settled when its true
length is known. The arithmetic is in `limits_window`, the two ways to count in `limits_memory` and `limits_redis`.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tuneloom.config import Settings
from tuneloom.domain import Principal, Target
from tuneloom.errors import InvalidRequest, Overloaded, RateLimited
from tuneloom.serve.limits_address import Addresses
from tuneloom.serve.limits_admission import Admission, estimate
from tuneloom.serve.limits_answer import headers_of, refusal, standing
from tuneloom.serve.limits_memory import MemoryCounters
from tuneloom.serve.limits_policy import Caller, Policies
from tuneloom.serve.limits_routes import Cost
from tuneloom.serve.limits_window import Charge, Correction, Counters, CountersDown, Place, Taken
from tuneloom.serve.openai import Call
from tuneloom.serve.reads import Reads
from tuneloom.store import usage
from tuneloom.store.records import Records

if TYPE_CHECKING:
    from tuneloom.serve.limits_redis import RedisCounters

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0
# Who was refused is refused again without asking who counts, but not for longer: the limit may have been raised.
REMEMBERED_S = 1.0
MAX_REMEMBERED = 10_000
# What nobody waits for is told to Redis a little later, all of one request together.
SETTLE_AFTER_S = 0.005
# Redis gives places away after `limits_redis.PLACE_LIFE_S`.
HOLD_EVERY_S = 10.0


class Limits:
    """All limits of one gateway process. `watch` hears whether they are kept together with the other gateways."""

    def __init__(
        self,
        settings: Settings,
        records: Records,
        reads: Reads,
        *,
        watch: Callable[[bool], None] = lambda is_shared: None,
    ) -> None:
        self.reserved_tokens = settings.limits.reserved_tokens
        self.addresses = Addresses(settings.limits.trusted_proxies)
        self.policies = Policies(settings.limits, records, reads, usage.spent, stale_s=settings.gateway.stale_s)
        self._memory = MemoryCounters()
        self._watch = watch
        self._redis = _open_redis(settings, self._hear)
        self._refused: dict[str, tuple[float, RateLimited, Mapping[str, str]]] = {}
        self._with_places: set[Admission] = set()
        self._holding: asyncio.Task[None] | None = None
        self._unsettled: dict[Admission, tuple[list[Correction], list[Place]]] = {}
        self._settling: asyncio.Task[None] | None = None
        self._work: set[asyncio.Task[None]] = set()
        if self._redis is None and settings.gateway.replicas > 1:
            logger.warning(
                "%d gateways without `limits.redis_url`: each counts alone, so that limits are as many times as large",
                settings.gateway.replicas,
            )

    @property
    def is_shared(self) -> bool:
        """Whether all gateways count together now."""
        return self._redis is not None and self._redis.is_up

    async def gate(self, principal: Principal, address: str, cost: Cost) -> "Gate":
        return Gate(self, await self.policies.find(principal, address), cost)

    async def take(self, charges: Sequence[Charge], places: Sequence[Place], cost: Cost) -> Admission:
        """Take all of it or nothing, as `taken` of what comes back says. Raises Overloaded as `check_shared` does."""
        holder = secrets.token_hex(8) if places else ""
        taken, counters = await self._count(charges, places, holder, cost)
        admission = Admission(counters, charges, places, taken, holder, self._settle)
        if admission.places:
            self._with_places.add(admission)
            if self._holding is None:
                self._holding = asyncio.create_task(self._hold())
        return admission

    @property
    def has_refused(self) -> bool:
        """Whether anybody was refused lately."""
        return bool(self._refused)

    def find_refusal(self, charges: Sequence[Charge]) -> tuple[RateLimited, Mapping[str, str]] | None:
        """The error and headers with which somebody was refused a moment ago."""
        for charge in charges if self._refused else ():
            known = self._refused.get(charge.key)
            if known is not None and known[0] > time.monotonic():
                return known[1:]
            self._refused.pop(charge.key, None)
        return None

    def remember(self, admission: Admission, error: RateLimited, headers: Mapping[str, str]) -> None:
        """Those of its limits that have room for nothing."""
        if error.retry_after_s is None:
            return
        now = time.monotonic()
        if len(self._refused) >= MAX_REMEMBERED:
            self._refused = {key: known for key, known in self._refused.items() if known[0] > now}
        until = now + min(error.retry_after_s, REMEMBERED_S)
        for charge, level in zip(admission.charges, admission.taken.levels, strict=True):
            if level.remaining(charge) < 1 and len(self._refused) < MAX_REMEMBERED:
                self._refused[charge.key] = (until, error, headers)

    def check_shared(self, cost: Cost) -> None:
        """Raise Overloaded if a request is costly and Redis, which should count it, is known to be away."""
        if cost in ("costly", "spending") and self._redis is not None and not self._redis.is_up:
            raise Overloaded(
                "This cannot be counted at the moment, and is not done uncounted. Try again in a few seconds.",
                code="limits_unavailable",
                retry_after_s=RETRY_AFTER_S,
            )

    async def standing(self, principal: Principal, address: str) -> tuple[Caller, list[dict[str, object]]]:
        """Who calls, and how their limits stand: of calls of any model, and of other requests."""
        policies = self.policies
        caller = await policies.find(principal, address)
        asked = [charge for is_costly in (False, True) for charge in policies.other_charges(caller, is_costly)]
        # Those of an anonymous person's address are among both.
        each = {charge.key: charge for charge in [*policies.call_charges(caller, None, 0, 0), *asked]}
        looks = [charge.costing(0) for charge in each.values()]
        taken, _ = await self._count(looks, (), "", "light")
        return caller, standing(looks, taken.levels)

    async def _count(
        self, charges: Sequence[Charge], places: Sequence[Place], holder: str, cost: Cost
    ) -> tuple[Taken, Counters]:
        if not charges and not places:
            return Taken(True, (), ()), self._memory
        if self._redis is not None:
            try:
                return await self._redis.take(charges, places, holder), self._redis
            except CountersDown:
                self.check_shared(cost)
        return await self._memory.take(charges, places, holder), self._memory

    def _hear(self, is_shared: bool) -> None:
        # Refused by the one, somebody may be welcome to the other.
        self._refused.clear()
        self._watch(is_shared)

    def _settle(
        self, admission: Admission, corrections: Sequence[Correction], left: Sequence[Place]
    ) -> asyncio.Task[None] | None:
        """None: it is done later, out of the way of the answer."""
        if not admission.places:
            self._with_places.discard(admission)
        before = self._unsettled.pop(admission, ([], []))
        work = ([*before[0], *corrections], [*before[1], *left])
        if admission.counters is not self._redis or admission.has_last_place:
            return self._start(self._settle_now(admission, *work))
        self._unsettled[admission] = work
        if self._settling is None:
            self._settling = self._start(self._settle_soon())
        return None

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def _settle_soon(self) -> None:
        await asyncio.sleep(SETTLE_AFTER_S)
        self._settling = None
        unsettled, self._unsettled = self._unsettled, {}
        await asyncio.gather(*(self._settle_now(admission, *work) for admission, work in unsettled.items()))

    async def _settle_now(self, admission: Admission, corrections: Sequence[Correction], left: Sequence[Place]) -> None:
        try:
            await admission.counters.settle(corrections, left, admission.holder)
        except CountersDown:
            # What was reserved counts until its window is over; places end by themselves.
            logger.info("an answer was not settled, Redis is away")

    async def _hold(self) -> None:
        """Renew the places of all requests under way, also those that a Redis started anew does not know."""
        try:
            while self._with_places:
                await asyncio.sleep(HOLD_EVERY_S)
                for admission in list(self._with_places):
                    with contextlib.suppress(CountersDown):
                        await admission.counters.hold(admission.places, admission.holder)
        finally:
            self._holding = None


class Gate:
    """What one request has to pass. `headers` say how its limits stand, once that is known."""

    def __init__(self, limits: Limits, caller: Caller, cost: Cost) -> None:
        self._limits = limits
        self._caller = caller
        self._cost: Cost = cost
        self._admission: Admission | None = None
        self.headers: Mapping[str, str] = {}

    @property
    def is_passed(self) -> bool:
        return self._admission is not None

    async def enter(self) -> None:
        """Admit a request that calls no model; of a call only see whether it was refused a moment ago."""
        limits, policies = self._limits, self._limits.policies
        if self._cost == "call":
            if limits.has_refused:
                self._check_remembered(policies.call_charges(self._caller, None, 0, 0))
            return
        limits.check_shared(self._cost)
        if self._cost == "spending":
            await policies.check_spent(self._caller)
        await self._pass(policies.other_charges(self._caller, is_costly=self._cost != "light"))

    async def admit(self, call: Call, target: Target) -> Admission:
        """Admit a call of a model.

        Raises:
            RateLimited: a limit is reached; nothing was taken of the others.
            InsufficientQuota: the owner's tokens or money of this month are used up.
        """
        policies = self._limits.policies
        sizes = estimate(call, self._limits.reserved_tokens)
        charges = policies.call_charges(self._caller, model_of(target), *sizes)
        await policies.check_spent(self._caller)
        return await self._pass(charges, policies.places(self._caller))

    async def count_failure(self) -> None:
        """Count a call that failed before it was admitted, as a request, so that guessing is limited too."""
        charges = self._limits.policies.call_charges(self._caller, None, 0, 0)
        await self._pass([charge for charge in charges if charge.kind == "requests"])

    def leave(self) -> None:
        if self._admission is not None:
            self._admission.finish()

    async def _pass(self, charges: Sequence[Charge], places: Sequence[Place] = ()) -> Admission:
        self._check_remembered(charges)
        admission = await self._limits.take(charges, places, self._cost)
        self.headers = headers_of(charges, admission.taken)
        if not admission.taken.is_admitted:
            error = refusal(charges, places, admission.taken)
            self._limits.remember(admission, error, self.headers)
            raise error
        self._admission = admission
        return admission

    def _check_remembered(self, charges: Sequence[Charge]) -> None:
        found = self._limits.find_refusal(charges)
        if found is not None:
            error, self.headers = found
            raise error


def model_of(target: Target) -> str:
    """The Model or base that a call counts for, whichever of its versions and names was called."""
    if target.version is None:
        return target.base
    if target.version.startswith("ft:"):
        # A checkpoint, by its full name: what stands before its suffix may hold colons itself.
        _, suffix, unique, _ = target.version.rsplit(":", 3)
        return suffix or unique
    return target.stable_name.rpartition("@")[0]


def _open_redis(settings: Settings, watch: Callable[[bool], None]) -> "RedisCounters | None":
    limits = settings.limits
    if limits.redis_url is None:
        return None
    # Only who counts in Redis loads its client.
    from tuneloom.serve.limits_redis import RedisCounters

    try:
        return RedisCounters(
            limits.redis_url, watch, password_file=limits.redis_password_file, timeout_s=limits.redis_timeout_s
        )
    except OSError as error:
        raise InvalidRequest(
            f"`limits.redis_password_file`: {limits.redis_password_file} cannot be read: {error.strerror}."
        ) from error
