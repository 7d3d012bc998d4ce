"""Folding parts of past hours into hourly rows and months, and removing what has had its time.

A commit takes parts and adds what they hold, or does neither: whatever dies, each token counts once. Of a part that is
taken a `UsageFold` stays, for its writer may not know what of it was there.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from itertools import groupby

from tuneloom.domain import Amounts, UsageFold, UsageMonth, UsagePart, UsageRow, Used, hour_of
from tuneloom.store.base import Range, StoreConflict, Write
from tuneloom.store.records import Records, Stored, T, Table
from tuneloom.store.usage import AFTER_HOUR

logger = logging.getLogger(__name__)

# An hour's parts are folded this long after its end, when their writers have written them out.
SETTLE_S = 120.0
FOLD_MEMORY_S = 3 * 24 * 3600.0
# Of one query, and of lines in one commit: each line may write a row.
BATCH, LINES_OF_COMMIT = 200, 300
# Rows of an owner and hour that are read together.
MAX_QUERIED = 500
# Time for one round; the next goes on.
ROUND_S = 10.0


def roll_up(records: Records, now_s: float, *, round_s: float = ROUND_S) -> int:
    """Fold the parts of past hours; how many were. May run in several processes, and be killed, at any time."""
    deadline, count = time.monotonic() + round_s, 0
    bounds = Range(below=hour_of(now_s - SETTLE_S))
    while time.monotonic() < deadline:
        parts = records.usage_parts.query(bounds=bounds, limit=BATCH)
        folded = 0
        for (owner, hour), group in groupby(sorted(parts, key=_place), key=_place):
            for portion in _portions(list(group)):
                folded += _fold(records, owner, hour, portion)
            if time.monotonic() > deadline:
                break
        count += folded
        if len(parts) < BATCH or not folded:
            break
    return count


def drop_old(records: Records, now_s: float, *, keep_s: float, round_s: float = ROUND_S) -> None:
    """Remove rows older than `keep_s`, and folds of which no writer can know any more."""
    deadline = time.monotonic() + round_s
    _drop(records, records.usage_rows, hour_of(now_s - keep_s), deadline)
    _drop(records, records.usage_folds, hour_of(now_s - FOLD_MEMORY_S), deadline)


def row_id(owner: str, hour: str, used: Used) -> str:
    text = json.dumps([owner, *used.model_dump().values()])
    return f"{hour}:{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _fold(records: Records, owner: str, hour: str, parts: list[Stored[UsagePart]]) -> int:
    """Fold parts of one owner and hour in one commit; 0 if one of them changed meanwhile."""
    sums: dict[Used, Amounts] = {}
    for stored in parts:
        for line in stored.value.lines:
            sums[line.used] = sums.get(line.used, Amounts()) + line.amounts
    writes: list[Write] = []
    for stored in parts:
        writes.append(records.usage_parts.delete(stored))
        part = stored.value
        writes.append(records.usage_folds.create(UsageFold(id=part.id, owner=owner, lines=part.lines)))
    rows = _find_rows(records, owner, hour, [row_id(owner, hour, used) for used in sums])
    for (used, amounts), (id, row) in zip(sums.items(), rows.items(), strict=True):
        if row is None:
            new = UsageRow(id=id, owner=owner, hour=hour, used=used, amounts=amounts)
            writes.append(records.usage_rows.create(new))
        else:
            total = row.value.amounts + amounts
            writes.append(records.usage_rows.replace(row, row.value.model_copy(update={"amounts": total})))
    writes.append(_add_month(records, owner, hour, sum(sums.values(), Amounts())))
    try:
        records.commit(*writes)
    except StoreConflict:
        logger.info("usage: parts of %s changed while they were folded, the next round folds them", hour)
        return 0
    return len(parts)


def _find_rows(records: Records, owner: str, hour: str, ids: list[str]) -> dict[str, Stored[UsageRow] | None]:
    """The rows that are there already: by one query, unless the owner has very many in this hour."""
    bounds = Range(at_least=hour, at_most=hour + AFTER_HOUR)
    stored = records.usage_rows.query({"owner": owner}, bounds=bounds, limit=MAX_QUERIED)
    if len(stored) == MAX_QUERIED:
        return {id: records.usage_rows.find(id) for id in ids}
    found = {row.value.id: row for row in stored}
    return {id: found.get(id) for id in ids}


def _add_month(records: Records, owner: str, hour: str, amounts: Amounts) -> Write:
    month, day = hour[:7], hour[8:10]
    id = f"{month}:{owner}"
    found = records.usage_months.find(id)
    if found is None:
        return records.usage_months.create(UsageMonth(id=id, owner=owner, days={day: amounts}))
    days = found.value.days
    days = {**days, day: days.get(day, Amounts()) + amounts}
    return records.usage_months.replace(found, found.value.model_copy(update={"days": days}))


def _place(stored: Stored[UsagePart]) -> tuple[str, str]:
    return stored.value.owner, stored.value.hour


def _portions(parts: list[Stored[UsagePart]]) -> Iterator[list[Stored[UsagePart]]]:
    """Parts that fit into one commit: two writes for each, one for each line, one for the month."""
    portion: list[Stored[UsagePart]] = []
    size = 0
    for stored in parts:
        count = len(stored.value.lines) + 2
        if portion and size + count > LINES_OF_COMMIT:
            yield portion
            portion, size = [], 0
        portion.append(stored)
        size += count
    if portion:
        yield portion


def _drop(records: Records, table: Table[T], before: str, deadline: float) -> None:
    while time.monotonic() < deadline:
        old = table.query(bounds=Range(below=before), limit=BATCH)
        if old:
            records.commit(*(table.delete(stored) for stored in old))
        if len(old) < BATCH:
            return
