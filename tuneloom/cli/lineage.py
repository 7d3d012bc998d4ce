"""`tuneloom verify`, `tuneloom reproduce`: whether an adapter is what its lineage says, and whether it comes again."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from tuneloom.cli.session import Api, open_store, read_settings
from tuneloom.domain import LOCAL_OWNER
from tuneloom.errors import Conflict, InvalidRequest, ModelNotFound, TuneloomError

if TYPE_CHECKING:
    from tuneloom.config import Settings
    from tuneloom.domain import AdapterRef, JobSpec, Version
    from tuneloom.store import Store
    from tuneloom.store.lineage import Lineage, Signed

POLL_S = 0.5
# Settings that another machine might resolve in another way.
OF_THE_MACHINE = ("precision", "quantization", "packing", "accumulation_steps")

Owner = Annotated[str, typer.Option(help="Whose model.")]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `is_ok` None: it could not be."""

    what: str
    is_ok: bool | None
    detail: str

    def line(self) -> str:
        return f"{ {True: 'ok', False: 'FAIL', None: '--'}[self.is_ok]:5} {self.what}: {self.detail}"


def verify(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model, a version, a checkpoint, or the folder of a download.")],
    public_key: Annotated[
        Path | None, typer.Option(help="The PEM public key of who must have signed; this installation's without it.")
    ] = None,
    owner: Owner = LOCAL_OWNER,
) -> None:
    """Check an adapter against its signed lineage: signature, files, base and data. Exit code 1 if anything differs."""
    settings = read_settings(context)
    is_failed = False
    for check in _checks(context, settings, name, public_key, owner):
        typer.echo(check.line())
        is_failed |= check.is_ok is False
    if is_failed:
        raise typer.Exit(1)


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
        ref = _find(store, owner, name)
        lineage = _signed(store, ref, name).lineage
        _check_ingredients(settings, store, owner, lineage)
        jobs = NewJobs(ApiContext(settings, store, Pepper((b"",)), lambda: None))
        job, writes = jobs.draft(owner, _spec(lineage), lineage.base.id)
        store.records.commit(*writes, audit.of_job(audit.cli_actor(), job, "created", {"reproduces": name}))
        typer.echo(f"Job {job.id} trains it again, as `{job.spec.suffix}`")
        with _ended(store, job.id, timeout * 3600) as version:
            again = _signed(store, version.adapter, version.pinned_name).lineage
            is_same = again.adapter.sha256 == lineage.adapter.sha256
            for line in _compared(lineage, again):
                typer.echo(line)
    if not is_same:
        raise typer.Exit(1)


def _checks(
    context: typer.Context, settings: "Settings", name: str, public_key: Path | None, owner: str
) -> Iterator[Check]:
    """All checks of an adapter in the store, or of one in a folder, where there may be no store."""
    from tuneloom.store.lineage import LINEAGE_FILE

    folder = Path(name)
    if not folder.is_dir():
        with open_store(context) as store:
            ref = _find(store, owner, name)
            raw = _stored(store, ref)
            yield from _check_document(raw, name, settings, public_key, _StoredFiles(store, ref), ref.sha256, store)
        return
    path = folder / LINEAGE_FILE
    raw = path.read_bytes() if path.is_file() else None
    if settings.home.is_dir():
        with open_store(context) as store:
            yield from _check_document(raw, name, settings, public_key, _FolderFiles(folder), None, store)
    else:
        yield from _check_document(raw, name, settings, public_key, _FolderFiles(folder), None, None)


def _check_document(
    raw: bytes | None,
    name: str,
    settings: "Settings",
    public_key: Path | None,
    files: "_FolderFiles | _StoredFiles",
    sha256: str | None,
    store: "Store | None",
) -> Iterator[Check]:
    from tuneloom.store.lineage import LineageBroken, read_signed

    if raw is None:
        yield Check("lineage", False, f"`{name}` has none: it was imported, or trained before there were lineages")
        return
    try:
        signed = read_signed(raw)
    except LineageBroken as error:
        yield Check("lineage", False, error.message)
        return
    lineage = signed.lineage
    yield Check("signature", True, f"fits all of the document, by key {signed.key_id}")
    yield _check_signer(settings, signed, public_key)
    if isinstance(files, _FolderFiles) and files.is_merged:
        what = f"a merged model's are not covered: the lineage is that of the adapter {lineage.adapter.sha256}"
        yield Check("weights", False, f"{what}. Verify that one, and export it again")
    else:
        yield from _check_adapter(lineage, files, sha256)
    yield from _check_base(settings, lineage)
    for label, file in (("training file", lineage.training_file), ("validation file", lineage.validation_file)):
        if file is not None:
            yield _check_data(store, label, file.id, file.sha256)


def _check_adapter(lineage: "Lineage", files: "_FolderFiles | _StoredFiles", sha256: str | None) -> Iterator[Check]:
    from tuneloom.domain import adapter_sha256

    found = {}
    for file, expected in sorted(lineage.adapter.files.items()):
        yield (check := _check_hash(file, files.open, file, expected))
        found[file] = expected if check.is_ok else ""
    whole = adapter_sha256(found)
    is_whole = whole == lineage.adapter.sha256 and sha256 in (None, whole)
    yield Check("adapter", is_whole, whole if is_whole else "its files are not those of the lineage")


def _check_signer(settings: "Settings", signed: "Signed", public_key: Path | None) -> Check:
    """Whether the key that signed is one that the reader trusts."""
    from tuneloom.store.lineage import public_key_of

    if public_key is not None:
        try:
            trusted = public_key_of(public_key.read_bytes())
        except OSError as error:
            raise InvalidRequest(f"{public_key} cannot be read: {error.strerror}.") from error
        is_known = trusted == signed.public_key
        return Check("signer", is_known, f"{'is' if is_known else 'is not'} the one of {public_key}")
    if (own := _own_key(settings)) is not None and own == signed.public_key:
        return Check("signer", True, "this installation")
    return Check(
        "signer",
        False,
        f"unknown: key {signed.key_id} is not this installation's. Give the public key of who you trust: "
        "`--public-key FILE`",
    )


