"""The only place where state lives: records and blobs, opened by URL."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tuneloom.errors import InvalidRequest
from tuneloom.store.base import Blobs, Documents
from tuneloom.store.files import FileBlobs
from tuneloom.store.records import Records
from tuneloom.store.sqlite import SqliteDocuments

if TYPE_CHECKING:
    from tuneloom.config import Settings

__all__ = ["Store", "open_blobs", "open_documents", "open_pair", "open_store"]


@dataclass(frozen=True)
class Store:
    records: Records
    blobs: Blobs

    def close(self) -> None:
        self.records.documents.close()


def open_store(settings: "Settings") -> Store:
    return open_pair(settings.documents, settings.blobs)


def open_pair(documents_url: str, blobs_url: str) -> Store:
    # In this order a wrong URL of blobs makes no database.
    blobs = open_blobs(blobs_url)
    return Store(Records(open_documents(documents_url)), blobs)


def open_documents(url: str) -> Documents:
    """The documents at `sqlite:PATH`, `firestore:PROJECT` or `firestore:PROJECT/DATABASE`; close them after use."""
    match _split(url):
        case ("sqlite", path):
            with _opening(url, "documents_url"):
                return SqliteDocuments(Path(path))
        case ("firestore", _):
            from tuneloom.store.firestore import FirestoreDocuments

            return FirestoreDocuments.at(url)
    raise InvalidRequest(
        f"`{url}` is not a documents URL. Use `sqlite:PATH` or `firestore:PROJECT/DATABASE`.", param="documents_url"
    )


def open_blobs(url: str) -> Blobs:
    """The blobs at `file:FOLDER` or `gs://BUCKET/PREFIX`."""
    match _split(url):
        case ("file", folder):
            with _opening(url, "blobs_url"):
                return FileBlobs(Path(folder))
        case ("gs", _):
            from tuneloom.store.gcs import GcsBlobs

            return GcsBlobs.at(url)
    raise InvalidRequest(f"`{url}` is not a blobs URL. Use `file:FOLDER` or `gs://BUCKET/PREFIX`.", param="blobs_url")


@contextmanager
def _opening(url: str, param: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidRequest(f"`{url}` cannot be opened: {error.strerror}.", param=param) from error


def _split(url: str) -> tuple[str, str] | None:
    scheme, _, rest = url.partition(":")
    return (scheme, rest) if rest else None
