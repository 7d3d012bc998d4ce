"""The two seams of the store: small records (`Documents`) and large bytes (`Blobs`). No record types, no engine of any.

All calls are synchronous and thread-safe. Implementations are chosen by URL in `open_documents` and `open_blobs`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tuneloom.errors import InvalidRequest, Overloaded, TuneloomError

MAX_WRITES = 400

Scalar = str | int | float | bool | None

# The quoting of Firestore's field paths.
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PART = re.compile(r"`(?P<quoted>(?:[^`\\]|\\.)*)`|(?P<plain>[^.`]+)", re.DOTALL)
_PATH = re.compile(rf"(?:{_PART.pattern})(?:\.(?:{re.sub('P<[a-z]+>', ':', _PART.pattern)}))*", re.DOTALL)


class StoreConflict(TuneloomError):
    """A precondition of a commit did not hold; nothing was written. Read again and decide again."""

    status = 409
    code = "conflict"


class CommitUnknown(Overloaded):
    """The answer to a commit was lost, and the documents do not tell whether it was applied; it may still be.

    It is applied whole or not at all. Read again and decide again.
    """


class StoreRefused(TuneloomError):
    """The store does not let this process in, or is not there: its operator has to act, and the message is for them.

    It names what only they should see; whoever calls the API gets a 503 without it.
    """

    status = 503


class BlobNotFound(TuneloomError):
    """There is no blob with that key."""

    status = 404


class BlobExists(TuneloomError):
    """A blob with that key exists and holds other bytes. Blobs never change."""

    status = 409


class BlobCorrupt(TuneloomError):
    """The bytes are not those that were promised (checksum or size)."""


@dataclass(frozen=True)
class Document:
    """A record as stored. `rev` is opaque; it changes with each write of the document."""

    collection: str
    id: str
    rev: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Create:
    """Write a document that does not exist; conflicts if it does."""

    collection: str
    id: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Replace:
    """Overwrite a document; conflicts unless `rev` is its current revision."""

    collection: str
    id: str
    data: Mapping[str, Any]
    rev: str


@dataclass(frozen=True)
class Delete:
    """Remove a document; conflicts if it is absent or `rev` (when given) is not current."""

    collection: str
    id: str
    rev: str | None = None


@dataclass(frozen=True)
class Increment:
    """Add to a top-level number of an existing document, without reading it; conflicts if the document is absent.

    A field that is absent counts as 0.
    """

    collection: str
    id: str
    field: str
    by: int | float


Write = Create | Replace | Delete | Increment


@dataclass(frozen=True)
class Range:
    """Bounds on the ordered field; None means open."""

    above: Scalar = None
    at_least: Scalar = None
    below: Scalar = None
    at_most: Scalar = None


def field_path(*parts: str) -> str:
    """A key of `where` from its parts, whatever characters they hold: `field_path("metadata", "a.b")`."""
    return ".".join(part if _PLAIN.fullmatch(part) else f"`{_escaped(part)}`" for part in parts)


def split_path(path: str) -> tuple[str, ...]:
    """The parts of a key of `where`; the inverse of `field_path`.

    Raises:
        InvalidRequest: a part is empty or a backtick is not closed.
    """
    if _PATH.fullmatch(path) is None:
        raise InvalidRequest(f"`{path[:80]}` is not a field path. Build it with `field_path`.")
    return tuple(
        re.sub(r"\\(.)", r"\1", match["quoted"], flags=re.DOTALL) if match["plain"] is None else match["plain"]
        for match in _PART.finditer(path)
    )


def _escaped(part: str) -> str:
    return part.replace("\\", "\\\\").replace("`", "\\`")


class Documents(Protocol):
    """Small JSON records in named collections."""

    def find(self, collection: str, id: str) -> Document | None:
        """The document, or None; an id that no document can have is simply not there."""
        ...

    def query(
        self,
        collection: str,
        where: Mapping[str, Scalar] | None = None,
        *,
        order_by: str = "id",
        descending: bool = False,
        bounds: Range | None = None,
        limit: int | None = None,
        after: tuple[Scalar, str] | None = None,
    ) -> list[Document]:
        """Documents whose top-level fields equal `where`, ordered by (`order_by`, id).

        A key of `where` may be dotted (`metadata.team`) to look inside nested objects; build it with `field_path`
        when a part comes from a user. Values are compared with their type: `True` is not 1, 1 is 1.0, and None
        matches a field that is there and null. A condition looks into objects, not into lists, and finds every value of
        a record of up to 200 kB with up to 5,000 of them. `order_by` is a top-level field, or `id`, the document id.
        Order is null, booleans, numbers, text by code point; `descending` reverses it, ids too. `bounds` apply to
        `order_by` and admit only values of the bound's own type. `after` is the cursor: the (order_by value, id) of the
        last document seen; with `order_by="id"` both are the id. Documents without the ordered field are not returned.
        """
        ...

    def commit(self, writes: Sequence[Write]) -> dict[tuple[str, str], str]:
        """Apply all writes or none; at most one write per document, at most 400 writes.

        Returns the new revision of each written document, by (collection, id); deleted ones are absent. A revision
        never comes back, also not when a document is deleted and created again.

        Raises:
            StoreConflict: a precondition did not hold.
            InvalidRequest: a write breaks the rules of `store.limits`, or adds to what is no number.
            TooLarge: the records are too large, one or all together.
            Overloaded: other writers did not let this one in for too long, or the store does not answer. Nothing was
                written, unless it is a CommitUnknown.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class BlobInfo:
    key: str
    size_bytes: int


class Blobs(Protocol):
    """Immutable byte strings by key.

    A key is 1-8 parts of `[A-Za-z0-9._-]`, none `.` or `..`, joined by `/`; a part has up to 255 characters, the key up
    to 900. Callers use no key that is a folder of another: with `a/b` neither `a` nor `a/b/c`. Files cannot hold both
    and refuse the second; a bucket does not look.
    """

    def write(self, key: str, source: bytes | Path | Iterable[bytes], *, sha256: str | None = None) -> str:
        """Store bytes under a new key, all or nothing, and return their sha256 (hex).

        Writing the same bytes again is a no-op.

        Raises:
            BlobExists: the key holds other bytes.
            BlobCorrupt: the bytes do not hash to `sha256`.
        """
        ...

    def open(self, key: str) -> BinaryIO:
        """A seekable reader; close it. Raises BlobNotFound."""
        ...

    def read(self, key: str) -> bytes:
        """All bytes. Raises BlobNotFound."""
        ...

    def find(self, key: str) -> BlobInfo | None: ...

    def list(self, prefix: str) -> list[BlobInfo]:
        """Blobs whose key starts with `prefix` + "/", ordered by key."""
        ...

    def walk(self) -> Iterator[BlobInfo]:
        """Every blob, ordered by key, looked up on the way. What is written or deleted meanwhile may come or not."""
        ...

    def delete(self, key: str) -> None:
        """Remove a blob; absent is fine."""
        ...
