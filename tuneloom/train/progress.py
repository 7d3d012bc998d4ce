"""The trainer's voice in the store: its progress record, events and heartbeat. Knows no model and no Ray.

Every commit replaces the progress record, which is the fence: once a newer attempt has written it, nothing of this one
can be written any more.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tuneloom.domain import Event, Progress, event_id
from tuneloom.errors import Overloaded
from tuneloom.store.base import StoreConflict, Write
from tuneloom.store.records import Records, Stored

logger = logging.getLogger(__name__)

# Control writes this stage when it gives an attempt up.
CLOSED = "closed"
HEARTBEAT_S = 5.0
POLL_S = 1.0
FLUSH_S = 0.5
MAX_TRIES = 20
MAX_PENDING = 200

Intent = Literal["run", "pause", "cancel", "stop"]


class FenceLost(Exception):
    """Another attempt has taken over, or the job is gone. Stop at once and write nothing."""


class Voice:
    """What one attempt says of itself; thread-safe. `clock` gives Unix seconds."""

    def __init__(self, records: Records, job_id: str, attempt: int, *, clock: Callable[[], float] = time.time) -> None:
        self._records = records
        self._job_id = job_id
        self._attempt = attempt
        self._clock = clock
        self._lock = threading.Lock()
        self._stored: Stored[Progress] | None = None
        self._pending: list[Event] = []
        self._pending_step = 0
        self._pending_changes: dict[str, Any] = {}
        self._flushed_at = 0.0
        self._event_at = 0.0
        self._measured: Callable[[], dict[str, Any]] = dict

    def measure(self, read: Callable[[], dict[str, Any]]) -> None:
        """Write the fields that `read` gives with each commit from now on."""
        self._measured = read

    def progress(self) -> Progress:
        """The record as the store holds it. Raises FenceLost if it belongs to another attempt."""
        with self._lock:
            return self._read().value

    def last_word(self) -> Progress:
        """The record even if control has closed the attempt. Raises FenceLost if it belongs to another attempt."""
        stored = self._records.progress.find(self._job_id)
        if stored is None or stored.value.attempt != self._attempt:
            raise FenceLost(f"job {self._job_id} attempt {self._attempt} has been replaced")
        return stored.value

    def say(self, *messages: str, writes: tuple[Write, ...] = (), level: str = "info", **changes: Any) -> None:
        """Change fields of the progress record, and add events and other writes, in one commit.

        Metrics that wait go with it.

        Raises:
            FenceLost: another attempt has taken over.
            StoreConflict: one of `writes` does not hold.
        """
        with self._lock:
            events = [self._event(message, level=level) for message in messages]
            self._commit([*self._pending, *events], writes, changes)

    def metrics(self, step: int, message: str, data: dict[str, Any], **changes: Any) -> None:
        """Report a step, unless it was reported before this start. Written at once or within half a second."""
        with self._lock:
            if step > max(self._pending_step, self._known().value.logged_step):
                self._pending.append(self._event(message, kind="metrics", data=data))
                self._pending_step = step
            self._pending_changes = {"step": step, **changes}
            if self._clock() - self._flushed_at >= FLUSH_S or len(self._pending) >= MAX_PENDING:
                self._commit(self._pending, (), {})

    def heartbeat(self) -> None:
        with self._lock:
            self._commit(self._pending, (), {})

    def intent(self) -> Intent:
        """What the job's record asks of the trainer. Raises FenceLost if the job is over or has another attempt."""
        stored = self._records.jobs.find(self._job_id)
        if stored is None or stored.value.attempt != self._attempt or stored.value.state in ("succeeded", "failed"):
            raise FenceLost(f"job {self._job_id} attempt {self._attempt} is no longer wanted")
        return {"paused": "pause", "cancelled": "cancel"}.get(stored.value.state, "run")  # type: ignore[return-value]

    def _commit(self, events: list[Event], writes: tuple[Write, ...], changes: dict[str, Any]) -> None:
        for tries in range(1, MAX_TRIES + 1):
            stored = self._known()
            record = stored.value.model_copy(update=self._merged(stored.value, changes))
            creates = [self._records.events.create(event) for event in events]
            try:
                revisions = self._records.commit(self._records.progress.replace(stored, record), *creates, *writes)
            except StoreConflict:
                # The driver and the worker of one attempt share the record; another attempt shows on reading.
                fresh = self._read()
                if tries == MAX_TRIES or (writes and fresh.rev == stored.rev):
                    raise
            except Overloaded:
                if tries == MAX_TRIES:
                    raise
                time.sleep(random.uniform(0.1, 0.5))
            else:
                self._stored = Stored(record, revisions[(Progress.collection, self._job_id)])
                self._pending, self._pending_changes = [], {}
                self._flushed_at = self._clock()
                return

    def _merged(self, record: Progress, changes: dict[str, Any]) -> dict[str, Any]:
        logged = max(record.logged_step, self._pending_step)
        told = {**self._pending_changes, **self._measured(), **changes}
        return {**told, "heartbeat_at": self._clock(), "logged_step": logged}

    def _known(self) -> Stored[Progress]:
        return self._stored or self._read()

    def _read(self) -> Stored[Progress]:
        stored = self._records.progress.find(self._job_id)
        if stored is None or stored.value.attempt != self._attempt or stored.value.stage == CLOSED:
            self._stored = None
            raise FenceLost(f"job {self._job_id} attempt {self._attempt} has been replaced")
        self._stored = stored
        return stored

    def _event(self, message: str, *, level: str = "info", kind: str = "message", data: Any = None) -> Event:
        # Ids order events by their microsecond; two of one voice must not share it.
        now = self._event_at = max(self._clock(), self._event_at + 2e-6)
        return Event(
            id=event_id(now),
            owner=self._known().value.owner,
            job_id=self._job_id,
            created_at=now,
            level=level,  # type: ignore[arg-type]
            message=message,
            type=kind,  # type: ignore[arg-type]
            data=data,
        )


