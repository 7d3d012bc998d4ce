import errno
from pathlib import Path
from typing import BinaryIO

import pytest

from tuneloom.domain import AdapterRef
from tuneloom.serve.disk import READ_S, SCAN_S, DiskCache
from tuneloom.store import open_blobs
from tuneloom.store.artifacts import ADAPTER_FILES, put_adapter
from tuneloom.store.base import BlobNotFound, Blobs


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return open_blobs(f"file:{tmp_path / 'blobs'}")


@pytest.fixture
def refs(blobs: Blobs, tiny_adapters: list[Path]) -> list[AdapterRef]:
    return [put_adapter(blobs, f"imports/{number}", folder) for number, folder in enumerate(tiny_adapters)]


def size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ADAPTER_FILES)


def test_the_longest_unused_adapters_leave_a_full_disk(
    blobs: Blobs, refs: list[AdapterRef], tiny_adapters: list[Path], tmp_path: Path
) -> None:
    now, room = 1e9, size(tiny_adapters[2]) + size(tiny_adapters[3])
    cache = DiskCache(blobs, tmp_path / "cache", room, now=lambda: now)
    for index in (0, 1, 0, 2, 3):
        now += 2 * READ_S
        assert cache.fetch(refs[index]).is_dir()

    assert {path.name for path in (tmp_path / "cache").glob("?" * 64)} == {refs[2].sha256, refs[3].sha256}
    assert cache.fetch(refs[0]).is_dir()


def test_an_adapter_that_may_be_in_use_stays_on_a_full_disk(
    blobs: Blobs, refs: list[AdapterRef], tmp_path: Path
) -> None:
    cache = DiskCache(blobs, tmp_path / "cache", limit_bytes=1)
    folders = [cache.fetch(ref) for ref in refs]
    assert all(folder.is_dir() for folder in folders)


def test_the_numbers_tell_hits_misses_bytes_and_evictions(
    blobs: Blobs, refs: list[AdapterRef], tiny_adapters: list[Path], tmp_path: Path
) -> None:
    now = 1e9
    cache = DiskCache(blobs, tmp_path / "cache", size(tiny_adapters[0]), now=lambda: now)
    for ref in (refs[0], refs[0], refs[1]):
        now += 2 * READ_S
        cache.fetch(ref)
    with pytest.raises(BlobNotFound):
        cache.fetch(refs[0].model_copy(update={"sha256": "0" * 64, "uri": "imports/none"}))
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.fills, stats.failures, stats.evictions) == (1, 3, 2, 1, 1)
    assert (stats.count, stats.size_bytes, stats.limit_bytes) == (1, size(tiny_adapters[1]), size(tiny_adapters[0]))


def test_what_another_process_put_there_counts_after_a_while_and_what_it_uses_stays(
    blobs: Blobs, refs: list[AdapterRef], tiny_adapters: list[Path], tmp_path: Path
) -> None:
    now, folder = 1e9, tmp_path / "cache"
    ours = DiskCache(blobs, folder, size(tiny_adapters[0]) + size(tiny_adapters[1]), now=lambda: now)
    theirs = DiskCache(blobs, folder, 1 << 30, now=lambda: now)
    ours.fetch(refs[0])
    theirs.fetch(refs[2])
    now += 2 * max(READ_S, SCAN_S)
    theirs.fetch(refs[0])
    ours.fetch(refs[1])
    assert {path.name for path in folder.glob("?" * 64)} == {refs[0].sha256, refs[1].sha256}


def test_a_dropped_adapter_is_fetched_again_when_it_is_asked_for(
    blobs: Blobs, refs: list[AdapterRef], tmp_path: Path
) -> None:
    cache = DiskCache(blobs, tmp_path / "cache", 1 << 30)
    folder = cache.fetch(refs[0])
    cache.drop(refs[0].sha256)
    cache.drop("0" * 64)
    assert not folder.exists() and cache.stats().size_bytes == 0
    assert cache.fetch(refs[0]) == folder


class FullDisk:
    """Blobs of a machine whose disk has room for `room` adapters."""

    def __init__(self, blobs: Blobs, folder: Path, room: int) -> None:
        self._blobs, self._folder, self._room = blobs, folder, room

    def open(self, key: str) -> BinaryIO:
        if len(list(self._folder.glob("?" * 64))) >= self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._blobs.open(key)


def test_a_disk_that_is_full_before_its_limit_gives_up_what_is_unused(
    blobs: Blobs, refs: list[AdapterRef], tmp_path: Path
) -> None:
    now, folder = 1e9, tmp_path / "cache"
    cache = DiskCache(FullDisk(blobs, folder, room=2), folder, 1 << 40, now=lambda: now)
    for ref in (refs[0], refs[1]):
        now += 2 * READ_S
        cache.fetch(ref)
    now += READ_S / 2
    assert cache.fetch(refs[2]).is_dir()
    assert {path.name for path in folder.glob("?" * 64)} == {refs[1].sha256, refs[2].sha256}
    with pytest.raises(OSError, match="No space left"):
        cache.fetch(refs[3])
    assert not list((folder / "drafts").iterdir()), "nothing half-written stays"
    assert all(cache.fetch(ref).is_dir() for ref in refs[1:3]), "what may be in use stays"
    now += 2 * READ_S
    assert cache.fetch(refs[3]).is_dir()
