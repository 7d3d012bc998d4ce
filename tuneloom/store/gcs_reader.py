"""A blob of Cloud Storage as a seekable file, read in pieces and checked on the way. Knows no client."""

import base64
import hashlib
import io
import os
from collections.abc import Callable
from typing import Any

import google_crc32c

from tuneloom.store.base import BlobCorrupt

PIECE_BYTES = 8 << 20


class PieceReader(io.RawIOBase):
    """The bytes of one generation, of which one piece is in memory. Not thread-safe, as files are not.

    The first piece is read when it is made, so that a small blob is whole from then on whatever becomes of it. Read
    from its start to its end, a blob is held against its hash before its last piece is given out.

    Args:
        fetch: The bytes from a position, as many as are asked for.
        sha256: Hex, of the whole; where it is None, `crc32c` is held against: base64, big-endian, as Google gives it.
    """

    def __init__(
        self, key: str, size: int, fetch: Callable[[int, int], bytes], *, sha256: str | None, crc32c: str | None
    ) -> None:
        self._key = key
        self._size = size
        self._fetch = fetch
        self._wanted = sha256 or crc32c
        self._digest: Any = hashlib.sha256() if sha256 else google_crc32c.Checksum()
        self._num_hashed = 0
        self._position = 0
        self._start = 0
        self._piece = b""
        self._load()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"negative seek position {start + offset}")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        if self._position >= self._size:
            return 0
        if not self._start <= self._position < self._start + len(self._piece):
            self._load()
        target = memoryview(buffer).cast("B")
        offset = self._position - self._start
        part = memoryview(self._piece)[offset : offset + len(target)]
        target[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        self._piece = b""
        super().close()

    def _load(self) -> None:
        count = min(PIECE_BYTES, self._size - self._position)
        # Let go of the old one first: one piece at a time.
        self._start, self._piece = self._position, b""
        piece = self._fetch(self._position, count) if count else b""
        if len(piece) != count:
            raise BlobCorrupt(f"The blob `{self._key}` gave {len(piece):,} bytes for {count:,}.")
        if self._start == self._num_hashed:
            self._digest.update(piece)
            self._num_hashed += count
            if self._num_hashed == self._size:
                self._verify()
        self._piece = piece

    def _verify(self) -> None:
        is_sha256 = not isinstance(self._digest, google_crc32c.Checksum)
        found = self._digest.hexdigest() if is_sha256 else base64.b64encode(self._digest.digest()).decode()
        if self._wanted is not None and found != self._wanted:
            raise BlobCorrupt(
                f"The stored bytes of the blob `{self._key}` hash to `{found}`, not to `{self._wanted}` as they did."
            )
