"""The line of waiting jobs, from the records and the cluster. `line` decides; here it is read and carried out."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from tuneloom.config import TrainSettings
from tuneloom.control import jobs
from tuneloom.control.jobs import History, apply
from tuneloom.control.launcher import Launcher, LauncherUnavailable, Room
from tuneloom.control.line import Load, Place, Running, decide, line, places
from tuneloom.control.writer import JobWriter
from tuneloom.domain import Job, Progress
from tuneloom.store.base import Range, Write
from tuneloom.store.records import Records, Stored

logger = logging.getLogger(__name__)

LAUNCHING = "launching"
# Stages of an attempt whose worker holds nothing yet, so that the cluster still counts its share as free.
UNSTARTED = frozenset({LAUNCHING, "starting"})
USE_INTERVAL_S = 10.0
WINDOW_S = 24 * 3600.0
MAX_ENDED = 1000


class Queue:
    """Starts those that are first, and tells the others what they wait for when that changes.

    What it remembers spares reading at each tick what owners have used.
    """

    def __init__(
        self,
        records: Records,
        launcher: Launcher,
        settings: TrainSettings,
        writer: JobWriter,
        clock: Callable[[], float],
    ) -> None:
        self._records = records
        self._launcher = launcher
        self._settings = settings
        self._writer = writer
        self._clock = clock
        self._ended: list[Job] = []
        self._ended_as_of = (float("-inf"), frozenset[str]())

    def decide(self, waiting: Sequence[Stored[Job]]) -> Iterator[tuple[Stored[Job], str | None]]:
        """Each waiting job in order, with what it waits for; None: it is to start. Raises LauncherUnavailable."""
        now = self._clock()
        found = {stored.value.id: stored for stored in waiting}
        jobs_waiting = [stored.value for stored in waiting]
        running = [stored.value for stored in self._records.jobs.query({"attempt_open": True})]
        load = read_load(self._records, now, running, [*self._ended_by(now, running), *jobs_waiting])
        order = line(jobs_waiting, load, now)
        for job, reason in decide(order, load, self._settings, self._room(load, len(order))):
            yield found[job.id], reason

    def act(self, stored: Stored[Job], reason: str | None) -> None:
        """Start a job, or tell it what it waits for unless it knows."""
        job, now = stored.value, self._clock()
        if reason is not None:
            if reason != job.waiting_for:
                told = History(job, now).line(f"Waiting for {reason}")
                self._writer.commit(stored, apply(job, jobs.Waits(reason)), [told])
            return
        progress = self._records.progress.find(job.id)
        launched = apply(job, jobs.Launched(now))
        self._writer.commit(stored, launched, [], _new_fence(self._records, progress, launched, now))
        self._launcher.launch(launched)
        logger.info("attempt launched: %s", launched.submission_id)

    def _ended_by(self, now: float, running: Sequence[Job]) -> list[Job]:
        """The jobs that have ended, read again when another runs than before: then one of those may have ended."""
        read_at, handles = self._ended_as_of
        seen = frozenset(job.submission_id for job in running)
        if seen != handles or now - read_at >= USE_INTERVAL_S:
            self._ended, self._ended_as_of = read_ended(self._records, now), (now, seen)
        return self._ended

    def _room(self, load: Load, num_waiting: int) -> Room | None:
        try:
            return self._launcher.room() if load.running or num_waiting > 1 else None
        except LauncherUnavailable:
            if load.running:
                raise
            return None


def read_ended(records: Records, now: float) -> list[Job]:
    """The last jobs that have ended within the window."""
    bounds = Range(at_least=now - WINDOW_S)
    found = records.jobs.query(order_by="finished_at", descending=True, bounds=bounds, limit=MAX_ENDED)
    return [stored.value for stored in found]


def read_load(records: Records, now: float, running: Iterable[Job], others: Iterable[Job]) -> Load:
    """The load of these running jobs; `others` are those that have ended or wait, and count by what they have used."""
    open_attempts = [_running(records, job) for job in running]
    paused = [stored.value for stored in records.jobs.query({"state": "paused"})]
    used: dict[str, float] = defaultdict(float)
    served: dict[str, float] = {}
    seen = {job.id: job for job in [*others, *paused, *(attempt.job for attempt in open_attempts)]}
    for job in seen.values():
        used[job.owner] += _used_s(job, now)
        if job.attempt:
            served_at = now if job.attempt_open else (job.finished_at or job.attempt_started_at or 0.0)
            served[job.owner] = max(served.get(job.owner, 0.0), served_at)
    return Load(open_attempts, used, served)


def read_places(records: Records, settings: TrainSettings, now: float) -> dict[str, Place]:
    """Where each waiting job stands, by its id."""
    waiting = [stored.value for stored in records.jobs.query({"state": "queued"}) if is_waiting(stored.value)]
    running = [stored.value for stored in records.jobs.query({"attempt_open": True})]
    load = read_load(records, now, running, [*read_ended(records, now), *waiting])
    return places(line(waiting, load, now), load, settings, now)


def is_waiting(job: Job) -> bool:
    return job.state == "queued" and not job.attempt_open


def _running(records: Records, job: Job) -> Running:
    progress = records.progress.find(job.id)
    if progress is None or progress.value.attempt != job.attempt:
        return Running(job, is_begun=False)
    return Running(job, progress.value.stage not in UNSTARTED, progress.value.memory_bytes)


def _used_s(job: Job, now: float) -> float:
    known = job.usage.seconds if job.usage else 0.0
    return max(known, now - job.attempt_started_at) if job.attempt_open and job.attempt_started_at else known


def _new_fence(records: Records, before: Stored[Progress] | None, job: Job, now: float) -> list[Write]:
    """The Progress of a new attempt. What was logged stays known, so that a resumed run does not log it again."""
    fresh = {
        "attempt": job.attempt,
        "heartbeat_at": now,
        "stage": LAUNCHING,
        "estimated_finish": None,
        "outcome": None,
        "error": None,
    }
    if before is None:
        return [records.progress.create(Progress.model_validate({"id": job.id, "owner": job.owner, **fresh}))]
    return [records.progress.replace(before, before.value.model_copy(update=fresh))]
