"""Adapters on the local disk, within a limit: the tier between the blob store and the engines of this machine."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tuneloom.domain import AdapterRef
from tuneloom.store.artifacts import fetch_adapter
from tuneloom.store.base import Blobs

# A folder that was asked for this lately may still be read, here or by another process over the same disk.
READ_S = 600.0
_SHA256_LENGTH = 64


class DiskCache:
    """Folders of adapters by content. Over `limit_bytes` the longest unused go, but none that may be in use."""

    def __init__(self, blobs: Blobs, folder: Path, limit_bytes: int, *, now: Callable[[], float] = time.time) -> None:
        self._blobs = blobs
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._now = now

    def fetch(self, ref: AdapterRef) -> Path:
        """The local folder of an adapter, as `fetch_adapter` makes it. Thread-safe; may block."""
        folder = fetch_adapter(self._blobs, ref, self._folder)
        os.utime(folder, (self._now(), self._now()))
        self._shrink()
        return folder

    def _shrink(self) -> None:
        sizes = {path: _size(path) for path in self._folder.iterdir() if len(path.name) == _SHA256_LENGTH}
        excess = sum(sizes.values()) - self._limit_bytes
        if excess <= 0:
            return
        for used_at, path in sorted((_used_at(path), path) for path in sizes):
            if excess <= 0 or used_at > self._now() - READ_S:
                return
            # Another process may be at the same; what is half gone is fetched again when it is asked for.
            shutil.rmtree(path, ignore_errors=True)
            excess -= sizes[path]


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
