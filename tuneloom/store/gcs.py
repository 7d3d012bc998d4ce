"""Blobs as objects of a Cloud Storage bucket. Knows no artifacts, only keys and bytes."""

import base64
import contextlib
import hashlib
import io
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import google_crc32c
from google.api_core import exceptions
from google.cloud.storage import Blob
from google.cloud.storage.exceptions import DataCorruption

from tuneloom.errors import InvalidRequest, Overloaded
from tuneloom.store.base import BlobCorrupt, BlobExists, BlobInfo, BlobNotFound
from tuneloom.store.gcs_client import RETRY_AFTER_S, UNDERSTOOD, Bucket, Waits, asking, no_bucket
from tuneloom.store.gcs_reader import PieceReader
from tuneloom.store.limits import check_key

# Of these at most one is in memory; from `SPOOLED_BYTES` on, what comes in pieces waits on the local disk.
UPLOAD_BYTES = 16 << 20
SPOOLED_BYTES = 8 << 20
CHUNK_BYTES = 1 << 20
PAGE = 1000
BUFFER_BYTES = 64 << 10
UPLOAD_TRIES = 3
MAX_TRIES = 20
# An upload of which the server says so begins anew: nothing of it is there, its bytes are not the promised ones, or its
# session is gone.
LOST = frozenset({308, 400, 410})
# An object's name has up to 1024 bytes, a key 900 of them.
MAX_PREFIX = 100

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


class GcsBlobs:
    """`Blobs` as objects `PREFIX/KEY` of a bucket, each with its sha256 in its metadata.

    An object is there from the moment that its upload is finished, and only if none was. What is being uploaded shows
    nowhere; Google forgets it a week later. A source is hashed before it is uploaded, so that nothing of a wrong one
    is ever sent. A bucket does not see that a key is a folder of another.
    """

    def __init__(self, bucket: str, prefix: str = "", waits: Waits | None = None) -> None:
        self._bucket = Bucket(bucket, waits or Waits())
        self._root = f"{prefix}/" if prefix else ""

    @classmethod
    def at(cls, url: str, waits: Waits | None = None) -> "GcsBlobs":
        """Those at `gs://BUCKET[/PREFIX]`. Raises InvalidRequest."""
        bucket, _, prefix = url.removeprefix("gs://").partition("/")
        prefix = prefix.removesuffix("/")
        if not url.startswith("gs://") or not _BUCKET.fullmatch(bucket):
            raise InvalidRequest(f"`{url}` does not name a bucket. Use `gs://BUCKET/PREFIX`.", param="blobs_url")
        if prefix:
            try:
                check_key(prefix)
            except InvalidRequest as error:
                raise InvalidRequest(f"`blobs_url`: {error.message}", param="blobs_url") from error
        if len(prefix) > MAX_PREFIX:
            raise InvalidRequest(f"The prefix of `{url}` is over {MAX_PREFIX} characters.", param="blobs_url")
        return cls(bucket, prefix, waits)

    def write(self, key: str, source: bytes | Path | Iterable[bytes], *, sha256: str | None = None) -> str:
        check_key(key)
        with _at_hand(source) as content:
            if sha256 is not None and content.sha256 != sha256:
                raise BlobCorrupt(f"The bytes for `{key}` hash to `{content.sha256}`, not to `{sha256}` as promised.")
            for _ in range(MAX_TRIES):
                if self._create(key, content):
                    break
                # Deleted again between the two: then the key is free.
                with contextlib.suppress(BlobNotFound):
                    if not self._holds(key, content):
                        raise BlobExists(f"The blob `{key}` exists with other bytes. Use another key.")
                    break
            else:
                raise Overloaded(f"Too many processes write and delete `{key}`. Try again.", retry_after_s=1.0)
            return content.sha256

    def open(self, key: str) -> BinaryIO:
        """As the seam says. Of more than one piece, a blob that is deleted while it is read raises BlobNotFound."""
        found = self._get(key)

        def fetch(start: int, count: int) -> bytes:
            # Asked for as a whole, the library holds it against its crc32c too.
            is_whole = count == found.size
            with self._asking_for(key):
                return self._bucket.blob(found.name, generation=found.generation).download_as_bytes(
                    start=None if is_whole else start,
                    end=None if is_whole else start + count - 1,
                    raw_download=True,
                    checksum="crc32c",
                    **(self._bucket.piece if count > CHUNK_BYTES else self._bucket.call),
                )

        reader = PieceReader(key, found.size, fetch, sha256=_sha256_of(found), crc32c=found.crc32c)
        return cast(BinaryIO, io.BufferedReader(reader, BUFFER_BYTES))

    def read(self, key: str) -> bytes:
        with self.open(key) as file:
            return file.read()

    def find(self, key: str) -> BlobInfo | None:
        try:
            return BlobInfo(key, self._get(key).size)
        except BlobNotFound:
            return None

    def list(self, prefix: str) -> list[BlobInfo]:
        return list(self._walk(f"{check_key(prefix)}/"))

    def walk(self) -> Iterator[BlobInfo]:
        return self._walk("")

    def delete(self, key: str) -> None:
        try:
            found = self._get(key)
        except BlobNotFound:
            return
        # Of this generation only: a repeated call must not delete what another process has written since.
        with (
            contextlib.suppress(exceptions.NotFound, exceptions.PreconditionFailed),
            asking(self._bucket.name),
        ):
            self._bucket.blob(found.name).delete(if_generation_match=found.generation, **self._bucket.call)

    def _get(self, key: str) -> Blob:
        """The object without its bytes. Raises BlobNotFound."""
        blob = self._bucket.blob(f"{self._root}{check_key(key)}")
        with self._asking_for(key):
            blob.reload(**self._bucket.call)
        return blob

    @contextlib.contextmanager
    def _asking_for(self, key: str) -> Iterator[None]:
        try:
            with asking(self._bucket.name):
                yield
        except exceptions.NotFound as error:
            self._bucket.check()
            raise BlobNotFound(f"There is no blob `{key}`.") from error
        except DataCorruption as error:
            raise BlobCorrupt(f"The blob `{key}` came with other bytes than Cloud Storage has.") from error

    def _walk(self, below: str) -> Iterator[BlobInfo]:
        with asking(self._bucket.name):
            try:
                found = self._bucket.client.list_blobs(
                    self._bucket.name,
                    prefix=f"{self._root}{below}",
                    page_size=PAGE,
                    fields="items(name,size),nextPageToken",
                    **self._bucket.call,
                )
                for blob in found:
                    key = blob.name.removeprefix(self._root)
                    # People make folders in the console; they are objects whose names end in `/`.
                    with contextlib.suppress(InvalidRequest):
                        yield BlobInfo(check_key(key), blob.size)
            except exceptions.NotFound as error:
                raise no_bucket(self._bucket.name) from error

    def _create(self, key: str, content: "_Content") -> bool:
        """Upload and return True; False if there is an object already."""
        last: Exception | None = None
        for _ in range(UPLOAD_TRIES):
            blob = self._bucket.blob(f"{self._root}{key}", chunk_size=UPLOAD_BYTES)
            blob.metadata = {"sha256": content.sha256}
            # Google refuses what arrives as other bytes than those that were hashed before.
            blob.crc32c = content.crc32c
            try:
                with asking(self._bucket.name, UNDERSTOOD | LOST):
                    blob.upload_from_file(
                        content.file,
                        rewind=True,
                        size=content.size,
                        content_type="application/octet-stream",
                        if_generation_match=0,
                        # The library would delete what it finds spoiled, whatever is there by then.
                        checksum=None,
                        **(self._bucket.piece if content.size > CHUNK_BYTES else self._bucket.call),
                    )
            except exceptions.PreconditionFailed:
                return False
            except (exceptions.GoogleAPICallError, DataCorruption, ValueError) as error:
                # The session is lost, or the library (3.17) and the server disagree about what has arrived: anew.
                self._bucket.check()
                last = error
            else:
                if blob.crc32c == content.crc32c:
                    return True
                # An emulator keeps what Google refuses.
                with asking(self._bucket.name):
                    blob.delete(if_generation_match=blob.generation, **self._bucket.call)
            if content.has_changed():
                raise BlobCorrupt(f"The file for `{key}` changed while it was stored. Store it again.") from last
        raise Overloaded(
            f"The blob `{key}` did not arrive whole in {UPLOAD_TRIES} tries. Try again.", retry_after_s=RETRY_AFTER_S
        ) from last

    def _holds(self, key: str, content: "_Content") -> bool:
        """Whether the object has these bytes. Raises BlobNotFound."""
        found = self._get(key)
        if (found.size, found.crc32c) != (content.size, content.crc32c):
            return False
        if (stored := _sha256_of(found)) is not None:
            return stored == content.sha256
        with self.open(key) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == content.sha256


