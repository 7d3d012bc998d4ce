"""The two seams of the store: small records (`Documents`) and large bytes (`Blobs`). No record types, no engine of any.

All calls are synchronous and thread-safe. Implementations are chosen by URL in `open_documents` and `open_blobs`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tuneloom.errors import TuneloomError

Scalar = str | int | float | bool | None


class StoreConflict(TuneloomError):
    """A precondition of a commit did not hold; nothing was written. Read again and decide again."""

    status = 409
    code = "conflict"


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
    """Add to a top-level number of an existing document, without reading it; conflicts if the document is absent."""

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


class Documents(Protocol):
    """Small JSON records in named collections."""

    def find(self, collection: str, id: str) -> Document | None: ...

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

        A key of `where` may be dotted (`metadata.team`) to look inside nested objects. `order_by` is a top-level
        field, or `id`. `bounds` apply to `order_by`. `after` is the cursor: the (order_by value, id) of the last
        document seen; with `order_by="id"` both are the id. Documents without the ordered field are not returned.
        """
        ...

    def commit(self, writes: Sequence[Write]) -> dict[tuple[str, str], str]:
        """Apply all writes or none; at most one write per document, at most 400 writes.

        Returns the new revision of each written document, by (collection, id); deleted ones are absent.

        Raises:
            StoreConflict: a precondition did not hold.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class BlobInfo:
    key: str
    size_bytes: int


class Blobs(Protocol):
    """Immutable byte strings by key. A key is 1-8 parts of `[A-Za-z0-9._-]`, none `.` or `..`, joined by `/`."""

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

    def delete(self, key: str) -> None:
        """Remove a blob; absent is fine."""
        ...
