"""Checking files in the background: one short-lived process for each job or file check, with a time limit.

The process is `python -m tuneloom.train.check`; it needs the tokenizer, so control does not do it itself. Nothing is
kept: a restarted control checks again. No records; who asks decides what a report means.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from pydantic import BaseModel, ValidationError

from tuneloom.domain import JobError, Setting

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "tuneloom.train.check")
# What tells the process which job, or which file check.
JOB_VARIABLE, FILE_CHECK_VARIABLE = "TUNELOOM_JOB", "TUNELOOM_FILE_CHECK"
MAX_CRASHES = 3
MAX_AT_ONCE = 2


class Problem(BaseModel):
    """One bad line of a file; `param` says of which, `field` what in the row."""

    param: str | None = None
    line: int | None = None
    field: str | None = None
    message: str

    @property
    def text(self) -> str:
        return self.message if self.line is None else f"line {self.line}: {self.message}"


class Note(BaseModel):
    """A sentence for the history of a job whose files are good, with its numbers."""

    level: Literal["info", "warn"]
    message: str
    data: dict[str, Any] | None = None


class Planned(BaseModel):
    """What the run will do if it is let in: tokens over all epochs, those of all evaluations, those that a method
    scores once before the first step, and its most memory.

    `base_bytes` is the size of the base's weights as stored, `refusal` why the run fits no machine that it may have.
    """

    settings: tuple[Setting, ...] = ()
    tokens: int
    evaluated_tokens: int = 0
    reference_tokens: int = 0
    steps: int
    memory_bytes: int = 0
    memory_parts: dict[str, int] = {}
    base_bytes: int = 0
    refusal: str | None = None


class CheckReport(BaseModel):
    """What the check found, as the process prints it. `problems` may be the first of `problem_count`.

    `rows`, `tokens`, `longest` (a row, in tokens) and `learned_tokens` are of the rows to train on. `files` tells of
    each file by the parameter that names it.
    """

    ok: bool
    error: JobError | None = None
    problems: list[Problem] = []
    problem_count: int = 0
    rows: int = 0
    tokens: int = 0
    longest: int = 0
    learned_tokens: int = 0
    validation_rows: int = 0
    validation_tokens: int = 0
    files: dict[str, dict[str, Any]] = {}
    overlap: dict[str, Any] | None = None
    notes: list[Note] = []
    planned: Planned | None = None


class Checker(Protocol):
    def check(self, job_id: str) -> CheckReport | None:
        """The report on a job's files, or None while it is being made. Starts the work if need be; never blocks."""
        ...

    def forget(self, job_id: str) -> None:
        """Drop what is known of a job and end its process."""
        ...

    def close(self) -> None: ...


@dataclass
class _Run:
    process: subprocess.Popen
    output: IO[bytes]
    errors: IO[bytes]
    deadline: float

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=10)
        self.output.close()
        self.errors.close()


class ProcessChecker:
    """Runs each check in a process of its own, a few at once. Used from one thread.

    `variable` is the name under which a process finds its id.
    """

    def __init__(
        self,
        home: Path,
        timeout_s: float,
        *,
        command: Sequence[str] = COMMAND,
        variable: str = JOB_VARIABLE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._home = home
        self._timeout_s = timeout_s
        self._command = list(command)
        self._variable = variable
        self._clock = clock
        self._runs: dict[str, _Run] = {}
        self._crashes: dict[str, int] = {}

    def check(self, job_id: str) -> CheckReport | None:
        run = self._runs.get(job_id)
        if run is None:
            if len(self._runs) < MAX_AT_ONCE:
                self._runs[job_id] = self._start(job_id)
            return None
        if run.process.poll() is None:
            if self._clock() < run.deadline:
                return None
            self.forget(job_id)
            return _failure(
                "file_check_timeout",
                f"Checking the files took longer than {self._timeout_s:.0f} s. Use smaller files, or a larger "
                "`control.check_timeout_s`.",
            )
        report = _read(run)
        self._drop(job_id)
        if report is None:
            return self._crashed(job_id)
        self._crashes.pop(job_id, None)
        return report

    def forget(self, job_id: str) -> None:
        self._drop(job_id)
        self._crashes.pop(job_id, None)

    def close(self) -> None:
        for job_id in list(self._runs):
            self.forget(job_id)

    def _start(self, job_id: str) -> _Run:
        # Closed by `_Run.close`: they live as long as the process.
        output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, "TUNELOOM_HOME": str(self._home), self._variable: job_id},
        )
        return _Run(process, output, errors, self._clock() + self._timeout_s)

    def _drop(self, job_id: str) -> None:
        run = self._runs.pop(job_id, None)
        if run is not None:
            run.close()

    def _crashed(self, job_id: str) -> CheckReport | None:
        """None to try again; the last time, a report that says so."""
        self._crashes[job_id] = self._crashes.get(job_id, 0) + 1
        if self._crashes[job_id] < MAX_CRASHES:
            return None
        del self._crashes[job_id]
        return _failure(
            "file_check_failed", "The files could not be checked; the check itself failed. Try again later."
        )


def _read(run: _Run) -> CheckReport | None:
    """The report on the last line of the output; None if the process crashed before it."""
    if run.process.returncode == 0:
        run.output.seek(0)
        lines = run.output.read().splitlines()
        try:
            return CheckReport.model_validate(json.loads(lines[-1]))
        except (IndexError, ValueError, ValidationError) as error:
            logger.error("file check gave no report: %s", error)
            return None
    run.errors.seek(0, os.SEEK_END)
    run.errors.seek(max(0, run.errors.tell() - 4000))
    logger.error("file check ended with %s: %s", run.process.returncode, run.errors.read().decode(errors="replace"))
    return None


def _failure(code: str, message: str) -> CheckReport:
    return CheckReport(ok=False, error=JobError(code=code, message=message))
