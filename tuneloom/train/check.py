"""The check of a job's files before it is launched: `python -m tuneloom.train.check`, with `TUNELOOM_HOME` and
`TUNELOOM_JOB` in the environment.

The last line of stdout is a JSON report. The exit code is 0 for good files and for bad ones; another means a crash.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tuneloom.bases import get_base
from tuneloom.config import Settings, load
from tuneloom.domain import File, JobError, JobSpec
from tuneloom.errors import InvalidFile, TuneloomError
from tuneloom.rows import Scan
from tuneloom.store import Store, open_store
from tuneloom.train.attempt import run_folder
from tuneloom.train.data import (
    MAX_CACHED_BYTES,
    TokensBuilder,
    drop_old_drafts,
    length_limit,
    missed_answers,
    read_examples,
    save_tokens,
    tokens_name,
)
from tuneloom.train.render import Renderer

MAX_LISTED = 5


@dataclass(frozen=True)
class FileProblem:
    """A problem with the parameter that names its file; `line` is None where it concerns the whole file."""

    param: str
    line: int | None
    message: str

    @property
    def text(self) -> str:
        return self.message if self.line is None else f"line {self.line}: {self.message}"


@dataclass
class Report:
    """What the check found. `rows` and `tokens` count the good rows of the training file."""

    problems: list[FileProblem] = field(default_factory=list)
    problem_count: int = 0
    rows: int = 0
    tokens: int = 0
    warnings: list[str] = field(default_factory=list)
    error: JobError | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.error is None,
            "error": self.error.model_dump() if self.error else None,
            "problems": [asdict(problem) for problem in self.problems],
            "problem_count": self.problem_count,
            "rows": self.rows,
            "tokens": self.tokens,
            "warnings": self.warnings,
        }


class Check:
    """Reads files as the training of `spec` would, and leaves their tokens in `folder` for it."""

    def __init__(self, settings: Settings, spec: JobSpec, folder: Path) -> None:
        """Raises ModelNotFound if there is no such base."""
        self.report = Report()
        self._min_rows = settings.train.min_rows
        self._spec = spec
        self._folder = folder
        self._base = get_base(settings.bases_dir, spec.base)
        self._renderer = Renderer.load(self._base.path, learn_all=spec.options.loss_on == "all")

    def read(self, param: str, file: File, source: BinaryIO) -> None:
        """Add what is to be said of one file; `param` is the field of the job that names it."""
        is_training = param == "training_file"
        scan = Scan(min_rows=self._min_rows if is_training else 1)
        builder = TokensBuilder() if file.size_bytes <= MAX_CACHED_BYTES else None
        rows = tokens = missed = 0
        for row, example in read_examples(source, scan, self._renderer, length_limit(self._spec, self._base)):
            rows += 1
            tokens += len(example.ids)
            missed += missed_answers(row, example)
            if builder is not None:
                builder.add(example)
        if is_training:
            self.report.rows, self.report.tokens = rows, tokens
        if missed:
            self._warn(file, missed)
        if scan.problem_count:
            self._refuse(param, file, scan)
        elif builder is not None:
            drop_old_drafts(self._folder)
            save_tokens(builder.build(), self._folder / tokens_name(file, self._base, self._spec))

    def _warn(self, file: File, missed: int) -> None:
        self.report.warnings.append(
            f"`{file.filename}`: the base's chat template rewrites {missed:,} earlier answers when later turns follow; "
            "these are not learned."
        )

    def _refuse(self, param: str, file: File, scan: Scan) -> None:
        report = self.report
        problems = [FileProblem(param, problem.line, problem.message) for problem in scan.problems]
        report.problems += problems
        report.problem_count += scan.problem_count
        listed = "; ".join(problem.text.rstrip(".") for problem in problems[:MAX_LISTED])
        rest = scan.problem_count - min(len(problems), MAX_LISTED)
        message = f"`{file.filename}` cannot be used: {listed}{f'; and {rest:,} more' if rest else ''}."
        report.error = report.error or JobError(code="invalid_training_file", message=message, param=param)


def check_job(settings: Settings, store: Store, job_id: str) -> Report:
    """The report on the files of a job."""
    job = store.records.jobs.get(job_id).value
    try:
        check = Check(settings, job.spec, run_folder(settings, job_id))
        for param in ("training_file", "validation_file"):
            if (file_id := getattr(job.spec, param)) is None:
                continue
            stored = store.records.files.find(file_id)
            if stored is None or stored.value.owner != job.owner:
                raise InvalidFile(f"The file `{file_id}` is gone. Upload it again.", param=param, code="file_not_found")
            with store.blobs.open(stored.value.blob) as source:
                check.read(param, stored.value, source)
    except TuneloomError as error:
        return Report(error=JobError(code=error.code or "server_error", message=error.message, param=error.param))
    return check.report


def main() -> None:
    settings = load(os.environ.get("TUNELOOM_HOME"))
    store = open_store(settings)
    try:
        report = check_job(settings, store, os.environ["TUNELOOM_JOB"])
    finally:
        store.close()
    sys.stdout.write(json.dumps(report.as_json()) + "\n")


if __name__ == "__main__":
    main()