def _sha256_of(blob: Blob) -> str | None:
    return (blob.metadata or {}).get("sha256")


@dataclass(frozen=True)
class _Content:
    """The bytes of a source where they can be read more than once. `crc32c` is in base64."""

    file: BinaryIO
    size: int
    sha256: str
    crc32c: str

    @classmethod
    def of(cls, file: BinaryIO) -> "_Content":
        file.seek(0)
        sha256, crc32c, size = hashlib.sha256(), google_crc32c.Checksum(), 0
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            crc32c.update(chunk)
            size += len(chunk)
        return cls(file, size, sha256.hexdigest(), base64.b64encode(crc32c.digest()).decode())

    def has_changed(self) -> bool:
        """Whether the source is another by now: a file that somebody writes to."""
        return _Content.of(self.file) != self


@contextlib.contextmanager
def _at_hand(source: bytes | Path | Iterable[bytes]) -> Iterator[_Content]:
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes | bytearray | memoryview):
            file: BinaryIO = io.BytesIO(source)
        elif isinstance(source, Path):
            file = stack.enter_context(source.open("rb"))
        else:
            # Without a name in any folder: it goes with the process.
            file = cast(BinaryIO, stack.enter_context(tempfile.SpooledTemporaryFile(SPOOLED_BYTES)))
            for chunk in source:  # `writelines` would hold all of them before it looks how many there are.
                file.write(chunk)
        yield _Content.of(file)
