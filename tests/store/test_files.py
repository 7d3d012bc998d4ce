import os
import time
from pathlib import Path

import pytest

from tests.store.contract import BlobsContract
from tuneloom.errors import InvalidRequest, TuneloomError
from tuneloom.store.base import BlobNotFound
from tuneloom.store.files import STALE_DRAFT_S, FileBlobs


class TestFileBlobs(BlobsContract):
    @pytest.fixture
    def blobs_url(self, tmp_path: Path) -> str:
        return f"file:{tmp_path / 'home' / 'blobs'}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.mkdir()
    (path / "secret").write_bytes(b"secret")
    return path


def test_a_blob_is_a_plain_file_named_by_its_key(folder: Path) -> None:
    FileBlobs(folder).write("jobs/x/manifest.json", b"{}")
    assert (folder / "data/jobs/x/manifest.json").read_bytes() == b"{}"
    assert list((folder / "drafts").iterdir()) == []


def test_what_is_no_blob_of_ours_is_passed_over(folder: Path) -> None:
    blobs = FileBlobs(folder)
    blobs.write("a/b", b"x")
    (folder / "data/a/what a name").write_bytes(b"x")
    assert [info.key for info in blobs.list("a")] == [info.key for info in blobs.walk()] == ["a/b"]


def test_a_link_in_the_place_of_a_blob_is_not_followed(folder: Path, outside: Path) -> None:
    blobs = FileBlobs(folder)
    (folder / "data/a").symlink_to(outside / "secret")
    assert blobs.find("a") is None
    with pytest.raises(TuneloomError):
        blobs.read("a")
    with pytest.raises(TuneloomError):
        blobs.write("a", b"x")
    blobs.delete("a")
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_link_in_the_place_of_a_folder_is_not_followed(folder: Path, outside: Path) -> None:
    blobs = FileBlobs(folder)
    (folder / "data/a").symlink_to(outside)
    for call in (blobs.read, blobs.find, blobs.delete, lambda key: blobs.write(key, b"x")):
        with pytest.raises(TuneloomError, match="symbolic link"):
            call("a/secret")
    assert blobs.list("a") == []
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_a_pipe_in_the_place_of_a_blob_does_not_block(folder: Path) -> None:
    blobs = FileBlobs(folder)
    os.mkfifo(folder / "data/a")
    with pytest.raises(BlobNotFound):
        blobs.read("a")


def test_a_key_inside_or_above_another_is_refused(folder: Path) -> None:
    blobs = FileBlobs(folder)
    blobs.write("a/b", b"x")
    for key in ("a", "a/b/c", "a/b/c/d"):
        with pytest.raises(InvalidRequest, match="another blob"):
            blobs.write(key, b"x")
    assert [info.key for info in blobs.list("a")] == ["a/b"]


def test_deleting_the_last_blob_of_a_folder_removes_the_folder(folder: Path) -> None:
    blobs = FileBlobs(folder)
    blobs.write("a/b/c/d", b"x")
    blobs.write("a/e", b"x")
    blobs.delete("a/b/c/d")
    assert [path.name for path in (folder / "data/a").iterdir()] == ["e"]
    blobs.delete("a/e")
    assert list((folder / "data").iterdir()) == []


def test_drafts_of_dead_writers_are_removed_a_day_later(folder: Path) -> None:
    FileBlobs(folder)
    old, fresh = folder / "drafts/old", folder / "drafts/fresh"
    for path in (old, fresh):
        path.write_bytes(b"half")
    past = time.time() - STALE_DRAFT_S - 60
    os.utime(old, (past, past))
    FileBlobs(folder)
    assert list((folder / "drafts").iterdir()) == [fresh]
