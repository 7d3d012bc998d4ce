import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tuneloom.domain import AdapterRef, Hyperparameters
from tuneloom.errors import AdapterRejected
from tuneloom.store import open_blobs
from tuneloom.store.artifacts import (
    ADAPTER_FILES,
    Manifest,
    fetch_adapter,
    put_adapter,
    read_manifest,
    write_manifest,
)
from tuneloom.store.base import BlobCorrupt, BlobExists, BlobInfo, BlobNotFound
from tuneloom.store.files import FileBlobs

PREFIX = "jobs/job/a1"


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "blobs")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in ADAPTER_FILES}


def test_an_adapter_comes_back_as_it_went_in(blobs: FileBlobs, cache: Path, tiny_adapters: list[Path]) -> None:
    ref = put_adapter(blobs, PREFIX, tiny_adapters[1])
    assert (ref.uri, ref.rank) == (PREFIX, 8)
    assert ref.size_bytes == (tiny_adapters[1] / "adapter_model.safetensors").stat().st_size
    folder = fetch_adapter(blobs, ref, cache)
    assert folder == cache / ref.sha256
    assert contents(folder) == contents(tiny_adapters[1])
    assert sorted(path.name for path in folder.iterdir()) == sorted(ADAPTER_FILES)


def test_the_same_adapter_is_put_twice_and_is_one(blobs: FileBlobs, tiny_adapters: list[Path]) -> None:
    assert put_adapter(blobs, PREFIX, tiny_adapters[0]) == put_adapter(blobs, PREFIX, tiny_adapters[0])
    elsewhere = put_adapter(blobs, "jobs/job/a2", tiny_adapters[0])
    assert elsewhere.sha256 == put_adapter(blobs, PREFIX, tiny_adapters[0]).sha256


def test_another_adapter_in_its_place_is_refused(blobs: FileBlobs, tiny_adapters: list[Path]) -> None:
    put_adapter(blobs, PREFIX, tiny_adapters[0])
    with pytest.raises(BlobExists):
        put_adapter(blobs, PREFIX, tiny_adapters[2])


