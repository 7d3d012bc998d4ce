"""`tuneloom verify`: whether an adapter is what its signed lineage says."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from tuneloom.cli.models import Owner, holder_of
from tuneloom.cli.session import open_store, read_settings
from tuneloom.domain import LOCAL_OWNER
from tuneloom.errors import InvalidRequest, ModelNotFound

if TYPE_CHECKING:
    from tuneloom.config import Settings
    from tuneloom.domain import Checkpoint, Version
    from tuneloom.store import Store
    from tuneloom.store.lineage import BaseFacts, FileFacts, Lineage, Signed

# What may stand beside an adapter's files, since nothing is loaded from it.
TEXTS = frozenset({"README.md", "LICENSE"})


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `is_ok` None: it could not be."""

    what: str
    is_ok: bool | None
    detail: str

    def line(self) -> str:
        return f"{ {True: 'ok', False: 'FAIL', None: '--'}[self.is_ok]:5} {self.what}: {self.detail}"


@dataclass(frozen=True)
class _Subject:
    """An adapter to look at: its lineage as it was found, its files, and its record if there is one."""

    name: str
    raw: bytes | None
    files: "FolderFiles | _StoredFiles"
    record: "Version | Checkpoint | None" = None
    store: "Store | None" = None


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
    for check in checks_of(context, settings, name, public_key, owner):
        typer.echo(check.line())
        is_failed |= check.is_ok is False
    if is_failed:
        raise typer.Exit(1)


def checks_of(
    context: typer.Context, settings: "Settings", name: str, public_key: Path | None, owner: str
) -> Iterator[Check]:
    """All checks of an adapter in the store, or of one in a folder, where there may be no store."""
    from tuneloom.store.lineage import LINEAGE_FILE, MAX_BYTES, read_lineage

    folder = Path(name)
    if folder.is_file():
        raise InvalidRequest(f"{folder} is a file. Unpack it, and give the folder.")
    if not folder.is_dir():
        with open_store(context) as store:
            record = holder_of(store, owner, name)
            raw = read_lineage(store.blobs, record.adapter)
            subject = _Subject(name, raw, _StoredFiles(store, record.adapter.uri), record, store)
            yield from _check(settings, subject, public_key)
        return
    path = folder / LINEAGE_FILE
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise InvalidRequest(f"{path} is larger than a lineage may be: {MAX_BYTES} bytes.")
    raw = path.read_bytes() if path.is_file() else None
    if settings.home.is_dir():
        with open_store(context) as store:
            _warn_of_model(store, owner, name)
            yield from _check(settings, _Subject(name, raw, FolderFiles(folder), store=store), public_key)
    else:
        yield from _check(settings, _Subject(name, raw, FolderFiles(folder)), public_key)


def _warn_of_model(store: "Store", owner: str, name: str) -> None:
    """A model is exported into a folder of its own name, and both can be meant then."""
    from tuneloom.store.names import find_named

    if (found := find_named(store.records, owner, name)) is not None and found.version is not None:
        pinned = found.version.value.pinned_name
        typer.echo(f"This is the folder `{name}`. The model of that name: `tuneloom verify {pinned}`.", err=True)


def _check(settings: "Settings", subject: _Subject, public_key: Path | None) -> Iterator[Check]:
    from tuneloom.store.lineage import LineageBroken, read_signed

    if subject.raw is None:
        reason = f"`{subject.name}` has none: it was imported, or trained before there were lineages"
        yield Check("lineage", False, reason)
        return
    try:
        signed = read_signed(subject.raw)
    except LineageBroken as error:
        yield Check("lineage", False, error.message)
        return
    lineage, files = signed.lineage, subject.files
    yield Check("signature", True, f"fits all of the document, by key {signed.key_id}")
    yield _check_signer(settings, signed, public_key)
    if isinstance(files, FolderFiles) and files.is_merged:
        what = f"a merged model's are not covered: the lineage is that of the adapter {lineage.adapter.sha256}"
        yield Check("weights", False, f"{what}. Verify that one, and export it again")
    else:
        yield from _check_adapter(lineage, subject)
    yield from check_base(settings, lineage.base)
    for label, file in data_files(lineage):
        yield check_data(subject.store, label, file)