class Pulse:
    """A thread that keeps the heartbeat while the trainer imports, loads and computes, and watches what is wanted.

    `stop_file` appears when the driver is told to end: the trainer then saves and leaves without a last word.
    `notice` is set when the node is about to be taken away. `look` is called each second.
    """

    def __init__(
        self,
        voice: Voice,
        stop_file: Path,
        notice: threading.Event | None = None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self._voice = voice
        self._stop_file = stop_file
        self._notice = notice or threading.Event()
        self._look_around = look
        self._is_over = threading.Event()
        self._lost: FenceLost | None = None
        self._intent: Intent = "run"
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> "Pulse":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(timeout=30)

    @property
    def is_noticed(self) -> bool:
        """Whether the node is about to be taken away."""
        return self._notice.is_set()

    def intent(self, *, fresh: bool = False) -> Intent:
        """What is wanted as of a second ago, or with `fresh` as of now. Raises FenceLost."""
        if fresh and self._lost is None:
            self._look()
        if self._lost is not None:
            raise self._lost
        return self._intent

    def _run(self) -> None:
        beat_at = 0.0
        while not self._is_over.wait(POLL_S):
            try:
                self._look()
                self._look_around()
                if time.monotonic() - beat_at >= HEARTBEAT_S:
                    self._voice.heartbeat()
                    beat_at = time.monotonic()
            except FenceLost as error:
                self._lost = error
                return
            except Exception:
                # A store that fails for a moment must not end the heartbeat; the next round tries again.
                logger.warning("heartbeat failed", exc_info=True)

    def _look(self) -> None:
        try:
            intent = self._voice.intent()
        except FenceLost as error:
            self._lost = error
            return
        is_told = self.is_noticed or self._stop_file.exists()
        self._intent = "stop" if intent == "run" and is_told else intent
