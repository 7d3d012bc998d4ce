"""Turns what an attempt has published into a Version, once, and ends the job with it."""

import logging
from collections.abc import Callable

from tuneloom.control import jobs, models
from tuneloom.control.estimate import Estimator
from tuneloom.control.jobs import History, apply
from tuneloom.control.results import write_results
from tuneloom.control.writer import JobWriter
from tuneloom.domain import Job, JobError, Progress, ft_name, short_id
from tuneloom.errors import InvalidRequest
from tuneloom.store import Store
from tuneloom.store.artifacts import Manifest, read_manifest
from tuneloom.store.base import BlobCorrupt, Write
from tuneloom.store.records import Stored

logger = logging.getLogger(__name__)


class Registrar:
    """Version, uniqueness row, results file, history and the job's end are one commit."""

    def __init__(self, store: Store, estimator: Estimator, writer: JobWriter, clock: Callable[[], float]) -> None:
        self._store = store
        self._records = store.records
        self._estimator = estimator
        self._writer = writer
        self._clock = clock

    def register(self, stored: Stored[Job], progress: Progress) -> None:
        """Make the Version of a published attempt and end its job. Made before, it is only told again."""
        job = stored.value
        manifest = self._find_manifest(job)
        if manifest is None:
            error = JobError(code="publish_failed", message="The trained adapter was not stored whole.")
            self._writer.fail(stored, error)
            return
        done = self._records.registrations.find(job.id)
        if done is not None:
            name = ft_name(job.spec.base, job.owner, job.spec.suffix, short_id(job.id))
            self._succeed(stored, progress, manifest, name, done.value.version_id, job.result_files)
            return
        try:
            addition = models.register(self._records, job, manifest, self._clock())
        except InvalidRequest as error:
            code = error.code or "publish_failed"
            self._writer.fail(stored, JobError(code=code, message=error.message, param=error.param))
            return
        results = write_results(self._store, job, self._clock())
        writes = (*addition.writes, self._records.files.create(results))
        self._succeed(stored, progress, manifest, addition.version.ft_name, addition.version.id, (results.id,), writes)

    def drop_rest(self, job: Job) -> None:
        """Remove the blobs of attempts that made no Version, once the job and its processes have ended."""
        for attempt in range(1, job.attempt + 1):
            if (job.state, attempt) == ("succeeded", job.attempt):
                continue
            for blob in self._store.blobs.list(job.model_copy(update={"attempt": attempt}).artifacts):
                self._store.blobs.delete(blob.key)

    def _find_manifest(self, job: Job) -> Manifest | None:
        try:
            manifest = read_manifest(self._store.blobs, job.artifacts)
        except BlobCorrupt:
            return None
        is_of_job = manifest is not None and (manifest.job_id, manifest.base) == (job.id, job.spec.base)
        return manifest if is_of_job else None

    def _succeed(
        self,
        stored: Stored[Job],
        progress: Progress,
        manifest: Manifest,
        name: str,
        version_id: str,
        result_files: tuple[str, ...],
        writes: tuple[Write, ...] = (),
    ) -> None:
        job, now = stored.value, self._clock()
        published = jobs.Published(
            now,
            name,
            version_id,
            result_files,
            manifest.trained_tokens,
            manifest.resolved,
            progress.settings,
            self._estimator.usage(progress),
        )
        after = apply(job, published)
        said, kept = self._estimator.conclude(after, now)
        history = History(job, now)
        lines = [
            history.line(f"New fine-tuned model created: {name}"),
            *(history.line(text) for text in said),
            history.line("The job has successfully completed", data=self._estimator.outcome(after)),
        ]
        self._writer.commit(stored, after, lines, (*writes, *kept))
        logger.info("job succeeded: %s as %s", job.id, version_id)
