"""An installation's records and blobs from one store to another, compared by content. Knows no rule of any record.

Both sides are read in the order of ids and keys, side by side and page by page, so that nothing is held but a page.
What is at the target stays as it is: a copy that was killed is run again, and does what was not done.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from tuneloom.errors import Conflict
from tuneloom.store import Store
from tuneloom.store.base import BlobCorrupt, BlobExists, BlobInfo, BlobNotFound, Blobs, Create, Document, Documents
from tuneloom.store.limits import MAX_COMMIT_BYTES, encode

CHUNK_BYTES = 1 << 20
PAGE = 300
REPORT_EVERY_S = 2.0
# One that is larger takes long by itself, and is told of before.
LARGE_BYTES = 64 << 20
MAX_NAMED = 20

Report = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same on both sides: `collection/id`, or `blobs/KEY`."""

    name: str
    problem: str

    def __str__(self) -> str:
        return f"{self.name} {self.problem}"


@dataclass
class Result:
    """What both sides hold alike, how much of it was copied now, and what differs."""

    records: dict[str, int] = field(default_factory=dict)
    blobs: int = 0
    blob_bytes: int = 0
    copied_records: int = 0
    copied_blobs: int = 0
    copied_bytes: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        return not self.differences

    def as_json(self) -> dict[str, Any]:
        return {"is_equal": self.is_equal, **asdict(self)}


def copy_store(source: Store, target: Store, report: Report = lambda line: None) -> Result:
    """Copy what the target lacks, blobs first, since records speak of them. Then both are the same, or it is told.

    Raises:
        Conflict: the target holds something that the source does not hold alike; nothing was written.
    """
    _refuse_strangers(source, target)
    result = Result()
    _blobs(source.blobs, target.blobs, result, report, is_copying=True)
    for collection in source.records.collections:
        _copy_records(source, target, collection, result, report)
    _records(source, target, result, report)
    return result


def compare_stores(source: Store, target: Store, report: Report = lambda line: None) -> Result:
    """Compare everything and write nothing."""
    result = Result()
    _blobs(source.blobs, target.blobs, result, report, is_copying=False)
    _records(source, target, result, report)
    return result


def _refuse_strangers(source: Store, target: Store) -> None:
    found: list[Difference] = []
    for collection in source.records.collections:
        for ours, theirs in _both(source, target, collection):
            if theirs is not None and (ours is None or _canonical(ours) != _canonical(theirs)):
                found.append(_record_difference(ours, theirs))
    for ours, theirs in _side_by_side(source.blobs.walk(), target.blobs.walk(), _key):
        if theirs is not None and (ours is None or ours.size_bytes != theirs.size_bytes):
            found.append(_blob_difference(ours, theirs))
    if found:
        more = f"; and {len(found) - MAX_NAMED:,} more" if len(found) > MAX_NAMED else ""
        raise Conflict(
            f"The target holds other things than the source: {'; '.join(map(str, found[:MAX_NAMED]))}{more}. "
            "Nothing was written. Name an empty target, or remove them there."
        )


def _records(source: Store, target: Store, result: Result, report: Report) -> None:
    for collection in source.records.collections:
        result.records[collection] = 0
        for ours, theirs in _both(source, target, collection):
            if ours is not None and theirs is not None and _canonical(ours) == _canonical(theirs):
                result.records[collection] += 1
            else:
                result.differences.append(_record_difference(ours, theirs))
    report(f"records: {sum(result.records.values()):,} are the same")


def _both(source: Store, target: Store, collection: str) -> Iterator[tuple[Document | None, Document | None]]:
    sides = (_all(store.records.documents, collection) for store in (source, target))
    return _side_by_side(*sides, _id)


def _copy_records(source: Store, target: Store, collection: str, result: Result, report: Report) -> None:
    writes: list[Create] = []
    size_bytes = count = 0

    def flush() -> None:
        nonlocal writes, size_bytes, count
        target.records.commit(*writes)
        count += len(writes)
        writes, size_bytes = [], 0

    for ours, theirs in _both(source, target, collection):
        if ours is None or theirs is not None:
            continue
        size = len(encode(ours.data))
        if len(writes) == PAGE or size_bytes + size > MAX_COMMIT_BYTES:
            flush()
        writes.append(Create(collection, ours.id, ours.data))
        size_bytes += size
    if writes:
        flush()
    if count:
        report(f"{collection}: {count:,} copied")
    result.copied_records += count


