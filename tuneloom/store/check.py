"""Whether the blobs are those that the records promise: files by their sha256, adapters by their content hash."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from tuneloom.domain import AdapterRef, File, Record, adapter_sha256
from tuneloom.store import Store
from tuneloom.store.artifacts import ADAPTER_FILES
from tuneloom.store.base import BlobCorrupt, BlobNotFound
from tuneloom.store.copy import PAGE, REPORT_EVERY_S, Difference, Report, sha256_of
from tuneloom.store.records import Table

T = TypeVar("T", bound=Record)


@dataclass
class Checked:
    """How many were looked at, and what is wrong with which."""

    files: int = 0
    adapters: int = 0
    differences: list[Difference] = field(default_factory=list)


def check_store(store: Store, report: Report = lambda line: None) -> Checked:
    """Read every file and every adapter that a record speaks of, and compare their hashes.

    The installation may be at work: what goes while it is looked at is no problem.
    """
    checked = Checked()
    said_at = time.monotonic()
    for name, problem in _problems(store, checked):
        if problem is not None and store.records.documents.find(*name.split("/", 1)) is not None:
            checked.differences.append(Difference(name, problem))
        if time.monotonic() - said_at > REPORT_EVERY_S:
            said_at = time.monotonic()
            report(f"{checked.files:,} files, {checked.adapters:,} adapters, at {name}")
    return checked


def _problems(store: Store, checked: Checked) -> Iterator[tuple[str, str | None]]:
    """What was looked at, and what is wrong with it."""
    for file in _all(store.records.files):
        checked.files += 1
        yield f"files/{file.id}", _caught(lambda file=file: _file_problem(store, file))
    # A checkpoint and the Version made of it may be one adapter.
    seen: set[str] = set()
    for table in (store.records.versions, store.records.checkpoints):
        for record in _all(table):
            if record.adapter.uri not in seen:
                seen.add(record.adapter.uri)
                checked.adapters += 1
                name = f"{table.collection}/{record.id}"
                yield name, _caught(lambda ref=record.adapter: _adapter_problem(store, ref))


def _file_problem(store: Store, file: File) -> str | None:
    found = sha256_of(store.blobs, file.blob)
    return None if found == file.sha256 else f"has the sha256 {found}, not {file.sha256}"


def _adapter_problem(store: Store, ref: AdapterRef) -> str | None:
    found = adapter_sha256({name: sha256_of(store.blobs, f"{ref.uri}/{name}") for name in ADAPTER_FILES})
    return None if found == ref.sha256 else f"has the content hash {found}, not {ref.sha256}"


def _caught(look: Callable[[], str | None]) -> str | None:
    try:
        return look()
    except (BlobNotFound, BlobCorrupt) as error:
        return f"cannot be read: {error.message}"


def _all(table: Table[T]) -> Iterator[T]:
    after: T | None = None
    while page := table.query(limit=PAGE, after=after):
        for stored in page:
            yield stored.value
        after = page[-1].value
