"""`tuneloom reproduce`: whether an adapter comes again, byte for byte, from what its lineage names."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from tuneloom.cli.models import Owner, holder_of
from tuneloom.cli.session import Api, open_store, read_settings
from tuneloom.cli.verify import check_base, check_data, data_files
from tuneloom.domain import LOCAL_OWNER
from tuneloom.errors import Conflict, InvalidRequest, TuneloomError

if TYPE_CHECKING:
    from tuneloom.config import Settings
    from tuneloom.domain import Checkpoint, JobSpec, Version
    from tuneloom.store import Store
    from tuneloom.store.lineage import FileFacts, Lineage

POLL_S = 0.5
# Settings that another machine might resolve in another way.
OF_THE_MACHINE = ("precision", "quantization", "packing")


def reproduce(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model or a version that was trained here.")],
    owner: Owner = LOCAL_OWNER,
    timeout: Annotated[float, typer.Option(help="Hours to wait for the job, its time in the queue included.")] = 24.0,
) -> None:
    """Train an adapter again from its lineage, compare, and remove the copy. Exit code 1 if it differs."""
    from tuneloom.config import Pepper
    from tuneloom.control import audit
    from tuneloom.control.context import ApiContext
    from tuneloom.control.new_job import NewJobs

    settings = read_settings(context)
    # Somebody must run the job.
    Api(settings)
    with open_store(context) as store:
        lineage = _lineage(store, holder_of(store, owner, name))
        files = _check_ingredients(settings, store, owner, lineage)
        jobs = NewJobs(ApiContext(settings, store, Pepper((b"",)), lambda: None))
        job, writes = jobs.draft(owner, _spec(lineage, files), lineage.base.id)
        store.records.commit(*writes, audit.of_job(audit.cli_actor(), job, "created", {"reproduces": name}))
        typer.echo(f"Job {job.id} trains it again, as `{job.spec.suffix}`")
        with _ended(store, job.id, timeout * 3600) as version:
            again = _lineage(store, version)
            is_same = again.adapter.sha256 == lineage.adapter.sha256
            for line in _compared(lineage, again):
                typer.echo(line)
    if not is_same:
        raise typer.Exit(1)


def _lineage(store: "Store", record: "Version | Checkpoint") -> "Lineage":
    """Raises InvalidRequest: it has none, or a changed one."""
    from tuneloom.store.lineage import read_lineage, read_signed

    raw = read_lineage(store.blobs, record.adapter)
    if raw is None:
        raise InvalidRequest("It has no lineage: it was imported, or trained before there were lineages.")
    return read_signed(raw).lineage


def _check_ingredients(settings: "Settings", store: "Store", owner: str, lineage: "Lineage") -> dict[str, str]:
    """Raise unless base and files are here and are the same, each byte of them. The ids of the files by field."""
    from tuneloom.bases import get_base

    if lineage.kind == "checkpoint":
        raise InvalidRequest(f"This is a checkpoint of the job `{lineage.job_id}`. Reproduce the version that it made.")
    if get_base(settings.bases_dir, lineage.base.id).sha256 != lineage.base.sha256:
        raise Conflict(f"The base `{lineage.base.id}` here has other weights than the adapter was trained on.")
    found = {label.replace(" ", "_"): _same_file(store, owner, file) for label, file in data_files(lineage)}
    checks = [*check_base(settings, lineage.base)]
    checks += [check_data(store, f"file {file.filename}", file) for file in found.values()]
    if (wrong := next((check for check in checks if check.is_ok is False), None)) is not None:
        raise Conflict(f"It was trained on something else than is here now: {wrong.what}: {wrong.detail}.")
    return {field: file.id for field, file in found.items()}


def _same_file(store: "Store", owner: str, file: "FileFacts") -> "FileFacts":
    """The file that was trained on, or another of its bytes."""
    stored = store.records.files.find(file.id)
    if stored is not None and stored.value.owner == owner and stored.value.sha256 == file.sha256:
        return file
    for other in store.records.files.query({"owner": owner}):
        if (other.value.sha256, other.value.purpose) == (file.sha256, "fine-tune"):
            return file.model_copy(update={"id": other.value.id})
    raise Conflict(f"The file `{file.id}` ({file.filename}, sha256 {file.sha256}) is gone. Upload it again.")


def _spec(lineage: "Lineage", files: dict[str, str]) -> "JobSpec":
    """What makes the same adapter again: as it was asked, with what the machine had a say in as it was resolved."""
    from tuneloom.domain import TrainOptions

    settings = {setting.name: setting.value for setting in lineage.settings}
    resolved = {name: settings[name] for name in OF_THE_MACHINE if name in settings}
    options = TrainOptions.model_validate({**lineage.spec.options.model_dump(exclude_unset=True), **resolved})
    changes = {
        **files,
        "suffix": f"reproduce-{lineage.adapter.sha256[:12]}",
        "hyperparameters": lineage.resolved,
        "options": options,
        "micro_size": math.ceil(settings["batch_size"] / settings["accumulation_steps"]),
        "wandb": (),
        "metadata": None,
    }
    return lineage.spec.model_copy(update=changes)


@contextmanager
def _ended(store: "Store", job_id: str, timeout_s: float) -> "Iterator[Version]":
    """The Version that a job makes, which is removed in the end. A job that has not ended by then is cancelled.

    Raises:
        TuneloomError: the job failed, or took too long.
    """
    from tuneloom.control import deletion, models

    version = None
    try:
        version = _wait(store, job_id, timeout_s)
        yield version
    finally:
        if version is None:
            _cancel(store, job_id)
        else:
            deletion.delete(store, version.owner, version.pinned_name)
            if not models.list_versions(store.records, version.owner, version.model):
                deletion.delete(store, version.owner, version.model)


def _wait(store: "Store", job_id: str, timeout_s: float) -> "Version":
    from tuneloom.train.tail import Tail

    tail = Tail(store.records, job_id, typer.echo)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        job = store.records.jobs.get(job_id).value
        tail.print_new()
        if job.state == "succeeded" and job.version_id is not None:
            return store.records.versions.get(job.version_id).value
        if job.is_terminal:
            raise TuneloomError(f"The job {job.state}: {job.error.message if job.error else 'no reason was given'}")
        time.sleep(POLL_S)
    raise TuneloomError(f"The job did not end within {timeout_s / 3600:g} hours; it is cancelled.")


def _cancel(store: "Store", job_id: str) -> None:
    from tuneloom.control import audit, outbox
    from tuneloom.control.job_usage import job_over
    from tuneloom.control.jobs import Cancelled, apply
    from tuneloom.control.retry import retry

    def once() -> None:
        stored, now = store.records.jobs.get(job_id), time.time()
        if not stored.value.is_terminal:
            after = apply(stored.value, Cancelled(now))
            told = outbox.job_ended(store.records, stored.value, after, now)
            used = job_over(store.records, stored.value, after, now)
            entry = audit.of_job(audit.cli_actor(), after, "cancelled")
            store.records.commit(store.records.jobs.replace(stored, after), *told, *used, entry)

    retry(once)


def _compared(first: "Lineage", again: "Lineage") -> Iterator[str]:
    """What came out, and in what the two runs differed."""
    if first.adapter.sha256 == again.adapter.sha256:
        yield f"identical: adapter {first.adapter.sha256}"
    else:
        yield f"different: adapter {first.adapter.sha256} the first time, {again.adapter.sha256} now"
    differences = list(_differences(first, again))
    yield from (f"  {line}" for line in differences)
    if not differences:
        yield "  same machine, packages and code"


def _differences(first: "Lineage", again: "Lineage") -> Iterator[str]:
    pairs = [
        ("hardware", first.hardware.model_dump(), again.hardware.model_dump()),
        ("package", first.packages, again.packages),
        ("code", first.code.model_dump(), again.code.model_dump()),
        ("base", first.base.files, again.base.files),
        ("rows", first.order.model_dump(), again.order.model_dump()),
        (
            "setting",
            {setting.name: setting.value for setting in first.settings},
            {setting.name: setting.value for setting in again.settings},
        ),
    ]
    for what, before, now in pairs:
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                yield f"{what} {name}: {before.get(name)} the first time, {now.get(name)} now"
