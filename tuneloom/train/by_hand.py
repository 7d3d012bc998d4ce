"""A run that a person starts: `ray job submit -- python -m tuneloom.train --base ID --data rows.jsonl --model NAME`.

It makes the records that the API would have made, and is then a job like any other: control registers its adapter.
"""

import argparse
import hashlib
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from tuneloom.config import Settings
from tuneloom.domain import (
    LOCAL_OWNER,
    Event,
    File,
    Hyperparameters,
    Job,
    JobSpec,
    Progress,
    TrainOptions,
    Version,
    check_model_name,
    check_settings_agree,
    event_id,
    model_id,
    new_id,
)
from tuneloom.errors import InvalidFile, InvalidRequest, TooLarge, TuneloomError
from tuneloom.store import Store, audit_log
from tuneloom.store.names import find_start
from tuneloom.train.check import Check, Report
from tuneloom.train.folders import run_folder

REGISTER_TIMEOUT_S = 120.0
POLL_S = 0.5
MAX_SHOWN = 20


@dataclass(frozen=True)
class Prepared:
    """A job whose data is good, not stored yet: its files with where they are."""

    job: Job
    files: tuple[tuple[File, Path], ...]
    notes: tuple[str, ...]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tuneloom.train",
        description="Fine-tune a base on a JSON Lines file and publish the result as a model, on the Ray cluster.",
    )
    parser.add_argument("--base", required=True, help="base to train on, as `tuneloom bases` lists it")
    parser.add_argument("--data", required=True, type=Path, help="JSON Lines file with the rows")
    parser.add_argument("--model", required=True, help="name of the model to publish, e.g. support-bot")
    parser.add_argument("--validation", type=Path, help="JSON Lines file with rows for the validation loss")
    parser.add_argument("--method", choices=("supervised", "dpo"), default="supervised", help="dpo: from preferences")
    parser.add_argument("--epochs", type=int, help="passes over the data (default: auto)")
    parser.add_argument("--batch-size", type=int, help="rows of a step (default: auto)")
    parser.add_argument("--learning-rate-multiplier", type=float, help="factor of the learning rate (default: 1)")
    parser.add_argument("--beta", type=float, help="of dpo: how close to the base it stays (default: 0.1)")
    parser.add_argument("--seed", type=int, help="default: a random one, which is printed")
    parser.add_argument("--owner", default=LOCAL_OWNER, help="whose model it becomes (default: local)")
    _add_options(parser.add_argument_group("settings of the run", "Each is told in docs/training.md."))
    return parser.parse_args(arguments)


def _add_options(group: argparse._ArgumentGroup) -> None:
    """A flag for each of `TrainOptions`, which checks what is given."""
    for name, field in TrainOptions.model_fields.items():
        more: dict[str, Any] = {"metavar": _values(field.annotation)}
        if field.annotation is bool:
            more = {"action": "store_const", "const": True}
        elif name == "target_modules":
            more = {"nargs": "+", "metavar": "LAYER"}
        default = "not set" if field.default is None else field.default
        meaning = f"{field.description} ".replace("None:", "not set:") if field.description else ""
        group.add_argument(flag(name), help=f"{meaning}(default: {default})".replace("%", "%%"), **more)


