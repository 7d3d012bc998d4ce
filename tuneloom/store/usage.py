"""Reading what was used. Rows and open parts together are all of it, each token once."""

import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tuneloom.domain import Amounts, Record, UsagePart, Used, hour_of
from tuneloom.errors import InvalidRequest
from tuneloom.store.base import Range, Scalar
from tuneloom.store.records import Records, Stored, Table

T = TypeVar("T", bound=Record)
G = TypeVar("G", bound=Hashable)
R = TypeVar("R")

CHUNK = 500
# Of one answer.
MAX_ROWS = 200_000
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
    found = add_up(records, first, last, lambda hour, owner, used: (hour, owner, used), owner=owner)
    order = sorted(found.items(), key=lambda item: item[0][0])
    return [Usage(owner, hour, used, amounts) for (hour, owner, used), amounts in order]


def add_up(
    records: Records, first: str, last: str, group: Callable[[str, str, Used], G | None], *, owner: str | None = None
) -> dict[G, Amounts]:
    """The sums over the hours `first` to `last`, both included, of what `group(hour, owner, used)` puts together.

    What it gives None for does not count. Reads row by row and keeps only the sums.

    Raises:
        InvalidRequest: these hours have too many rows for one answer.
    """
    where: dict[str, Scalar] = {} if owner is None else {"owner": owner}
    bounds = Range(at_least=first, at_most=last + AFTER_HOUR)

    def put(sums: dict[G, Amounts], hour: str, owner: str, used: Used, amounts: Amounts) -> None:
        key = group(hour, owner, used)
        if key is not None:
            sums[key] = sums[key] + amounts if key in sums else amounts

    def read_rows() -> dict[G, Amounts]:
        sums: dict[G, Amounts] = {}
        for number, stored in enumerate(_all(records.usage_rows, where, bounds)):
            if number >= MAX_ROWS:
                raise InvalidRequest(
                    f"There are more than {MAX_ROWS:,} rows of usage in this time. Ask for fewer buckets at once.",
                    param="limit",
                )
            row = stored.value
            put(sums, row.hour, row.owner, row.used, row.amounts)
        return sums

    parts, found = _with_open_parts(records, where, bounds, read_rows)
    for part in parts:
        for line in part.lines:
            put(found, part.hour, part.owner, line.used, line.amounts)
    return found


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
