"""Lets a job in when its files are good, and fails it with every bad line when they are not."""

from collections.abc import Callable, Iterable

from tuneloom.control import jobs
from tuneloom.control.check import Checker, CheckReport
from tuneloom.control.estimate import Estimator
from tuneloom.control.jobs import History, apply
from tuneloom.control.writer import JobWriter
from tuneloom.domain import Job, JobError
from tuneloom.store.records import Stored

MAX_PROBLEM_EVENTS = 100
PROBLEMS_IN_MESSAGE = 3


class Admission:
    """Steps jobs that are `validating_files`. What it remembers is only which checks to drop."""

    def __init__(self, checker: Checker, estimator: Estimator, writer: JobWriter, clock: Callable[[], float]) -> None:
        self._checker = checker
        self._estimator = estimator
        self._writer = writer
        self._clock = clock
        self._checking: set[str] = set()

    def step(self, stored: Stored[Job]) -> None:
        """Start the check, look whether it is done, or act on its report."""
        job = stored.value
        self._checking.add(job.id)
        report = self._checker.check(job.id)
        if report is None:
            return
        self._checking.discard(job.id)
        if not report.ok:
            self._reject(stored, report)
            return
        planned = report.planned
        if planned is not None and (error := self._estimator.refusal(planned)) is not None:
            self._writer.fail(stored, error)
            return
        estimate = self._estimator.estimate(job.spec, planned) if planned else None
        history = History(job, self._clock())
        lines = [history.line(note.message, note.level, note.data) for note in report.notes]
        if estimate is not None:
            lines.append(history.line(self._estimator.describe(estimate)))
        lines.append(history.line("Files validated, moving job to queued state"))
        accepted = jobs.FilesAccepted(estimate, planned.settings if planned else ())
        self._writer.commit(stored, apply(job, accepted), lines)

    def keep_only(self, job_ids: Iterable[str]) -> None:
        """Drop the checks of all other jobs: they were cancelled or paused."""
        for job_id in self._checking - set(job_ids):
            self._checker.forget(job_id)
            self._checking.discard(job_id)

    def _reject(self, stored: Stored[Job], report: CheckReport) -> None:
        job, now = stored.value, self._clock()
        history = History(job, now)
        error = _summary(report)
        lines = [
            history.line(problem.text, "error", {"param": problem.param, "line": problem.line, "field": problem.field})
            for problem in report.problems[:MAX_PROBLEM_EVENTS]
        ]
        unsaid = max(report.problem_count, len(report.problems)) - len(lines)
        if unsaid > 0:
            lines.append(history.line(f"{unsaid} more problems are not listed", "error"))
        lines.append(history.line(f"The job failed: {error.message}", "error"))
        self._writer.commit(stored, apply(job, jobs.Failed(now, error)), lines)


def _summary(report: CheckReport) -> JobError:
    """The report's error with its first lines in the message."""
    error = report.error or JobError(code="invalid_training_file", message="The files are not valid.")
    first = [problem.text.rstrip(".") for problem in report.problems[:PROBLEMS_IN_MESSAGE]]
    unsaid = [text for text in first if text not in error.message]
    if not unsaid:
        return error
    return error.model_copy(update={"message": f"{error.message.rstrip()} {'; '.join(unsaid)}"[:2000]})