def data_files(lineage: "Lineage") -> "Iterator[tuple[str, FileFacts]]":
    for label, file in (("training file", lineage.training_file), ("validation file", lineage.validation_file)):
        if file is not None:
            yield label, file


def _check_adapter(lineage: "Lineage", subject: _Subject) -> Iterator[Check]:
    from tuneloom.domain import adapter_sha256
    from tuneloom.store.lineage import LINEAGE_FILE

    found, record = {}, subject.record
    for file, expected in sorted(lineage.adapter.files.items()):
        yield (check := _check_hash(file, subject.files, file, expected))
        found[file] = expected if check.is_ok else ""
    if isinstance(subject.files, FolderFiles):
        yield from _check_others(subject.files.names(), {*lineage.adapter.files, LINEAGE_FILE})
    whole = adapter_sha256(found)
    is_whole = whole == lineage.adapter.sha256 and (record is None or record.adapter.sha256 == whole)
    yield Check("adapter", is_whole, whole if is_whole else "its files are not those of the lineage")
    if record is not None and record.job_id != lineage.job_id:
        yield Check("job", False, f"the lineage is of {lineage.job_id}, and `{subject.name}` of {record.job_id}")


def _check_others(names: Iterable[str], known: set[str]) -> Iterator[Check]:
    """Files that nobody signed: loaders look for some names before those of the adapter."""
    for name in sorted(set(names) - known):
        is_text = name in TEXTS or name.startswith(".")
        yield Check(name, None if is_text else False, "not covered" if is_text else "the lineage has no such file")


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


def check_base(settings: "Settings", facts: "BaseFacts") -> Iterator[Check]:
    """The files of the base, each read again, if the base is here."""
    from tuneloom.bases import get_base
    from tuneloom.bases.catalogue import MANIFEST

    try:
        base = get_base(settings.bases_dir, facts.id)
    except ModelNotFound:
        yield Check("base", None, f"`{facts.id}` is not here")
        return
    files = FolderFiles(base.path)
    checks = [_check_hash(f"base {name}", files, name, sha) for name, sha in sorted(facts.files.items())]
    # A template or weights of another name would be loaded with it.
    added = sorted({name for name in files.names() if not name.startswith(".")} - {*facts.files, MANIFEST})
    checks += [Check(f"base {name}", False, "the lineage has no such file") for name in added]
    yield from (check for check in checks if not check.is_ok)
    if all(check.is_ok for check in checks):
        yield Check("base", True, f"`{base.id}`, {len(checks)} files, weights {facts.sha256}")


def check_data(store: "Store | None", label: str, file: "FileFacts") -> Check:
    stored = store.records.files.find(file.id) if store is not None else None
    if store is None or stored is None:
        return Check(label, None, f"`{file.id}` is not here; it had sha256 {file.sha256}")
    return _check_hash(label, _StoredFiles(store), stored.value.blob, file.sha256)


class FolderFiles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, name: str) -> BinaryIO:
        """Raises OSError, also for what is no file: reading a pipe or a device has no end."""
        path = self._folder / name
        if path.exists() and not path.is_file():
            raise OSError(0, "it is no file")
        return path.open("rb")

    def names(self) -> list[str]:
        return [path.name for path in self._folder.iterdir()]

    @property
    def is_merged(self) -> bool:
        """Whether it holds a whole model instead of an adapter."""
        return (self._folder / "config.json").is_file() and not (self._folder / "adapter_config.json").exists()


class _StoredFiles:
    def __init__(self, store: "Store", prefix: str = "") -> None:
        self._store, self._prefix = store, f"{prefix}/" if prefix else ""

    def open(self, name: str) -> BinaryIO:
        return self._store.blobs.open(f"{self._prefix}{name}")


def _check_hash(what: str, files: FolderFiles | _StoredFiles, name: str, expected: str) -> Check:
    from tuneloom.store.base import BlobNotFound

    try:
        with files.open(name) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except (FileNotFoundError, BlobNotFound):
        return Check(what, False, "it is missing")
    except OSError as error:
        return Check(what, False, f"it cannot be read: {error.strerror}")
    return Check(what, digest == expected, digest if digest == expected else f"sha256 {digest}, not {expected}")
