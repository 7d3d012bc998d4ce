"""What one drafter's process writes: its batches, its counts and its signs of life, each against the fence."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tuneloom.control.drafting.replies import encode
from tuneloom.domain import DraftBatch, DraftCounts, Drafter, JobError
from tuneloom.errors import Overloaded
from tuneloom.rows.parse import parse
from tuneloom.store import Store
from tuneloom.store.base import Blobs, StoreConflict
from tuneloom.store.records import Stored

STORE_TRIES, STORE_WAIT_S = 5, 1.0


class Fenced(Exception):
    """This attempt is over: the drafter was closed, or another attempt has begun."""


class Ledger:
    """All changes of a drafter's record by one attempt. Safe between its thread and that of `beating`."""

    def __init__(self, store: Store, drafter_id: str, attempt: int, *, clock: Callable[[], float] = time.time) -> None:
        """Raises Fenced if the attempt is not the current one."""
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._ended = threading.Event()
        found = store.records.drafters.find(drafter_id)
        if found is None or found.value.attempt != attempt or found.value.state != "running":
            raise Fenced(drafter_id)
        self._stored: Stored[Drafter] = found

    @property
    def drafter(self) -> Drafter:
        return self._stored.value

    @property
    def is_fenced(self) -> bool:
        return self._ended.is_set()

    def reserve(self, input_tokens: int, output_tokens: int) -> None:
        """Say what the call that comes may take, so that it counts if we are lost during it."""
        self._write(reserved_input=input_tokens, reserved_output=output_tokens)

    def add(self, rows: list[dict[str, Any]], counts: DraftCounts, model_version: str | None) -> None:
        """Keep the rows of one reply and its counts, together or not at all."""
        drafter = self.drafter
        changes: dict[str, Any] = {
            "counts": drafter.counts + counts,
            "reserved_input": 0,
            "reserved_output": 0,
            "model_version": model_version or drafter.model_version,
        }
        blob = None
        if rows:
            # The attempt is in its name: what a lost one has written, and not noted, is in nobody's way.
            blob = f"drafts/{drafter.draft_id}/d{drafter.number}-b{len(drafter.batches)}-a{drafter.attempt}"
            self._store.blobs.write(blob, b"".join(encode(row) + b"\n" for row in rows))
            changes["batches"] = (*drafter.batches, DraftBatch(blob=blob, rows=len(rows), at=self._clock()))
        try:
            self._write(**changes)
        except Fenced:
            if blob is not None:
                self._drop(blob)
            raise

    def end(self, outcome: str | None, error: JobError | None = None) -> None:
        """The last word of this attempt."""
        state = "failed" if error is not None else "done"
        self._write(state=state, outcome=outcome, error=error, reserved_input=0, reserved_output=0)
        self._ended.set()

    @contextlib.contextmanager
    def beating(self, interval_s: float) -> Iterator[None]:
        """Say every `interval_s` that this attempt lives, for as long as the block runs."""
        thread = threading.Thread(target=self._beat, args=(interval_s,), name="drafter-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(STORE_WAIT_S)

    def _beat(self, interval_s: float) -> None:
        while not self._ended.wait(interval_s):
            with contextlib.suppress(Fenced, Overloaded):
                self._write()

    def _drop(self, blob: str) -> None:
        """Remove what came too late, unless it was noted and only the answer was lost."""
        found = self._store.records.drafters.find(self.drafter.id)
        if found is None or all(batch.blob != blob for batch in found.value.batches):
            self._store.blobs.delete(blob)

    def _write(self, **changes: Any) -> None:
        """Raises Fenced if somebody else has written the record since."""
        with self._lock:
            table = self._store.records.drafters
            after = self.drafter.model_copy(update={"heartbeat_at": self._clock(), **changes})
            for attempt in range(STORE_TRIES):
                if self._ended.is_set():
                    raise Fenced(after.id)
                try:
                    revs = self._store.records.commit(table.replace(self._stored, after))
                except Overloaded:
                    if attempt == STORE_TRIES - 1:
                        raise
                    self._ended.wait(STORE_WAIT_S)
                except StoreConflict:
                    # Unless it is our own write, whose answer was lost.
                    found = table.find(after.id)
                    if found is None or found.value != after:
                        self._ended.set()
                        raise Fenced(after.id) from None
                    self._stored = found
                    return
                else:
                    self._stored = Stored(after, revs[(Drafter.collection, after.id)])
                    return


def read_rows(blobs: Blobs, batch: DraftBatch) -> list[dict[str, Any]]:
    return [parse(line) for line in blobs.read(batch.blob).splitlines()]
