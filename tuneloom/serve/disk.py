"""Adapters on the local disk, within a limit: the tier between the blob store and the engines of this machine."""

import contextlib
import errno
import logging
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from tuneloom.domain import AdapterRef
from tuneloom.engine.base import TierStats
from tuneloom.store.artifacts import fetch_adapter
from tuneloom.store.base import Blobs

logger = logging.getLogger(__name__)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# A folder that was asked for this lately may still be read, here or by another process over the same disk.
READ_S = 60.0
# How often the folder itself is looked through; between that, what other processes put there is not known.
SCAN_S = 60.0
# Folders in use that one search for an unused one passes over.
_MOST_PASSED = 16
_SHA256_LENGTH = 64


class DiskCache:
    """Folders of adapters by content. Over `limit_bytes` the longest unused go, but none that may be in use.

    Any number of processes may share the folder. Thread-safe.
    """

    def __init__(self, blobs: Blobs, folder: Path, limit_bytes: int, *, now: Callable[[], float] = time.time) -> None:
        self._blobs = blobs
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._now = now
        self._lock = threading.Lock()
        # Bytes by sha256, least recently used first, as far as this process knows.
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._used_bytes = 0
        self._scanned_at: float | None = None
        self._hits = self._misses = self._fills = self._evictions = self._failures = 0
        self._fill_s = 0.0

    def fetch(self, ref: AdapterRef) -> Path:
        """The local folder of an adapter, as `fetch_adapter` makes it. May block.

        Where the disk itself has no room for it, unused ones go.
        """
        is_hit = (self._folder / ref.sha256).is_dir()
        started = time.monotonic()
        try:
            folder = self._fetch(ref)
            os.utime(folder, (self._now(), self._now()))
        except BaseException:
            with self._lock:
                self._misses += 1
                self._failures += 1
            raise
        with self._lock:
            if is_hit:
                self._hits += 1
            else:
                self._misses += 1
                self._fills += 1
                self._fill_s += time.monotonic() - started
            if self._scanned_at is None or self._now() - self._scanned_at >= SCAN_S:
                self._scan()
            self._put(ref.sha256, _size(folder))
            self._shrink(self._limit_bytes)
        return folder

    def drop(self, sha256: str) -> None:
        """Remove an adapter; absent is fine."""
        assert len(sha256) == _SHA256_LENGTH and sha256.isalnum()
        with self._lock:
            self._remove(sha256)

    def stats(self) -> TierStats:
        with self._lock:
            if self._scanned_at is None:
                self._scan()
            return TierStats(
                count=len(self._sizes),
                size_bytes=self._used_bytes,
                limit_bytes=self._limit_bytes,
                hits=self._hits,
                misses=self._misses,
                fills=self._fills,
                evictions=self._evictions,
                failures=self._failures,
                fill_s=self._fill_s,
            )

    def _fetch(self, ref: AdapterRef) -> Path:
        try:
            return fetch_adapter(self._blobs, ref, self._folder)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            logger.warning("the disk is full below the limit of the adapters on it: %s", self._folder)
            with self._lock:
                self._scan()
                has_freed = self._shrink(self._used_bytes - ref.size_bytes)
            if not has_freed:
                raise
        return fetch_adapter(self._blobs, ref, self._folder)

    def _scan(self) -> None:
        """Learn what is there."""
        self._scanned_at = self._now()
        paths = self._folder.iterdir() if self._folder.is_dir() else ()
        found = sorted((_used_at(path), path) for path in paths if len(path.name) == _SHA256_LENGTH)
        self._sizes = OrderedDict((path.name, _size(path)) for _, path in found)
        self._used_bytes = sum(self._sizes.values())

    def _put(self, sha256: str, size_bytes: int) -> None:
        self._used_bytes += size_bytes - self._sizes.get(sha256, 0)
        self._sizes[sha256] = size_bytes
        self._sizes.move_to_end(sha256)

    def _shrink(self, limit_bytes: int) -> bool:
        """Remove unused adapters down to a limit; whether there were any to remove."""
        num_passed = num_removed = 0
        while self._used_bytes > limit_bytes and num_passed < min(_MOST_PASSED, len(self._sizes)):
            oldest = next(iter(self._sizes))
            # The disk knows better than we do: another process may have used it since.
            if _used_at(self._folder / oldest) > self._now() - READ_S:
                self._sizes.move_to_end(oldest)
                num_passed += 1
                continue
            self._evictions += 1
            num_removed += 1
            self._remove(oldest)
        return num_removed > 0

    def _remove(self, sha256: str) -> None:
        self._used_bytes -= self._sizes.pop(sha256, 0)
        # Another process may be at the same; what is half gone is fetched again when it is asked for.
        shutil.rmtree(self._folder / sha256, ignore_errors=True)


def _size(folder: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            total += path.stat().st_size
    return total


def _used_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0
