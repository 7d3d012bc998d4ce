"""Writing what was used: totals in memory, written out now and then as parts of which each has one writer.

A part is written whole, against the revision that was written last: a commit whose answer was lost may be repeated and
never counts twice. A part that was folded meanwhile is gone; the fold says what of it was counted, and the rest goes on
in a new part. While the store is away the totals wait.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tuneloom.domain import Amounts, UsageKind, UsageLine, UsagePart, Used, hour_of, new_id
from tuneloom.store.base import Create
from tuneloom.store.records import Records, Stored

logger = logging.getLogger(__name__)

# Seconds between two flushes: what a crash loses at most, with the time that a flush takes.
FLUSH_S = 4.0
LINES_OF_PART = 100
# Of one commit: parts, and lines of them all, so that it stays far below a megabyte.
PARTS_OF_COMMIT, LINES_OF_COMMIT = 400, 2000
MAX_LINES = 50_000
TRIES = 3
# Names what was used when there were too many lines to tell.
OTHER = "(other)"


@dataclass(eq=False)
class _Part:
    """`saved` is what it is known to hold in the store; `is_sure` says that `rev` is its revision there."""

    id: str
    owner: str
    hour: str
    lines: dict[Used, Amounts] = field(default_factory=dict)
    saved: dict[Used, Amounts] = field(default_factory=dict)
    rev: str | None = None
    is_sure: bool = True
    is_dirty: bool = True

    def record(self) -> UsagePart:
        return UsagePart(id=self.id, owner=self.owner, hour=self.hour, lines=_to_lines(self.lines))


class UsageWriter:
    """Adds up and writes out. Thread-safe; `add` never waits for the store."""

    def __init__(self, records: Records, clock: Callable[[], float] = time.time, *, max_lines: int = MAX_LINES) -> None:
        self._records = records
        self._clock = clock
        self._max_lines = max_lines
        self._name = new_id("uw-", 12)
        self._num_parts = 0
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._parts: dict[str, _Part] = {}
        self._places: dict[tuple[str, str, Used], _Part] = {}
        self._open: dict[tuple[str, str], _Part] = {}

    def add(self, owner: str, used: Used, amounts: Amounts) -> None:
        """Count it into the hour that it is now.

        With too many lines in memory, as when the store is away for long, new ones join one of their owner.
        """
        if amounts.is_nothing:
            return
        hour = hour_of(self._clock())
        with self._lock:
            part = self._places.get((hour, owner, used))
            if part is None and len(self._places) >= self._max_lines:
                used = Used(kind=used.kind, base=used.base, model=OTHER)
                part = self._places.get((hour, owner, used))
            if part is None:
                part = self._place(hour, owner, used)
            part.lines[used] = part.lines[used] + amounts if used in part.lines else amounts
            part.is_dirty = True

    def flush(self) -> bool:
        """Write out what is new; whether all of it was. Never raises for want of a store: the next flush goes on."""
        with self._turn:
            with self._lock:
                dirty = [part for part in self._parts.values() if part.is_dirty]
            is_done = all(self._write_out(parts) for parts in _portions(dirty))
            self._drop_past()
            return is_done

    def _place(self, hour: str, owner: str, used: Used) -> _Part:
        part = self._open.get((hour, owner))
        if part is None or len(part.lines) >= LINES_OF_PART:
            part = _Part(self._new_id(hour), owner, hour)
            self._parts[part.id] = self._open[hour, owner] = part
        self._places[hour, owner, used] = part
        return part

    def _new_id(self, hour: str) -> str:
        self._num_parts += 1
        return f"{hour}:{self._name}:{self._num_parts}"

    def _write_out(self, parts: list[_Part]) -> bool:
        try:
            # Again at once: a part may have been folded, or written by a commit that gave no answer.
            return any(self._write(parts) for _ in range(TRIES))
        except Exception as error:
            # Whatever it was, the totals are still here.
            logger.warning("usage could not be written and waits: %s", error)
            return False

    def _write(self, parts: list[_Part]) -> bool:
        """Write parts in one commit, or find out first what became of them; False if the commit failed."""
        for part in parts:
            if not part.is_sure:
                self._find_out(part)
        table = self._records.usage_parts
        with self._lock:
            parts = [part for part in parts if part.is_dirty]
            values = [part.record() for part in parts]
            for part in parts:
                # Until the answer is here.
                part.is_dirty = part.is_sure = False
        writes = [
            table.create(value) if part.rev is None else table.replace(Stored(value, part.rev), value)
            for part, value in zip(parts, values, strict=True)
        ]
        try:
            revs = self._records.commit(*writes) if writes else {}
        except Exception as error:
            logger.info("usage: a commit failed, its parts are looked up: %s", error)
            with self._lock:
                for part in parts:
                    part.is_dirty = True
            return False
        with self._lock:
            for part, value in zip(parts, values, strict=True):
                part.rev, part.is_sure = revs[UsagePart.collection, part.id], True
                part.saved = _to_dict(value.lines)
        return True

    def _find_out(self, part: _Part) -> None:
        """What became of a part whose last commit gave no answer, or met another revision."""
        stored = self._records.usage_parts.find(part.id)
        if stored is not None:
            part.rev, part.saved, part.is_sure = stored.rev, _to_dict(stored.value.lines), True
            return
        fold = self._records.usage_folds.find(part.id)
        if fold is None and part.rev is None:
            # It was never written.
            part.is_sure = True
            return
        # A fold that is gone as well was made days ago, of what was known to be written.
        counted = _to_dict(fold.value.lines) if fold else part.saved
        with self._lock:
            del self._parts[part.id]
            part.id = self._new_id(part.hour)
            self._parts[part.id] = part
            part.rev, part.saved, part.is_sure = None, {}, True
            rest = {used: amounts - counted.get(used, Amounts()) for used, amounts in part.lines.items()}
            part.lines = {used: amounts for used, amounts in rest.items() if not amounts.is_nothing}
            part.is_dirty = bool(part.lines)
            for used in rest.keys() - part.lines.keys():
                del self._places[part.hour, part.owner, used]

    def _drop_past(self) -> None:
        """Forget parts of past hours that are written."""
        now = hour_of(self._clock())
        with self._lock:
            for part in [p for p in self._parts.values() if not p.is_dirty and p.is_sure and p.hour != now]:
                del self._parts[part.id]
                if self._open.get((part.hour, part.owner)) is part:
                    del self._open[part.hour, part.owner]
                for used in part.lines:
                    del self._places[part.hour, part.owner, used]


def final_part(owner: str, name: str, at_s: float, used: Used, amounts: Amounts) -> Create:
    """A part that is written once, in the commit of what it is about. `name` is the id of that: a job, a draft."""
    hour = hour_of(at_s)
    part = UsagePart(id=f"{hour}:{name}", owner=owner, hour=hour, lines=(UsageLine(used=used, amounts=amounts),))
    return Create(UsagePart.collection, part.id, part.model_dump(mode="json"))


def record_draft(
    owner: str,
    draft_id: str,
    at_s: float,
    *,
    model: str,
    key_id: str = "",
    input_tokens: int = 0,
    output_tokens: int = 0,
    requests: int = 0,
    cost: float | None = None,
) -> Create:
    """What a draft of rows has taken of a provider's `model`, as a write for the commit that ends the draft.

    `draft_id` may be the id of a piece of the draft: it counts once. `cost` in `train.currency`.
    """
    kind: UsageKind = "drafting"
    amounts = Amounts(
        requests=requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cost_nano=None if cost is None else round(cost * 1e9),
    )
    used = Used(kind=kind, base=model, model=model, key_id=key_id, job_id=draft_id)
    return final_part(owner, draft_id, at_s, used, amounts)


def _portions(parts: list[_Part]) -> Iterable[list[_Part]]:
    portion: list[_Part] = []
    num_lines = 0
    for part in parts:
        if portion and (len(portion) == PARTS_OF_COMMIT or num_lines + len(part.lines) > LINES_OF_COMMIT):
            yield portion
            portion, num_lines = [], 0
        portion.append(part)
        num_lines += len(part.lines)
    if portion:
        yield portion


def _to_lines(lines: dict[Used, Amounts]) -> tuple[UsageLine, ...]:
    return tuple(UsageLine.model_construct(used=used, amounts=amounts) for used, amounts in lines.items())


def _to_dict(lines: Iterable[UsageLine]) -> dict[Used, Amounts]:
    return {line.used: line.amounts for line in lines}
