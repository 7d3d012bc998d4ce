"""The check of files before a job trains on them: `python -m tuneloom.train.check`, with `TUNELOOM_HOME` and
`TUNELOOM_JOB` or `TUNELOOM_FILE_CHECK` in the environment.

The last line of stdout is a JSON report. The exit code is 0 for good files and for bad ones; another means a crash.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from tuneloom.bases import get_base
from tuneloom.config import Settings, load
from tuneloom.domain import File, JobError, JobSpec
from tuneloom.errors import InvalidFile, Overloaded, TuneloomError
from tuneloom.rows import InvalidRows, Scan
from tuneloom.store import Store, open_store
from tuneloom.store.base import StoreRefused
from tuneloom.train.data import (
    MAX_CACHED_BYTES,
    TOO_FEW_TO_SPLIT,
    builder_for,
    drop_old_drafts,
    held_out,
    reader_for,
    save_tokens,
    tokens_name,
)
from tuneloom.train.failure import store_refused
from tuneloom.train.folders import run_folder
from tuneloom.train.planned import Lengths, Planned, check_rank, plan_run
from tuneloom.train.render import Renderer
from tuneloom.train.report import NOTHING, FileReport, Note, Overlap, Tally, Totals, notes_of, notes_of_overlap
from tuneloom.train.start import Start, fetch_start

MAX_LISTED = 5
NAMES = {"training_file": "Training file", "validation_file": "Validation file"}


@dataclass(frozen=True)
class FileProblem:
    """A problem with the parameter that names its file; `line` is None where it concerns the whole file,
    `field` where it concerns the whole row.
    """

    param: str
    line: int | None
    field: str | None
    message: str

    @property
    def text(self) -> str:
        return self.message if self.line is None else f"line {self.line}: {self.message}"


@dataclass(frozen=True)
class Report:
    """What the check found. `training` and `validation` are the rows of either kind, after a share was held out;
    `files` tells of each file by the parameter that names it.
    """

    error: JobError | None = None
    problems: tuple[FileProblem, ...] = ()
    problem_count: int = 0
    training: Totals = NOTHING
    validation: Totals = NOTHING
    files: tuple[tuple[str, FileReport], ...] = ()
    overlap: Overlap | None = None
    notes: tuple[Note, ...] = ()
    planned: Planned | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.error is None,
            "error": self.error.model_dump() if self.error else None,
            "problems": [asdict(problem) for problem in self.problems],
            "problem_count": self.problem_count,
            **asdict(self.training),
            "validation_rows": self.validation.rows,
            "validation_tokens": self.validation.tokens,
            "files": {param: report.as_json() for param, report in self.files},
            "overlap": self.overlap.as_json() if self.overlap else None,
            "notes": [asdict(note) for note in self.notes],
            "planned": self.planned.as_json() if self.planned else None,
        }


def of_unread(param: str, name: str, error: InvalidRows) -> Report:
    """The report on a file of which no rows could be made, so that an upload of it is refused."""
    problems = tuple(FileProblem(param, each.line, each.field, each.message) for each in error.problems)
    message = f"`{name}` cannot be used: {error.message}"
    return Report(JobError(code="invalid_file", message=message, param=param), problems, error.problem_count)


class Check:
    """Reads files as the training of `spec` would. `report` is whole when all are read, the training file first."""

    def __init__(self, settings: Settings, spec: JobSpec) -> None:
        """Raises ModelNotFound if there is no such base."""
        self._settings = settings
        self._spec = spec
        self._base = get_base(settings.bases_dir, spec.base)
        self._renderer = Renderer.load(self._base.path, learn_all=spec.options.loss_on == "all")
        self._tallies: dict[str, Tally] = {}
        self._files: dict[str, FileReport] = {}
        self._problems: list[FileProblem] = []
        self._problem_count = 0
        self._error: JobError | None = None

    def read(self, param: str, name: str, source: BinaryIO, *, keep: Path | None = None) -> None:
        """Take in one file; `param` is the field of the job that names it. Its tokens, if it is good, go to `keep`."""
        scan = Scan(method=self._spec.method, min_rows=self._settings.train.min_rows if param == "training_file" else 1)
        reader = reader_for(self._spec, self._base, scan, self._renderer)
        builder = builder_for(self._spec) if keep is not None else None
        tally = Tally(
            has_overlap=self._spec.validation_file is not None or self._spec.options.validation_share is not None
        )
        for line, example in reader.examples(source):
            tally.add(line, example)
            if builder is not None:
                builder.add(example)  # type: ignore[arg-type]
        if self._spec.options.validation_share is not None and not scan.problem_count and tally.num_rows < 2:
            scan.add(None, TOO_FEW_TO_SPLIT)
        self._tallies[param], self._files[param] = tally, tally.report(name, reader)
        if scan.problem_count:
            self._refuse(param, name, scan)
        elif builder is not None and keep is not None:
            drop_old_drafts(keep.parent)
            save_tokens(builder.build(), keep)

    def keep_in(self, folder: Path, file: File) -> Path | None:
        """Where the run in `folder` looks for the tokens of a file; None if they are too many to be kept."""
        small = file.size_bytes <= MAX_CACHED_BYTES
        return folder / tokens_name(file, self._base, self._spec) if small else None

    def report(self) -> Report:
        training, validation = self._parts()
        overlap = validation.overlap(training) if validation is not None else None
        totals = training.totals()
        held = validation.totals() if validation is not None else NOTHING
        return Report(
            error=self._error,
            problems=tuple(self._problems),
            problem_count=self._problem_count,
            training=totals,
            validation=held,
            files=tuple(self._files.items()),
            overlap=overlap,
            notes=() if self._error else tuple(self._notes(held, overlap)),
        )

    def plan(self, report: Report, start: Start | None) -> Planned:
        """What the run of good files will do. Raises InvalidRequest if the settings do not go with them."""
        training, _ = self._parts()
        rows = Lengths(training.lengths)
        planned = plan_run(
            self._settings.train, self._spec, self._base, rows, report.training, report.validation, start
        )
        check_rank(self._settings, self._base, planned.plan)
        return planned

    def _parts(self) -> tuple[Tally, Tally | None]:
        """The rows to train on and those to validate on."""
        training = self._tallies.get("training_file", Tally())
        share = self._spec.options.validation_share
        if share is None or self._error is not None:
            return training, self._tallies.get("validation_file")
        rows = held_out(training.num_rows, share, self._spec.seed)
        return training.select(~rows), training.select(rows)

    def _notes(self, held: Totals, overlap: Overlap | None) -> list[Note]:
        notes = [note for param, report in self._files.items() for note in notes_of(NAMES[param], report)]
        if self._spec.options.validation_share is not None:
            text = f"Held out for validation: {held.rows:,} of these rows, {held.tokens:,} tokens"
            notes.append(Note("info", text, {"rows": held.rows, "tokens": held.tokens}))
        return notes + (notes_of_overlap(overlap) if overlap else [])

    def _refuse(self, param: str, name: str, scan: Scan) -> None:
        problems = [FileProblem(param, problem.line, problem.field, problem.message) for problem in scan.problems]
        self._problems += problems
        self._problem_count += scan.problem_count
        listed = "; ".join(problem.text.rstrip(".") for problem in problems[:MAX_LISTED])
        rest = scan.problem_count - min(len(problems), MAX_LISTED)
        message = f"`{name}` cannot be used: {listed}{f'; and {rest:,} more' if rest else ''}."
        self._error = self._error or JobError(code="invalid_training_file", message=message, param=param)


def check_job(settings: Settings, store: Store, job_id: str) -> Report:
    """The report on the files of a job, whose tokens are left for its run."""
    job = store.records.jobs.get(job_id).value
    return check_files(settings, store, job.owner, job.spec, run_folder(settings, job_id))


def check_files(settings: Settings, store: Store, owner: str, spec: JobSpec, folder: Path | None) -> Report:
    """The report on the files that `spec` names; with `folder`, their tokens are left there."""
    try:
        check = Check(settings, spec)
        for param in NAMES:
            if (file_id := getattr(spec, param)) is None:
                continue
            stored = store.records.files.find(file_id)
            if stored is None or stored.value.owner != owner:
                raise InvalidFile(f"The file `{file_id}` is gone. Upload it again.", param=param, code="file_not_found")
            file = stored.value
            with store.blobs.open(file.blob) as source:
                check.read(param, file.filename, source, keep=check.keep_in(folder, file) if folder else None)
        report = check.report()
        if report.error is not None:
            return report
        with TemporaryDirectory() as cache:
            return replace(report, planned=check.plan(report, fetch_start(store.blobs, spec, Path(cache))))
    except Overloaded:
        # Nothing is wrong with the files: this process ends, and another one is started.
        raise
    except StoreRefused as error:
        return Report(error=store_refused(error))
    except TuneloomError as error:
        return Report(error=JobError(code=error.code or "server_error", message=error.message, param=error.param))


def main() -> None:
    # transformers imports torch where it finds it: seconds and 260 MB that no tokenizer needs.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    settings = load(os.environ.get("TUNELOOM_HOME"))
    # Rows are encoded on all cores, which may be those that serve.
    os.nice(max(0, settings.train.niceness - os.nice(0)))
    if settings.train.threads:
        os.environ["RAYON_NUM_THREADS"] = str(settings.train.threads)
    store = open_store(settings)
    try:
        if (check_id := os.environ.get("TUNELOOM_FILE_CHECK")) is not None:
            asked = store.records.file_checks.get(check_id).value
            report = check_files(settings, store, asked.owner, asked.spec, None)
        else:
            report = check_job(settings, store, os.environ["TUNELOOM_JOB"])
    finally:
        store.close()
    sys.stdout.write(json.dumps(report.as_json()) + "\n")


if __name__ == "__main__":
    main()
