"""What every `Blobs` must do."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.store.contract.processes import PROCESS_TIMEOUT_S, SPAWN
from tuneloom.errors import InvalidRequest
from tuneloom.store import open_blobs
from tuneloom.store.base import BlobCorrupt, BlobExists, BlobInfo, BlobNotFound, Blobs


class BlobsContract:
    @pytest.fixture
    def blobs(self, blobs_url: str) -> Blobs:
        return open_blobs(blobs_url)

    HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"

    @pytest.mark.parametrize("kind", ["bytes", "file", "pieces"])
    def test_a_blob_is_read_as_it_was_written(self, blobs: Blobs, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "source"
        path.write_bytes(b"hello")
        source: Any = {"bytes": b"hello", "file": path, "pieces": iter([b"he", b"", b"llo"])}[kind]
        assert blobs.write("a/b", source) == self.HELLO
        assert blobs.read("a/b") == b"hello"
        assert blobs.find("a/b") == BlobInfo("a/b", 5)

    @pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, 3_000_001])
    def test_a_blob_may_have_any_size(self, blobs: Blobs, size: int) -> None:
        data = (b"0123456789abcdef!" * (size // 17 + 1))[:size]
        blobs.write("a", data)
        assert blobs.read("a") == data
        assert blobs.find("a") == BlobInfo("a", size)

    def test_an_open_blob_can_seek(self, blobs: Blobs) -> None:
        blobs.write("a", b"hello")
        with blobs.open("a") as file:
            assert file.seekable()
            assert file.read(2) == b"he"
            file.seek(-1, os.SEEK_END)
            assert file.read() == b"o"
            file.seek(0)
            assert file.read() == b"hello"

    def test_an_absent_blob_is_said_to_be_absent(self, blobs: Blobs) -> None:
        blobs.write("a/b/c", b"x")
        for key in ("z", "a", "a/b", "a/z/c"):
            assert blobs.find(key) is None
            with pytest.raises(BlobNotFound):
                blobs.open(key)
            with pytest.raises(BlobNotFound):
                blobs.read(key)

    def test_writing_the_same_bytes_again_changes_nothing(self, blobs: Blobs) -> None:
        assert blobs.write("a", b"hello") == blobs.write("a", iter([b"hello"])) == self.HELLO
        assert blobs.read("a") == b"hello"

    @pytest.mark.parametrize("other", [b"", b"hellO", b"hello!"])
    def test_a_blob_never_changes(self, blobs: Blobs, other: bytes) -> None:
        blobs.write("a", b"hello")
        with pytest.raises(BlobExists):
            blobs.write("a", other)
        assert blobs.read("a") == b"hello"

    def test_bytes_that_are_not_the_promised_ones_are_not_kept(self, blobs: Blobs) -> None:
        with pytest.raises(BlobCorrupt):
            blobs.write("a", b"hellO", sha256=self.HELLO)
        assert blobs.find("a") is None
        assert blobs.write("a", b"hello", sha256=self.HELLO) == self.HELLO

    def test_a_source_that_fails_leaves_nothing(self, blobs: Blobs) -> None:
        def source() -> Iterator[bytes]:
            yield b"x" * 3_000_000
            raise OSError("the client went away")

        with pytest.raises(OSError, match="went away"):
            blobs.write("a/b", source())
        assert blobs.find("a/b") is None
        assert blobs.list("a") == []
        blobs.write("a/b", b"later")

    def test_a_list_is_what_is_under_a_prefix_by_key(self, blobs: Blobs) -> None:
        for key in ("a/c", "a/b/2", "a/b/10", "a/b-", "ab/x", "a.b/x", "b"):
            blobs.write(key, key.encode())
        assert [info.key for info in blobs.list("a")] == ["a/b-", "a/b/10", "a/b/2", "a/c"]
        assert blobs.list("a/b") == [BlobInfo("a/b/10", 6), BlobInfo("a/b/2", 5)]
        assert blobs.list("b") == blobs.list("nothing") == blobs.list("a/nothing") == []

    def test_a_walk_passes_every_blob_by_key(self, blobs: Blobs) -> None:
        assert list(blobs.walk()) == []
        keys = ["a-", "a.b/x", "a/b-", "a/b/10", "a/b/2", "a/c", "ab/x", "b"]
        for key in reversed(keys):
            blobs.write(key, key.encode())
        assert list(blobs.walk()) == [BlobInfo(key, len(key)) for key in keys]

    def test_a_deleted_blob_is_gone_and_its_key_is_free(self, blobs: Blobs) -> None:
        blobs.write("a/b/c", b"x")
        blobs.write("a/d", b"x")
        blobs.delete("a/b/c")
        blobs.delete("a/b/c")
        blobs.delete("never/was")
        assert [info.key for info in blobs.list("a")] == ["a/d"]
        blobs.write("a/b/c", b"y")
        assert blobs.read("a/b/c") == b"y"

    def test_a_reader_keeps_what_it_opened(self, blobs: Blobs) -> None:
        blobs.write("a", b"hello")
        with blobs.open("a") as file:
            blobs.delete("a")
            blobs.write("a", b"other")
            assert file.read() == b"hello"

    @pytest.mark.parametrize("key", ["a", "A-b_c.d", "...", "a..b", ".a", "a.", "-", "1/2/3/4/5/6/7/8", "x" * 255])
    def test_a_key_may_be(self, blobs: Blobs, key: str) -> None:
        blobs.write(key, b"x")
        assert blobs.read(key) == b"x"

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "/",
            "/a",
            "a/",
            "a//b",
            ".",
            "..",
            "../a",
            "a/../b",
            "a/./b",
            "a/..",
            "a b",
            "a\\b",
            "a\n",
            "\n",
            "é",
            "a\0",
            "~/a:b",
            "1/2/3/4/5/6/7/8/9",
            "x" * 256,
        ],
    )
    def test_a_key_may_not_be(self, blobs: Blobs, key: str) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: blobs.write(key, b"x"),
            lambda: blobs.open(key),
            lambda: blobs.read(key),
            lambda: blobs.find(key),
            lambda: blobs.list(key),
            lambda: blobs.delete(key),
        ]
        for call in calls:
            with pytest.raises(InvalidRequest):
                call()

    def test_only_one_of_many_writers_wins_a_key(self, blobs: Blobs) -> None:
        barrier = threading.Barrier(8)

        def write(writer: int) -> bool:
            barrier.wait(timeout=PROCESS_TIMEOUT_S)
            try:
                blobs.write("a/b/c", f"writer {writer}".encode() * 1000)
            except BlobExists:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert won.count(True) == 1
        assert blobs.read("a/b/c") == f"writer {won.index(True)}".encode() * 1000

    def test_writing_and_deleting_side_by_side_disturbs_neither(self, blobs: Blobs) -> None:
        def come_and_go(writer: int) -> None:
            for i in range(20):
                blobs.write(f"a/b/{writer}", f"{i}".encode())
                assert blobs.read(f"a/b/{writer}") == f"{i}".encode()
                blobs.list("a")
                blobs.delete(f"a/b/{writer}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(come_and_go, range(4)))
        assert blobs.list("a") == []

    def test_a_writer_killed_half_way_leaves_nothing(self, blobs: Blobs, blobs_url: str) -> None:
        receiver, sender = SPAWN.Pipe(duplex=False)
        child = SPAWN.Process(target=write_endlessly, args=(blobs_url, sender))
        child.start()
        for _ in range(3):
            assert receiver.poll(PROCESS_TIMEOUT_S), "the writer is silent"
            receiver.recv()
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(PROCESS_TIMEOUT_S)
        assert blobs.find("a/b") is None
        assert blobs.list("a") == []
        assert blobs.write("a/b", b"hello") == self.HELLO


def write_endlessly(url: str, sender: Any) -> None:
    def source() -> Iterator[bytes]:
        while True:
            sender.send(None)
            yield b"x" * (1 << 20)

    open_blobs(url).write("a/b", source())
