"""Writes a job together with its history and whatever else must change with it."""

import logging
from collections.abc import Callable, Iterable

from tuneloom.control import jobs, outbox
from tuneloom.control.job_usage import job_over
from tuneloom.control.jobs import History, apply
from tuneloom.domain import Event, Job, JobError
from tuneloom.store.base import Write
from tuneloom.store.records import Records, Stored

logger = logging.getLogger(__name__)


class JobWriter:
    """Every write is one commit against the revision that was read, so that a decision on old facts fails."""

    def __init__(self, records: Records, clock: Callable[[], float]) -> None:
        self._records = records
        self._clock = clock

    def commit(self, stored: Stored[Job], after: Job, lines: Iterable[Event], writes: Iterable[Write] = ()) -> None:
        events = [self._records.events.create(line) for line in lines]
        now = self._clock()
        told = outbox.job_ended(self._records, stored.value, after, now)
        used = job_over(self._records, stored.value, after, now)
        self._records.commit(self._records.jobs.replace(stored, after), *events, *writes, *told, *used)

    def fail(self, stored: Stored[Job], error: JobError) -> None:
        job, now = stored.value, self._clock()
        line = History(job, now).line(f"The job failed: {error.message}", "error")
        self.commit(stored, apply(job, jobs.Failed(now, error)), [line])
        logger.info("job failed: %s: %s", job.id, error.code)