def _blobs(source: Blobs, target: Blobs, result: Result, report: Report, *, is_copying: bool) -> None:
    said_at = time.monotonic()
    for ours, theirs in _side_by_side(source.walk(), target.walk(), _key):
        if ours is None or (theirs is None and not is_copying):
            result.differences.append(_blob_difference(ours, theirs))
            continue
        if ours.size_bytes >= LARGE_BYTES:
            report(f"blobs: {_amount(result)}; next is {ours.key} of {ours.size_bytes:,} bytes")
        try:
            if theirs is None:
                sha256 = _copy_blob(source, target, ours.key)
                result.copied_blobs += 1
                result.copied_bytes += ours.size_bytes
            else:
                sha256 = sha256_of(source, ours.key)
        except (BlobCorrupt, BlobNotFound) as error:
            result.differences.append(Difference(f"blobs/{ours.key}", f"cannot be read at the source: {error.message}"))
            continue
        problem = _problem_at(target, ours.key, sha256)
        if problem is None:
            result.blobs += 1
            result.blob_bytes += ours.size_bytes
        else:
            result.differences.append(Difference(f"blobs/{ours.key}", problem))
        if time.monotonic() - said_at > REPORT_EVERY_S:
            said_at = time.monotonic()
            report(f"blobs: {_amount(result)}, at {ours.key}")
    report(f"blobs: {_amount(result)}")


def _amount(result: Result) -> str:
    copied = f", {result.copied_blobs:,} copied now" if result.copied_blobs else ""
    return f"{result.blobs:,} with {result.blob_bytes:,} bytes are the same{copied}"


def _copy_blob(source: Blobs, target: Blobs, key: str) -> str:
    with source.open(key) as file:
        try:
            return target.write(key, iter(lambda: file.read(CHUNK_BYTES), b""))
        except BlobExists:
            # Another process has written it since; it is compared as what was there before.
            return sha256_of(source, key)


def _problem_at(target: Blobs, key: str, sha256: str) -> str | None:
    try:
        found = sha256_of(target, key)
    except (BlobCorrupt, BlobNotFound) as error:
        return f"cannot be read at the target: {error.message}"
    return None if found == sha256 else f"differs: sha256 {sha256} at the source, {found} at the target"


def sha256_of(blobs: Blobs, key: str) -> str:
    """Of the bytes as they are read. Raises BlobNotFound, BlobCorrupt."""
    with blobs.open(key) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _all(documents: Documents, collection: str) -> Iterator[Document]:
    after = None
    while page := documents.query(collection, limit=PAGE, after=after):
        yield from page
        after = (page[-1].id, page[-1].id)


def _side_by_side(
    left: Iterable[T], right: Iterable[T], key: Callable[[T], str]
) -> Iterator[tuple[T | None, T | None]]:
    """Pairs of what has the same key, None where a side lacks it. Both sides come in the order of their keys."""
    lefts, rights = iter(left), iter(right)
    one, other = next(lefts, None), next(rights, None)
    while one is not None or other is not None:
        if other is None or (one is not None and key(one) < key(other)):
            yield one, None
            one = next(lefts, None)
        elif one is None or key(other) < key(one):
            yield None, other
            other = next(rights, None)
        else:
            yield one, other
            one, other = next(lefts, None), next(rights, None)


def _canonical(document: Document) -> str:
    # Not `==`: to Python 1 is 1.0 and True.
    return json.dumps(document.data, sort_keys=True)


def _id(document: Document) -> str:
    return document.id


def _key(info: BlobInfo) -> str:
    return info.key


def _record_difference(ours: Document | None, theirs: Document | None) -> Difference:
    there = ours or theirs
    assert there is not None
    return Difference(f"{there.collection}/{there.id}", _where(ours, theirs) or "differs")


def _blob_difference(ours: BlobInfo | None, theirs: BlobInfo | None) -> Difference:
    there = ours or theirs
    assert there is not None
    return Difference(f"blobs/{there.key}", _where(ours, theirs) or "differs in size")


def _where(ours: object | None, theirs: object | None) -> str | None:
    if ours is None:
        return "is only at the target"
    return "is only at the source" if theirs is None else None
