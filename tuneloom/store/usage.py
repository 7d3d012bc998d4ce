"""Reading what was used. Rows and open parts together are all of it, each token once."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tuneloom.domain import Amounts, Record, UsagePart, Used, hour_of
from tuneloom.store.base import Range, Scalar
from tuneloom.store.records import Records, Stored, Table

T = TypeVar("T", bound=Record)

CHUNK = 500
# A part may be folded between two queries; then both are asked again.
ATTEMPTS = 5
# Sorts behind everything that an id may hold after the hour.
AFTER_HOUR = "~"


@dataclass(frozen=True)
class Spent:
    """What an owner has used. `cost` in `train.currency`, None if nothing of it had a price."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    trained_tokens: int = 0
    device_s: float = 0.0
    cost: float | None = None


@dataclass(frozen=True)
class Usage:
    """So much was used by an owner in an hour."""

    owner: str
    hour: str
    used: Used
    amounts: Amounts


def spent(records: Records, owner: str, since_s: float) -> Spent:
    """What `owner` has used since the beginning (UTC) of the day of `since_s`; jobs count when they have ended.

    Two queries: a row for each month, and the parts of the last hour or two, one for each replica and hundred of the
    owner's keys and models. Blocks; what was used in the last five seconds may be missing.
    """
    first = hour_of(since_s)[:10]
    months = records.usage_months

    def read_days() -> Amounts:
        total = Amounts()
        for stored in months.query({"owner": owner}, bounds=Range(at_least=first[:7])):
            month = stored.value.id[:7]
            for day, amounts in stored.value.days.items():
                if f"{month}-{day}" >= first:
                    total += amounts
        return total

    parts, total = _with_open_parts(records, {"owner": owner}, Range(), read_days)
    for part in parts:
        if part.hour >= first:
            for line in part.lines:
                total += line.amounts
    return Spent(
        total.input_tokens,
        total.cached_tokens,
        total.output_tokens,
        total.trained_tokens,
        total.device_s,
        total.cost,
    )


def read(records: Records, first: str, last: str, owner: str | None = None) -> list[Usage]:
    """What was used from the hour `first` to the hour `last`, both included, by everybody or by one owner.

    Lines that agree in hour and use are added up; in the order of hours.
    """
    where: dict[str, Scalar] = {} if owner is None else {"owner": owner}
    bounds = Range(at_least=first, at_most=last + AFTER_HOUR)

    def read_rows() -> dict[tuple[str, str, Used], Amounts]:
        rows = _all(records.usage_rows, where, bounds)
        return {(s.value.hour, s.value.owner, s.value.used): s.value.amounts for s in rows}

    parts, found = _with_open_parts(records, where, bounds, read_rows)
    for part in parts:
        for line in part.lines:
            at = (part.hour, part.owner, line.used)
            found[at] = found[at] + line.amounts if at in found else line.amounts
    return [Usage(owner, hour, used, amounts) for (hour, owner, used), amounts in sorted(found.items(), key=_hour)]


def _hour(item: tuple[tuple[str, str, Used], Amounts]) -> str:
    return item[0][0]


R = TypeVar("R")


def _with_open_parts(
    records: Records, where: dict[str, Scalar], bounds: Range, read_folded: Callable[[], R]
) -> tuple[list[UsagePart], R]:
    """The open parts, and what was folded, such that no part is in both or in neither."""
    for _ in range(ATTEMPTS):
        parts = [stored.value for stored in _all(records.usage_parts, where, bounds)]
        folded = read_folded()
        if not any(part.hour < hour_of(time.time()) for part in parts):
            return parts, folded
        # Those of past hours may be folded at any time: what is open still, was open all the while.
        still_open = {stored.value.id for stored in _all(records.usage_parts, where, bounds)}
        if all(part.id in still_open for part in parts):
            return parts, folded
    return [part for part in parts if part.id in still_open], folded


def _all(table: Table[T], where: dict[str, Scalar], bounds: Range) -> Iterator[Stored[T]]:
    after: T | None = None
    while True:
        batch = table.query(where, bounds=bounds, limit=CHUNK, after=after)
        yield from batch
        if len(batch) < CHUNK:
            return
        after = batch[-1].value
