from pathlib import Path

import pytest

from tuneloom.domain import AdapterRef
from tuneloom.serve.disk import READ_S, DiskCache
from tuneloom.store import open_blobs
from tuneloom.store.artifacts import ADAPTER_FILES, put_adapter
from tuneloom.store.base import Blobs


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
