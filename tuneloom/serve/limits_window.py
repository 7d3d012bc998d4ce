"""The arithmetic of limits: a window that slides, what is left in it and when there is room again. No storage, no time.

A window counts as `limits`' sliding window counter does: what was used in this span, and of the span before the share
that a window ending now still covers, rounded down. Times are milliseconds of whoever counts.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from limits import RateLimitItem

Kind = Literal["requests", "tokens"]


@dataclass(frozen=True)
class Charge:
    """What a request takes from one limit, which `item` defines. `whose` says to people what is limited."""

    key: str
    item: RateLimitItem
    kind: Kind
    whose: str
    cost: int = 1

    # Read many times for each request, and one charge serves many of them.
    @functools.cached_property
    def limit(self) -> int:
        return self.item.amount

    @functools.cached_property
    def size_ms(self) -> int:
        return self.item.get_expiry() * 1000

    def costing(self, cost: int) -> "Charge":
        return self if cost == self.cost else Charge(self.key, self.item, self.kind, self.whose, cost)


@dataclass(frozen=True)
class Place:
    """One of `limit` places that a request holds from its admission on, until it leaves it."""

    key: str
    limit: int
    whose: str
    what: str


class Level(NamedTuple):
    """How full a window is: its span began at `start_ms`, `now_ms` is when it was looked at."""

    start_ms: int
    before: int
    used: int
    now_ms: int

    def rolled(self, size_ms: int) -> "Level":
        """The same in the span that holds `now_ms`."""
        age_ms = self.now_ms - self.start_ms
        if age_ms < 0:
            # The clock was put back.
            return Level(self.now_ms, self.before, self.used, self.now_ms)
        if age_ms >= 2 * size_ms:
            return Level(self.now_ms, 0, 0, self.now_ms)
        if age_ms >= size_ms:
            return Level(self.start_ms + size_ms, self.used, 0, self.now_ms)
        return self

    def count(self, size_ms: int) -> int:
        """What counts against the limit now."""
        return self.used + self.before * (size_ms - (self.now_ms - self.start_ms)) // size_ms

    def remaining(self, charge: Charge) -> int:
        return max(0, charge.limit - self.count(charge.size_ms))

    def wait_ms(self, charge: Charge) -> int | None:
        """When `charge` fits, if nobody else takes anything: 0 is now, None never."""
        size_ms, free = charge.size_ms, charge.limit - charge.cost
        age_ms = self.now_ms - self.start_ms
        if free < 0:
            return None
        if self.count(size_ms) <= free:
            return 0
        if self.used <= free:
            return _age_of(self.before, free - self.used, size_ms) - age_ms
        return size_ms - age_ms + _age_of(self.used, free, size_ms)

    def reset_ms(self, size_ms: int) -> int:
        """When it is empty again, if nobody takes anything."""
        age_ms = self.now_ms - self.start_ms
        if self.used:
            return size_ms - age_ms + _age_of(self.used, 0, size_ms)
        return _age_of(self.before, 0, size_ms) - age_ms if self.count(size_ms) else 0


def _age_of(before: int, left: int, size_ms: int) -> int:
    """How old a span is when of the one before, in which more than `left` was used, no more than that counts."""
    return size_ms * (before - left - 1) // before + 1


@dataclass(frozen=True)
class Taken:
    """What became of a request's charges and places, in their order: all were taken, or none.

    `held`: of each place how many were held, without this request.
    """

    is_admitted: bool
    levels: tuple[Level, ...]
    held: tuple[int, ...]


@dataclass(frozen=True)
class Correction:
    """`by` more or, below 0, fewer of a charge than were taken when its span began at `start_ms`."""

    charge: Charge
    start_ms: int
    by: int


class CountersDown(Exception):
    """Who counts for all does not answer."""


class Counters(Protocol):
    """Where is counted. One call is one step for all others."""

    async def take(self, charges: Sequence[Charge], places: Sequence[Place], holder: str) -> Taken:
        """Take all of it, or nothing if one is exhausted. A charge of 0 only looks. Raises CountersDown."""
        ...

    async def settle(self, corrections: Sequence[Correction], left: Sequence[Place], holder: str) -> None:
        """Correct what was taken, and leave places. What is given back is never more than there is."""
        ...

    async def hold(self, places: Sequence[Place], holder: str) -> None:
        """Say that a request still holds its places; without it they may be given away after a while."""
        ...
