"""The rows of all drafters of a draft as one file: what is the same or too alike among them is dropped here."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuneloom.control.drafting.ledger import read_rows
from tuneloom.control.drafting.replies import encode
from tuneloom.control.drafting.run import read_seeds
from tuneloom.control.drafting.sieve import Sieve
from tuneloom.domain import DraftBatch, DraftCounts, Drafter, DraftSpec
from tuneloom.rows.fields import Wrong
from tuneloom.store import Store
from tuneloom.store.base import BlobCorrupt, BlobNotFound

logger = logging.getLogger(__name__)

# Other failures of the store pass.
LOST = (BlobNotFound, BlobCorrupt, Wrong)


@dataclass(frozen=True)
class Collected:
    """Lines of JSON, and what was dropped on the way to them, by reason."""

    lines: tuple[bytes, ...]
    dropped: dict[str, int]

    def counts(self, drafters: Sequence[Drafter]) -> DraftCounts:
        """Those of the drafters, with what was dropped between them."""
        counts = sum((drafter.counts for drafter in drafters), DraftCounts())
        return (counts + DraftCounts(dropped=self.dropped)).model_copy(update={"kept": len(self.lines)})


def batches_in_turn(drafters: Sequence[Drafter]) -> list[DraftBatch]:
    """The first of each, then the second of each: so nobody's rows are the surplus."""
    rounds = max((len(drafter.batches) for drafter in drafters), default=0)
    in_order = sorted(drafters, key=lambda drafter: drafter.number)
    return [drafter.batches[turn] for turn in range(rounds) for drafter in in_order if turn < len(drafter.batches)]


def collect(store: Store, spec: DraftSpec, drafters: Sequence[Drafter]) -> Collected:
    """The same lines whenever it is asked for the same batches.

    What the store has lost is dropped: a draft is not to wait for it for ever.
    """
    sieve, lines, dropped = Sieve(spec, _seeds(store, spec)), [], Counter[str]()
    for batch in batches_in_turn(drafters):
        try:
            rows = read_rows(store.blobs, batch)
        except LOST as error:
            logger.error("rows of a draft cannot be read: %s: %s", batch.blob, error)
            dropped["unreadable"] += batch.rows
            continue
        for row in rows:
            reason = sieve.is_new(row) or ("surplus" if len(lines) == spec.rows else None)
            if reason is None:
                lines.append(encode(row) + b"\n")
            else:
                dropped[reason] += 1
    return Collected(tuple(lines), dict(dropped))


def _seeds(store: Store, spec: DraftSpec) -> list[dict[str, Any]]:
    try:
        return read_seeds(store, spec)
    except LOST as error:
        logger.error("seed rows of a draft cannot be read: %s: %s", spec.seeds, error)
        return []


def batches_by_time(drafters: Sequence[Drafter]) -> list[DraftBatch]:
    """In the order in which they came: what comes later stands behind."""
    placed = [(batch.at, drafter.number, batch) for drafter in drafters for batch in drafter.batches]
    return [batch for *_, batch in sorted(placed, key=lambda item: item[:2])]