def _values(annotation: Any) -> str:
    """`linear|cosine|constant`, or VALUE where there are no names."""
    names = [name for part in (annotation, *get_args(annotation)) for name in get_args(part) if isinstance(name, str)]
    names += [name for name in get_args(annotation) if isinstance(name, str) and name not in names]
    return "|".join([*names, "true", "false"] if bool in get_args(annotation) else names) or "VALUE"


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def prepare(settings: Settings, store: Store, asked: argparse.Namespace) -> Prepared:
    """Check the arguments and the data; nothing is stored but tokens for the run.

    Raises:
        TuneloomError: an argument or a row is wrong; the message names each row.
    """
    now = time.time()
    job_id = new_id("ftjob-")
    max_bytes = settings.gateway.max_upload_bytes
    training = _describe(asked.data, asked.owner, now, max_bytes)
    validation = _describe(asked.validation, asked.owner, now, max_bytes) if asked.validation else None
    files = [(training, asked.data), *([(validation, asked.validation)] if validation else [])]
    spec = _spec(settings, store, asked, training, validation)
    check = Check(settings, spec)
    for param, (file, path) in zip(("training_file", "validation_file"), files, strict=False):
        with path.open("rb") as source:
            check.read(param, file.filename, source, keep=check.keep_in(run_folder(settings, job_id), file))
    report = check.report()
    if report.error is not None:
        raise InvalidFile(_all_problems(report))
    job = Job(
        id=job_id,
        owner=asked.owner,
        spec=spec,
        requested_model=asked.base,
        created_at=now,
        state="queued",
        files_checked=True,
        attempt=1,
        attempt_open=True,
        attempt_started_at=now,
        self_launched=True,
    )
    return Prepared(job, tuple(files), tuple(note.message for note in report.notes))


def create(store: Store, prepared: Prepared) -> Job:
    """Store the files, then the job with everything that belongs to it in one commit."""
    for file, path in prepared.files:
        store.blobs.write(file.blob, path, sha256=file.sha256)
    job, records, now = prepared.job, store.records, time.time()
    created = Event(
        id=event_id(now),
        owner=job.owner,
        job_id=job.id,
        created_at=now,
        message=f"Created fine-tuning job: {job.id}",
    )
    records.commit(
        *(records.files.create(file) for file, _ in prepared.files),
        records.jobs.create(job.model_copy(update={"attempt_started_at": now})),
        records.progress.create(Progress(id=job.id, owner=job.owner, attempt=1, heartbeat_at=now)),
        records.events.create(created),
        audit_log.of_job(audit_log.cli_actor(), job, "created", _told(job)),
    )
    return job


def _told(job: Job) -> dict[str, Any]:
    """What the audit log says of it, as of a job of the API."""
    return {"model": job.requested_model, "training_file": job.spec.training_file, "method": job.spec.method}


