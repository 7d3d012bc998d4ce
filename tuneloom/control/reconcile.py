"""Moves every job one step towards where it should be, from what the records and the launcher say, again and again.

Level-triggered: a tick remembers nothing that it needs. Intent is committed before its effect and handles are known
before they exist, so control may die at any line; the next tick, here or in another process, finds out and goes on.
Every commit that ends an attempt also rewrites its Progress, the trainer's fence: a zombie fails at its next write.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from tuneloom.config import TrainSettings
from tuneloom.control import jobs
from tuneloom.control.admission import Admission
from tuneloom.control.check import Checker
from tuneloom.control.estimate import Estimator
from tuneloom.control.jobs import History, apply
from tuneloom.control.launcher import Launcher, LauncherUnavailable, Observation
from tuneloom.control.queue import LAUNCHING, Queue
from tuneloom.control.registration import Registrar
from tuneloom.control.writer import JobWriter
from tuneloom.domain import Event, Job, JobError, Progress
from tuneloom.errors import Overloaded
from tuneloom.store import Store
from tuneloom.store.base import StoreConflict, Write
from tuneloom.store.records import Stored

logger = logging.getLogger(__name__)

COPY_INTERVAL_S = 3.0
GRACE_S = 45.0
STOP_INTERVAL_S = 10.0
FORCE_S = 60.0


class Reconciler:
    """Call `tick` again and again from one thread. Several of them on one store disturb but never harm each other."""

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        checker: Checker,
        settings: TrainSettings,
        clock: Callable[[], float] = time.time,
        *,
        observe_every_s: float = 2.0,
    ) -> None:
        self._store = store
        self._records = store.records
        self._launcher = launcher
        self._settings = settings
        self._clock = clock
        self._observe_every_s = observe_every_s
        self._writer = JobWriter(store.records, clock)
        self._estimator = Estimator(store.records, settings)
        self._admission = Admission(checker, self._estimator, self._writer, clock)
        self._registrar = Registrar(store, self._estimator, self._writer, clock)
        self._queue = Queue(store.records, launcher, settings, self._writer, clock)
        # Memory that only spares work or delays force; losing it changes no outcome.
        self._alive_until: dict[str, float] = {}
        self._copied_at: dict[str, float] = {}
        self._overdue_since: dict[str, float] = {}
        self._stopped_at: dict[str, float] = {}
        self._warned_at = 0.0

    def tick(self) -> None:
        """One step for every job that needs one. A job that fails to step is logged and never stops the others."""
        pending = self._pending()
        self._forget(pending)
        waiting: list[Stored[Job]] = []
        for stored in pending:
            with self._guard(stored.value.id):
                if self._step(stored) == "waits":
                    waiting.append(stored)
        if not waiting:
            return
        with self._guard("the queue"):
            for stored, reason in self._queue.decide(waiting):
                with self._guard(stored.value.id):
                    self._queue.act(stored, reason)

    @contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """What goes wrong with one job is logged; the next tick tries again."""
        try:
            yield
        except StoreConflict:
            logger.info("changed under the step, next tick decides: %s", what)
        except LauncherUnavailable as error:
            self._warn_unavailable(error)
        except Overloaded as error:
            logger.warning("store is busy, next tick goes on: %s: %s", what, error)
        except Exception:
            logger.exception("could not be stepped: %s", what)

    def _pending(self) -> list[Stored[Job]]:
        """The jobs that may need a step, oldest first."""
        table = self._records.jobs
        found = table.query({"attempt_open": True})
        for state in ("validating_files", "queued", "running"):
            found += table.query({"state": state})
        unique = {stored.value.id: stored for stored in found}
        return sorted(unique.values(), key=lambda stored: (stored.value.created_at, stored.value.id))

    def _forget(self, pending: list[Stored[Job]]) -> None:
        """Drop checks and notes of jobs that moved on."""
        self._admission.keep_only(s.value.id for s in pending if s.value.state == "validating_files")
        handles = {stored.value.submission_id for stored in pending}
        for notes in (self._alive_until, self._overdue_since, self._stopped_at, self._copied_at):
            for handle in notes.keys() - handles:
                del notes[handle]

    def _step(self, stored: Stored[Job]) -> Literal["waits"] | None:
        """One step of a job by itself; `waits`: it may start when its turn comes."""
        job = stored.value
        if job.is_terminal or job.state == "paused":
            self._wind_down(stored)
        elif job.attempt_open:
            self._watch(stored)
        elif job.state == "validating_files":
            self._admission.step(stored)
        else:
            progress = self._records.progress.find(job.id) if job.attempt else None
            if progress is None or not self._take_last_word(stored, progress):
                return "waits"
        return None

    # Watching an attempt

    def _watch(self, stored: Stored[Job]) -> None:
        job = stored.value
        # In this order: what is read after a process was seen dead is its last word.
        seen = self._observe(job)
        progress = self._records.progress.find(job.id)
        if progress is None or progress.value.attempt != job.attempt:
            self._lose(stored, None, "its progress record is gone")
        elif self._take_last_word(stored, progress):
            pass
        elif progress.value.outcome is not None:
            self._yield(stored, progress, seen)
        elif seen is None:
            self._judge_by_heartbeat(stored, progress)
        elif seen.is_alive:
            self._judge_alive(stored, progress)
        elif seen.state == "unknown" and not _has_started(job, progress.value) and self._may_still_start(job):
            # The launch was lost between intent and effect, or is under way in a control that is dying.
            self._launcher.launch(job)
        else:
            self._lose(stored, progress, seen.message or "its process is gone")

    def _take_last_word(self, stored: Stored[Job], progress: Stored[Progress]) -> bool:
        """Finish the job if the trainer of its current attempt has published or failed."""
        job = stored.value
        if progress.value.attempt != job.attempt:
            return False
        match progress.value.outcome:
            case "published":
                self._registrar.register(stored, progress.value)
            case "failed":
                error = progress.value.error or JobError(code="training_failed", message="Training failed.")
                self._writer.fail(stored, error)
            case _:
                return False
        return True

    def _yield(self, stored: Stored[Job], progress: Stored[Progress], seen: Observation | None) -> None:
        """The trainer obeyed a pause that was taken back since: wait until it is gone, then run again."""
        job = stored.value
        if seen is not None and seen.is_alive:
            self._press(job)
        elif seen is not None or _is_by_hand(job) or self._is_silent(progress.value):
            self._writer.commit(stored, apply(job, jobs.Yielded()), [], self._fence(progress))

    def _judge_by_heartbeat(self, stored: Stored[Job], progress: Stored[Progress]) -> None:
        """Nobody can tell about the process. Before the first heartbeat, a launcher that is down proves nothing."""
        job = stored.value
        started = _has_started(job, progress.value)
        allowance = 0 if _is_by_hand(job) else GRACE_S
        if (started or _is_by_hand(job)) and self._is_silent(progress.value, allowance):
            self._lose(stored, progress, "the trainer fell silent")
        elif started:
            self._copy(stored, progress.value)

    def _judge_alive(self, stored: Stored[Job], progress: Stored[Progress]) -> None:
        job = stored.value
        started = _has_started(job, progress.value)
        silent = self._is_silent(progress.value) if started else not self._may_still_start(job)
        if not silent:
            self._overdue_since.pop(job.submission_id, None)
            if started:
                self._copy(stored, progress.value)
            return
        # End the process before the attempt counts as lost, so that a hanging one does not keep its devices.
        if self._overdue_s(job) > FORCE_S:
            self._lose(stored, progress, "the trainer hangs and could not be stopped")
        else:
            self._stop(job)

    def _copy(self, stored: Stored[Job], progress: Progress) -> None:
        """Take over what the trainer says of its progress; not at each tick, since each copy is a write."""
        job, now = stored.value, self._clock()
        lines: list[Event] = []
        if job.state != "running":
            after = apply(job, jobs.Started())
            step = progress.step
            text = f"Fine-tuning job resumed at step {step}" if job.attempt > 1 and step else "Fine-tuning job started"
            lines.append(History(job, now).line(text))
        elif now - self._copied_at.get(job.submission_id, 0.0) < COPY_INTERVAL_S:
            return
        else:
            after = job
        after = apply(
            after,
            jobs.Advanced(
                progress.trained_tokens or None,
                progress.estimated_finish,
                progress.resolved,
                progress.settings,
                self._estimator.usage(progress),
            ),
        )
        if after != job:
            self._copied_at[job.submission_id] = now
            self._writer.commit(stored, after, lines)

    def _lose(self, stored: Stored[Job], progress: Stored[Progress] | None, reason: str) -> None:
        job, now = stored.value, self._clock()
        lost = apply(job, jobs.Lost(self._estimator.usage(progress.value if progress else None)))
        fence = [] if progress is None else self._fence(progress)
        logger.warning("attempt lost: %s: %s", job.submission_id, reason)
        if lost.losses > self._settings.max_losses:
            error = JobError(
                code="training_interrupted",
                message=f"Training was interrupted {lost.losses} times, the last time because {_clause(reason)}. "
                "Create the job again to try once more.",
            )
            lines = [History(job, now).line(f"The job failed: {error.message}", "error")]
            self._writer.commit(stored, apply(lost, jobs.Failed(now, error)), lines, fence)
            return
        saved = self._records.checkpoints.query({"job_id": job.id}, order_by="step", descending=True, limit=1)
        step = saved[0].value.step if saved else 0
        text = f"Attempt {job.attempt} was lost; resuming from step {step}"
        self._writer.commit(stored, lost, [History(job, now).line(text, "warn", {"reason": reason[:1000]})], fence)

    # Ending

    def _wind_down(self, stored: Stored[Job]) -> None:
        """A job that wants no process, and one that may be alive: let it end, press it after a while, close."""
        job = stored.value
        seen = self._observe(job)
        progress = self._records.progress.find(job.id)
        if seen is not None:
            gone = not seen.is_alive
        else:
            said = progress is not None and progress.value.outcome is not None and _is_by_hand(job)
            gone = progress is None or said or self._is_silent(progress.value)
        if gone:
            usage = self._estimator.usage(progress.value if progress else None)
            self._writer.commit(
                stored, apply(job, jobs.Closed(usage)), [], [] if progress is None else self._fence(progress)
            )
            if job.is_terminal:
                self._registrar.drop_rest(job)
        elif seen is not None:
            self._press(job)

    # Small parts

    def _observe(self, job: Job) -> Observation | None:
        """What the launcher knows; None if it does not answer, or did not start this attempt."""
        if _is_by_hand(job):
            return None
        now = self._clock()
        if now < self._alive_until.get(job.submission_id, 0.0):
            return Observation("alive")
        try:
            seen = self._launcher.observe(job.submission_id)
        except LauncherUnavailable as error:
            self._warn_unavailable(error)
            return None
        if seen.is_alive:
            self._alive_until[job.submission_id] = now + self._observe_every_s
        return seen

    def _press(self, job: Job) -> None:
        """Stop an attempt that has had its time to end by itself."""
        if self._overdue_s(job) > GRACE_S:
            self._stop(job)

    def _stop(self, job: Job) -> None:
        now = self._clock()
        if now - self._stopped_at.get(job.submission_id, 0.0) >= STOP_INTERVAL_S:
            self._stopped_at[job.submission_id] = now
            self._launcher.stop(job.submission_id)
            logger.warning("attempt stopped: %s", job.submission_id)

    def _overdue_s(self, job: Job) -> float:
        return self._clock() - self._overdue_since.setdefault(job.submission_id, self._clock())

    def _is_silent(self, progress: Progress, allowance_s: float = 0.0) -> bool:
        return self._clock() - progress.heartbeat_at > self._settings.heartbeat_timeout_s + allowance_s

    def _may_still_start(self, job: Job) -> bool:
        return self._clock() - (job.attempt_started_at or job.created_at) <= self._settings.start_timeout_s

    def _fence(self, progress: Stored[Progress]) -> list[Write]:
        return [self._records.progress.replace(progress, progress.value.model_copy(update={"stage": "closed"}))]

    def _warn_unavailable(self, error: LauncherUnavailable) -> None:
        now = self._clock()
        if now - self._warned_at > 30:
            self._warned_at = now
            logger.warning("launcher unavailable: %s", error)


def _is_by_hand(job: Job) -> bool:
    """Whether the current attempt was started by a person, so that the launcher does not know its handle."""
    return job.self_launched and job.attempt <= 1


def _has_started(job: Job, progress: Progress) -> bool:
    return progress.stage != LAUNCHING or progress.heartbeat_at > (job.attempt_started_at or 0.0)


def _clause(reason: str) -> str:
    return reason.strip().rstrip(".")[:500] or "its process is gone"