def _own_key(settings: "Settings") -> bytes | None:
    """The public key of this installation, if it has signed anything yet."""
    from tuneloom.config import SIGNING_KEY_FILE, read_signing_key
    from tuneloom.store.lineage import public_key_of

    if settings.signing_key is None and not (settings.home / SIGNING_KEY_FILE).exists():
        return None
    return public_key_of(read_signing_key(settings))


def _check_base(settings: "Settings", lineage: "Lineage") -> Iterator[Check]:
    """The files of the base, each read again, if the base is here."""
    from tuneloom.bases import get_base

    try:
        base = get_base(settings.bases_dir, lineage.base.id)
    except ModelNotFound:
        yield Check("base", None, f"`{lineage.base.id}` is not here")
        return
    files = _FolderFiles(base.path)
    checks = [_check_hash(f"base {name}", files.open, name, sha) for name, sha in sorted(lineage.base.files.items())]
    yield from (check for check in checks if not check.is_ok)
    if all(check.is_ok for check in checks):
        yield Check("base", True, f"`{base.id}`, {len(checks)} files, weights {lineage.base.sha256}")


def _check_data(store: "Store | None", label: str, file_id: str, expected: str) -> Check:
    stored = store.records.files.find(file_id) if store is not None else None
    if store is None or stored is None:
        return Check(label, None, f"`{file_id}` is not here; it had sha256 {expected}")
    return _check_hash(label, store.blobs.open, stored.value.blob, expected)


class _FolderFiles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, name: str) -> BinaryIO:
        return (self._folder / name).open("rb")

    @property
    def is_merged(self) -> bool:
        """Whether it holds a whole model instead of an adapter."""
        return (self._folder / "config.json").is_file() and not (self._folder / "adapter_config.json").exists()


class _StoredFiles:
    def __init__(self, store: "Store", ref: "AdapterRef") -> None:
        self._store, self._ref = store, ref

    def open(self, name: str) -> BinaryIO:
        return self._store.blobs.open(f"{self._ref.uri}/{name}")


def _check_hash(what: str, open_file: Callable[[str], BinaryIO], name: str, expected: str) -> Check:
    from tuneloom.store.base import BlobNotFound

    try:
        with open_file(name) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except (OSError, BlobNotFound):
        return Check(what, False, "it is missing")
    return Check(what, digest == expected, digest if digest == expected else f"sha256 {digest}, not {expected}")


def _find(store: "Store", owner: str, name: str) -> "AdapterRef":
    from tuneloom.store.names import find_named

    found = find_named(store.records, owner, name)
    for stored in (found.version, found.checkpoint) if found else ():
        if stored is not None:
            return stored.value.adapter
    raise ModelNotFound.named(name)


def _stored(store: "Store", ref: "AdapterRef") -> bytes | None:
    from tuneloom.store.lineage import read_lineage

    return read_lineage(store.blobs, ref)


def _signed(store: "Store", ref: "AdapterRef", name: str) -> "Signed":
    from tuneloom.store.lineage import read_signed

    raw = _stored(store, ref)
    if raw is None:
        raise InvalidRequest(f"`{name}` has no lineage: it was imported, or trained before there were lineages.")
    return read_signed(raw)


def _check_ingredients(settings: "Settings", store: "Store", owner: str, lineage: "Lineage") -> None:
    """Raise unless base and files are here and are the same."""
    from tuneloom.bases import get_base

    if lineage.kind == "checkpoint":
        raise InvalidRequest(f"This is a checkpoint of the job `{lineage.job_id}`. Reproduce the version that it made.")
    if get_base(settings.bases_dir, lineage.base.id).sha256 != lineage.base.sha256:
        raise Conflict(f"The base `{lineage.base.id}` here has other weights than the adapter was trained on.")
    for file in (lineage.training_file, lineage.validation_file):
        stored = store.records.files.find(file.id) if file is not None else None
        if file is not None and (stored is None or stored.value.owner != owner or stored.value.sha256 != file.sha256):
            raise Conflict(f"The file `{file.id}` ({file.filename}, sha256 {file.sha256}) is gone: it is needed again.")


def _spec(lineage: "Lineage") -> "JobSpec":
    """What makes the same adapter again: as it was asked, with what the machine had a say in as it was resolved."""
    from tuneloom.domain import TrainOptions

    resolved = {setting.name: setting.value for setting in lineage.settings if setting.name in OF_THE_MACHINE}
    options = TrainOptions.model_validate({**lineage.spec.options.model_dump(exclude_unset=True), **resolved})
    suffix = f"reproduce-{lineage.adapter.sha256[:12]}"
    changes = {"suffix": suffix, "hyperparameters": lineage.resolved, "options": options, "wandb": ()}
    return lineage.spec.model_copy(update={**changes, "metadata": None})


@contextmanager
def _ended(store: "Store", job_id: str, timeout_s: float) -> "Iterator[Version]":
    """The Version that a job makes, which is removed in the end. A job that has not ended by then is cancelled.

    Raises:
        TuneloomError: the job failed, or took too long.
    """
    from tuneloom.control import models

    version = None
    try:
        version = _wait(store, job_id, timeout_s)
        yield version
    finally:
        if version is None:
            _cancel(store, job_id)
        else:
            models.delete(store, version.owner, version.pinned_name)
            if not models.list_versions(store.records, version.owner, version.model):
                models.delete(store, version.owner, version.model)


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
