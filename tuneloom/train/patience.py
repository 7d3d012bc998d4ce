"""Blobs for a run: a store that does not answer for some minutes delays a run, and does not end it."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from tuneloom.errors import Overloaded
from tuneloom.store.base import BlobInfo, Blobs

logger = logging.getLogger(__name__)

PATIENCE_S = 600.0
PAUSE_S = 5.0
T = TypeVar("T")


class PatientBlobs:
    """`Blobs` that ask again while the store is overloaded, for `patience_s` a call.

    What is read from an open blob is not asked for again, nor is a source that can be read only once.
    """

    def __init__(
        self, blobs: Blobs, patience_s: float = PATIENCE_S, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._blobs = blobs
        self._patience_s = patience_s
        self._sleep = sleep

    def write(self, key: str, source: bytes | Path | Iterable[bytes], *, sha256: str | None = None) -> str:
        if not isinstance(source, bytes | Path):
            return self._blobs.write(key, source, sha256=sha256)
        return self._insist(lambda: self._blobs.write(key, source, sha256=sha256))

    def open(self, key: str) -> BinaryIO:
        return self._insist(lambda: self._blobs.open(key))

    def read(self, key: str) -> bytes:
        return self._insist(lambda: self._blobs.read(key))

    def find(self, key: str) -> BlobInfo | None:
        return self._insist(lambda: self._blobs.find(key))

    def list(self, prefix: str) -> list[BlobInfo]:
        return self._insist(lambda: self._blobs.list(prefix))

    def walk(self) -> Iterator[BlobInfo]:
        return self._blobs.walk()

    def delete(self, key: str) -> None:
        self._insist(lambda: self._blobs.delete(key))

    def _insist(self, call: Callable[[], T]) -> T:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return call()
            except Overloaded as error:
                pause_s = error.retry_after_s or PAUSE_S
                if time.monotonic() + pause_s > deadline:
                    raise
                logger.warning("the blob store is asked again in %.0f s: %s", pause_s, error)
                self._sleep(pause_s)