def test_a_folder_without_weights_is_not_put(blobs: FileBlobs, tmp_path: Path, tiny_adapters: list[Path]) -> None:
    folder = shutil.copytree(tiny_adapters[0], tmp_path / "broken")
    (folder / "adapter_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(AdapterRejected):
        put_adapter(blobs, PREFIX, folder)
    assert blobs.list("jobs") == []


class Counting:
    """Blobs that count what is opened."""

    def __init__(self, blobs: FileBlobs) -> None:
        self.blobs = blobs
        self.opened: list[str] = []

    def open(self, key: str) -> Any:
        self.opened.append(key)
        return self.blobs.open(key)


def test_a_cached_adapter_is_not_downloaded_again(blobs: FileBlobs, cache: Path, tiny_adapters: list[Path]) -> None:
    ref = put_adapter(blobs, PREFIX, tiny_adapters[0])
    counting: Any = Counting(blobs)
    for _ in range(3):
        fetch_adapter(counting, ref, cache)
    assert len(counting.opened) == 2


@pytest.mark.parametrize("damage", ["one bit", "truncated", "longer", "other config"])
def test_corrupt_bytes_are_refused_and_nothing_is_kept(
    blobs: FileBlobs, tmp_path: Path, cache: Path, tiny_adapters: list[Path], damage: str
) -> None:
    ref = put_adapter(blobs, PREFIX, tiny_adapters[0])
    path = tmp_path / "blobs/data" / PREFIX / ("adapter_config.json" if "config" in damage else ADAPTER_FILES[1])
    data = bytearray(path.read_bytes())
    match damage:
        case "one bit":
            data[-1] ^= 1
        case "truncated":
            del data[-100:]
        case "longer":
            data += b"\0"
        case "other config":
            data[-1:] = b" }"
    path.write_bytes(data)
    with pytest.raises(BlobCorrupt):
        fetch_adapter(blobs, ref, cache)
    assert list(cache.rglob("*")) == [cache / "drafts"]


def test_a_missing_blob_is_said_and_nothing_is_kept(blobs: FileBlobs, cache: Path, tiny_adapters: list[Path]) -> None:
    ref = put_adapter(blobs, PREFIX, tiny_adapters[0])
    blobs.delete(f"{PREFIX}/adapter_model.safetensors")
    with pytest.raises(BlobNotFound):
        fetch_adapter(blobs, ref, cache)
    assert list(cache.rglob("*")) == [cache / "drafts"]


@pytest.mark.parametrize("state", ["empty", "half", "without config", "a file"])
def test_a_broken_cache_folder_is_replaced(
    blobs: FileBlobs, cache: Path, tiny_adapters: list[Path], state: str
) -> None:
    ref = put_adapter(blobs, PREFIX, tiny_adapters[0])
    target = cache / ref.sha256
    if state == "a file":
        cache.mkdir()
        target.write_bytes(b"?")
    else:
        target.mkdir(parents=True)
    if state in ("half", "without config"):
        shutil.copy(tiny_adapters[0] / ADAPTER_FILES[1], target)
    if state == "half":
        shutil.copy(tiny_adapters[0] / ADAPTER_FILES[0], target)
        os.truncate(target / ADAPTER_FILES[1], 10)
    assert contents(fetch_adapter(blobs, ref, cache)) == contents(tiny_adapters[0])


def test_a_hash_is_not_a_path(blobs: FileBlobs, cache: Path) -> None:
    for sha256 in ("../../etc", "A" * 64, "0" * 63, ""):
        with pytest.raises(BlobCorrupt):
            fetch_adapter(blobs, AdapterRef(sha256=sha256, uri=PREFIX, rank=1, size_bytes=1), cache)


def test_many_threads_and_processes_fetch_one_adapter_into_one_cache(
    blobs: FileBlobs, tmp_path: Path, cache: Path, tiny_adapters: list[Path]
) -> None:
    ref = put_adapter(blobs, PREFIX, tiny_adapters[0])
    args = (f"file:{tmp_path / 'blobs'}", ref, cache)
    children = [multiprocessing.get_context("spawn").Process(target=fetch_in_threads, args=args) for _ in range(2)]
    for child in children:
        child.start()
    fetch_in_threads(*args)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert contents(cache / ref.sha256) == contents(tiny_adapters[0])
    assert list((cache / "drafts").iterdir()) == []


def fetch_in_threads(url: str, ref: AdapterRef, cache: Path) -> None:
    blobs = open_blobs(url)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: fetch_adapter(blobs, ref, cache), range(16)))
    assert set(folders) == {cache / ref.sha256}


def test_a_manifest_comes_back_and_is_final(blobs: FileBlobs) -> None:
    assert read_manifest(blobs, PREFIX) is None
    manifest = Manifest(
        job_id="job",
        attempt=1,
        base="tiny/llama",
        adapter=AdapterRef(sha256="0" * 64, uri=PREFIX, rank=4, size_bytes=1),
        resolved=Hyperparameters(n_epochs=1, batch_size=2, learning_rate_multiplier=1.0),
        trained_tokens=10,
        steps=3,
        metrics={"train_loss": 0.5},
        created_at=1.5,
    )
    write_manifest(blobs, PREFIX, manifest)
    write_manifest(blobs, PREFIX, manifest)
    assert read_manifest(blobs, PREFIX) == manifest
    with pytest.raises(BlobExists):
        write_manifest(blobs, PREFIX, manifest.model_copy(update={"steps": 4}))
    assert [info.key for info in blobs.list("jobs")] == [f"{PREFIX}/manifest.json"]


def test_a_manifest_that_cannot_be_read_is_corrupt(blobs: FileBlobs) -> None:
    blobs.write(f"{PREFIX}/manifest.json", b'{"job_id": 1}')
    with pytest.raises(BlobCorrupt, match=PREFIX):
        read_manifest(blobs, PREFIX)
    assert blobs.list(PREFIX) == [BlobInfo(f"{PREFIX}/manifest.json", 13)]