def wait_for_version(store: Store, job_id: str, timeout_s: float = REGISTER_TIMEOUT_S) -> Version:
    """The Version that control has made of a published run.

    Raises:
        TuneloomError: the job failed, or control did not do it in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        job = store.records.jobs.get(job_id).value
        if job.version_id is not None and (stored := store.records.versions.find(job.version_id)) is not None:
            return stored.value
        if job.is_terminal and job.state != "succeeded":
            raise TuneloomError(f"The job {job.state}: {job.error.message if job.error else 'no reason was given'}")
        time.sleep(POLL_S)
    raise TuneloomError(
        f"The adapter is trained and stored, but nobody has registered it in {timeout_s:.0f} s. "
        "See whether the service runs: `tuneloom status`. It registers the model as soon as it does."
    )


def how_to_call(version: Version) -> list[str]:
    return [
        f"Model `{version.model}` is ready, as version `{version.pinned_name}`. Call it by the OpenAI client:",
        f'  client.chat.completions.create(model="{version.model}", messages=[{{"role": "user", "content": "..."}}])',
    ]


def _describe(path: Path, owner: str, now: float, max_bytes: int) -> File:
    """The record of a local file, not yet stored."""
    if path.exists() and not path.is_file():
        raise InvalidRequest(f"`{path}` is no file. A run reads its rows more than once.")
    try:
        size = path.stat().st_size
        with path.open("rb") as source:
            sha256 = hashlib.file_digest(source, "sha256").hexdigest()
    except OSError as error:
        raise InvalidRequest(f"`{path}` cannot be read: {error.strerror}.") from error
    if size > max_bytes:
        raise TooLarge(f"`{path}` has {size:,} bytes; the limit is {max_bytes:,}.")
    file_id = new_id("file-")
    return File(
        id=file_id,
        owner=owner,
        filename=path.name,
        purpose="fine-tune",
        size_bytes=size,
        sha256=sha256,
        blob=f"files/{file_id}",
        created_at=now,
    )


def _spec(
    settings: Settings, store: Store, asked: argparse.Namespace, training: File, validation: File | None
) -> JobSpec:
    _check_range("--epochs", asked.epochs, 1, 50)
    _check_range("--batch-size", asked.batch_size, 1, 256)
    _check_range("--learning-rate-multiplier", asked.learning_rate_multiplier, 1e-6, 1e4)
    _check_range("--beta", asked.beta, 1e-6, 2)
    _check_range("--seed", asked.seed, 0, 2**31 - 1)
    if asked.beta is not None and asked.method != "dpo":
        raise InvalidRequest("`--beta` needs `--method dpo`.")
    base = settings.base_aliases.get(asked.base, asked.base)
    given = {name: getattr(asked, name) for name in TrainOptions.model_fields}
    try:
        options = TrainOptions.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(f"`{flag(str(first['loc'][0]))}`: {first['msg']}.") from error
    try:
        start = options.warm_start
        spec = JobSpec(
            base=base,
            training_file=training.id,
            validation_file=validation.id if validation else None,
            suffix=check_model_name(asked.model, param="--model"),
            seed=secrets.randbelow(2**31) if asked.seed is None else asked.seed,
            method=asked.method,
            hyperparameters=_hyperparameters(asked),
            options=options,
            warm_start=None if start is None else find_start(store.records, asked.owner, start, base),
        )
        check_settings_agree(spec)
        _check_served(settings, store, asked.owner, spec)
    except InvalidRequest as error:
        raise InvalidRequest(_by_flags(error.message)) from error
    return spec


def _check_served(settings: Settings, store: Store, owner: str, spec: JobSpec) -> None:
    """Refuse what the API would refuse: a model that no request could call once it is trained."""
    name = spec.suffix or ""
    if name in settings.base_aliases or any(name == served.id for served in settings.bases):
        raise InvalidRequest(f"`{name}` is the name of a base model. Choose another `--model`.")
    existing = store.records.models.find(model_id(owner, name))
    if existing is not None and existing.value.base != spec.base:
        raise InvalidRequest(
            f"The model `{name}` is on the base `{existing.value.base}`, not `{spec.base}`. Choose another `--model`, "
            "or delete that one first."
        )
    served = next((each for each in settings.bases if each.id == spec.base), None)
    rank = spec.warm_start.rank if spec.warm_start else spec.options.rank
    if served is not None and rank is not None and rank > served.engine.max_rank:
        field = "warm_start" if spec.warm_start else "rank"
        raise InvalidRequest(f"`{field}`: {rank} is above the largest rank that is served: {served.engine.max_rank}.")


def _hyperparameters(asked: argparse.Namespace) -> Hyperparameters:
    return Hyperparameters(
        n_epochs=asked.epochs or "auto",
        batch_size=asked.batch_size or "auto",
        learning_rate_multiplier=asked.learning_rate_multiplier or "auto",
        beta=(asked.beta or "auto") if asked.method == "dpo" else None,
    )


def _by_flags(message: str) -> str:
    """A message of the API, with the fields as flags."""
    message = message.replace("`batch_size`", "`--batch-size`").replace("`validation_file`", "`--validation`")
    names = "|".join(TrainOptions.model_fields)
    return re.sub(rf"`(?:tuneloom\.)?({names})`", lambda found: f"`{flag(found[1])}`", message)


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise InvalidRequest(f"`{name}` is {value:g}; it must be from {low:g} to {high:g}.")


def _all_problems(report: Report) -> str:
    """The problems of all files, one a line."""
    lines = [f"  {problem.text}" for problem in report.problems[:MAX_SHOWN]]
    if rest := report.problem_count - len(lines):
        lines.append(f"  and {rest:,} more")
    return "\n".join(["The data cannot be used:", *lines])
