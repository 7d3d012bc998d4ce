"""What only a bucket meets: a network between, others who write, a server that refuses, is slow or goes away."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.parts import servers
from tests.parts.front import Front, front
from tests.parts.proxy import Proxy, proxy
from tests.store.contract import BlobsContract
from tuneloom.errors import InvalidRequest, Overloaded, TuneloomError
from tuneloom.store import open_blobs
from tuneloom.store.base import BlobCorrupt, BlobExists, BlobInfo, BlobNotFound
from tuneloom.store.gcs import UPLOAD_BYTES, GcsBlobs
from tuneloom.store.gcs_client import EMULATOR, ROLE, Waits
from tuneloom.store.gcs_reader import PIECE_BYTES

# As `open_blobs` waits, but not as long.
WAITS = Waits(call_s=1.0, piece_s=5.0)
SLACK_S = 20.0


class TestGcsBlobs(BlobsContract):
    @pytest.fixture
    def blobs_url(self, gcs_url: str) -> str:
        return gcs_url


@pytest.fixture
def blobs(gcs_url: str) -> GcsBlobs:
    return GcsBlobs.at(gcs_url, WAITS)


@pytest.fixture
def spoiled(gcs_server: servers.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """What stands between the server and a `GcsBlobs` that is first used from now on."""
    with front(gcs_server.port) as made:
        monkeypatch.setenv(EMULATOR, f"http://{made.address}")
        yield made


@pytest.fixture
def line(gcs_server: servers.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxy(gcs_server.port) as made:
        monkeypatch.setenv(EMULATOR, f"http://{made.address}")
        yield made


@pytest.fixture
def put(gcs_server: servers.Server, gcs_url: str) -> Iterator[Callable[..., None]]:
    """Another program that writes an object of the bucket, whatever is there."""
    bucket, prefix = gcs_url.removeprefix("gs://").split("/")
    client = httpx.Client(base_url=f"http://{gcs_server.address}", timeout=30, trust_env=False)

    def put(key: str, data: bytes, **metadata: str) -> None:
        parts = (json.dumps({"name": f"{prefix}/{key}", "metadata": metadata}).encode(), data)
        body = b"".join(b"--x\r\ncontent-type: application/json\r\n\r\n" + part + b"\r\n" for part in parts) + b"--x--"
        path, kind = f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart", "multipart/related; boundary=x"
        client.post(path, content=body, headers={"content-type": kind}).raise_for_status()

    with client:
        yield put


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def calls(blobs: GcsBlobs) -> list[Callable[[], Any]]:
    return [
        lambda: blobs.write("a", b"x"),
        lambda: blobs.open("a"),
        lambda: blobs.read("a"),
        lambda: blobs.find("a"),
        lambda: blobs.list("a"),
        lambda: list(blobs.walk()),
        lambda: blobs.delete("a"),
    ]


def test_files_and_buckets_answer_to_the_same_tests() -> None:
    collected = [
        set(collect(f"tests/store/{file}::{name}"))
        for file, name in (("test_files.py", "TestFileBlobs"), ("test_gcs.py", "TestGcsBlobs"))
    ]
    assert collected[0] == collected[1]
    assert len(collected[0]) >= 50


def collect(node: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", node]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    return [line.partition("::")[2].partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize(
    ("url", "wanted"), [("gs://bucket", ""), ("gs://bucket/", ""), ("gs://b.c-d_e/a/b", "a/b/"), ("gs://abc/x/", "x/")]
)
def test_a_url_names_a_bucket_and_what_its_names_begin_with(url: str, wanted: str) -> None:
    found = open_blobs(url)
    assert isinstance(found, GcsBlobs) and found._root == wanted


@pytest.mark.parametrize(
    "url", ["gs:bucket", "gs:/bucket", "gs://", "gs:///x", "gs://B", "gs://abc/a//b", "gs://abc/.."]
)
def test_a_url_that_names_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        open_blobs(url)
    assert error.value.param == "blobs_url" or "gs://" in error.value.message


def test_two_installations_share_a_bucket_by_their_prefixes(gcs_url: str) -> None:
    one, two = (open_blobs(f"{gcs_url}/{name}") for name in ("one", "two"))
    one.write("a", b"1")
    two.write("a", b"2")
    assert (one.read("a"), two.read("a")) == (b"1", b"2")
    assert list(one.walk()) == [BlobInfo("a", 1)]


def test_what_is_no_blob_of_ours_is_passed_over(blobs: GcsBlobs, put: Callable[..., None]) -> None:
    blobs.write("a/b", b"x")
    put("a/", b"")
    put("a/what a name", b"x")
    assert blobs.list("a") == list(blobs.walk()) == [BlobInfo("a/b", 1)]


# --- hashes ---


def test_the_hash_of_a_blob_stands_beside_it(blobs: GcsBlobs) -> None:
    blobs.write("a", b"hello")
    assert blobs._get("a").metadata == {"sha256": BlobsContract.HELLO}


@pytest.mark.parametrize("size", [5, PIECE_BYTES + 5])
def test_bytes_that_are_not_those_that_were_stored_are_not_given_out(
    blobs: GcsBlobs, put: Callable[..., None], size: int
) -> None:
    put("a", noise(size), sha256=sha256(noise(size, seed=1)))
    with pytest.raises(BlobCorrupt, match="hash to"):
        blobs.read("a")
    with pytest.raises(BlobCorrupt), blobs.open("a") as file:
        while file.read(1 << 20):
            pass


def test_a_blob_that_another_program_has_stored_is_read_and_compared(blobs: GcsBlobs, put: Callable[..., None]) -> None:
    put("a", b"hello")
    assert blobs.read("a") == b"hello"
    assert blobs.write("a", b"hello") == BlobsContract.HELLO
    with pytest.raises(BlobExists):
        blobs.write("a", b"hellO")


@pytest.mark.parametrize("size", [5_000, UPLOAD_BYTES + 5])
def test_a_bit_that_turns_on_the_way_is_noticed_and_the_blob_sent_again(
    blobs: GcsBlobs, spoiled: Front, size: int
) -> None:
    data = noise(size)
    spoiled.spoil("PUT" if size > UPLOAD_BYTES else "POST", "flip")
    assert blobs.write("a", data) == sha256(data)
    assert blobs.read("a") == data
    deletes = [request for request in spoiled.requests if request.startswith("DELETE")]
    assert len(spoiled.struck) == len(deletes) == 1 and "ifGenerationMatch=" in deletes[0]


def test_a_line_that_spoils_every_try_leaves_nothing(blobs: GcsBlobs, spoiled: Front) -> None:
    spoiled.spoil("POST", "flip", times=3)
    with pytest.raises(Overloaded, match="3 tries"):
        blobs.write("a", noise(5_000))
    assert blobs.find("a") is None and len(spoiled.struck) == 3


@pytest.mark.parametrize("size", [5_000, UPLOAD_BYTES + 5])
def test_bytes_that_google_refuses_are_sent_again(blobs: GcsBlobs, spoiled: Front, size: int) -> None:
    """It holds what arrives against the checksum that was told before, and answers 400."""
    data = noise(size)
    spoiled.spoil("PUT" if size > UPLOAD_BYTES else "POST", 400)
    assert blobs.write("a", data) == sha256(data)
    (told,) = {match[1] for body in spoiled.bodies for match in re.finditer(rb'"crc32c": *"([^"]+)"', body)}
    assert told.decode() == blobs._get("a").crc32c


@pytest.mark.parametrize("size", [6, UPLOAD_BYTES + 6])
def test_a_file_that_changes_while_it_is_stored_is_not_kept(
    blobs: GcsBlobs, spoiled: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(size))
    upload = GcsBlobs._create

    def change(*arguments: Any) -> bool:
        path.write_bytes(noise(size, seed=1))
        return upload(*arguments)

    monkeypatch.setattr(GcsBlobs, "_create", change)
    with pytest.raises(BlobCorrupt, match="changed while"):
        blobs.write("a", path)
    assert blobs.find("a") is None


# --- reading ---


def test_a_large_blob_is_read_from_anywhere(blobs: GcsBlobs) -> None:
    data = noise(2 * PIECE_BYTES + 1000)
    blobs.write("a", data)
    chooser = random.Random(1)
    with blobs.open("a") as file:
        for _ in range(8):
            start, count = chooser.randrange(len(data)), chooser.randrange(100_000)
            assert file.seek(start) == start
            assert file.read(count) == data[start : start + count]
        assert file.seek(-7, os.SEEK_END) == len(data) - 7
        assert file.read() == data[-7:]
        file.seek(0)
        assert file.read() == data
        file.seek(len(data) + 1)
        assert file.read() == b""


def test_lines_are_read_as_from_a_file(blobs: GcsBlobs) -> None:
    lines = [b"%d\n" % i * 50 for i in range(3000)]
    blobs.write("a", b"".join(lines))
    with blobs.open("a") as file:
        assert b"".join(file) == b"".join(lines)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_large_blob_that_goes_while_it_is_read_is_said_to_be_gone(blobs: GcsBlobs, is_replaced: bool) -> None:
    size = 2 * PIECE_BYTES
    blobs.write("a", noise(size))
    with blobs.open("a") as file:
        first = file.read(1000)
        blobs.delete("a")
        if is_replaced:
            blobs.write("a", noise(size, seed=1))
        with pytest.raises(BlobNotFound):
            file.read()
    assert first == noise(1000)


def test_an_answer_that_is_cut_is_read_on_from_there(blobs: GcsBlobs, spoiled: Front) -> None:
    data = noise(3_000_000)
    blobs.write("a", data)
    spoiled.spoil("alt=media", "cut_answer", times=2)
    assert blobs.read("a") == data
    assert len(spoiled.struck) == 2


def test_thousands_are_listed_page_by_page_in_order(
    blobs: GcsBlobs, spoiled: Front, put: Callable[..., None], gcs_server: servers.Server, gcs_url: str
) -> None:
    keys = [f"a/{i:05d}" for i in range(2100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: put(key, b"x"), random.Random(0).sample(keys, len(keys))))
    assert [info.key for info in blobs.list("a")] == keys
    assert len(spoiled.requests) == 3
    walk = blobs.walk()
    assert next(walk) == BlobInfo("a/00000", 1)
    assert len(spoiled.requests) == 4


# --- writing over a bad line ---


def test_every_write_is_for_a_new_object_only(blobs: GcsBlobs, spoiled: Front, tmp_path: Path) -> None:
    blobs.write("small", b"x")
    blobs.write("large", noise(PIECE_BYTES + 1))
    posts = [request for request in spoiled.requests if request.startswith("POST")]
    assert len(posts) == 2 and all("ifGenerationMatch=0" in post for post in posts)


def test_a_delete_is_for_the_object_that_was_seen_only(blobs: GcsBlobs, spoiled: Front) -> None:
    blobs.write("a", b"x")
    generation = blobs._get("a").generation
    blobs.delete("a")
    assert spoiled.requests[-1].startswith("DELETE") and f"ifGenerationMatch={generation}" in spoiled.requests[-1]


@pytest.mark.parametrize("size", [5, UPLOAD_BYTES + 5])
@pytest.mark.parametrize("fault", [503, 429, "cut_request", "lose_answer"])
def test_a_write_gets_through_passing_faults(blobs: GcsBlobs, spoiled: Front, fault: Any, size: int) -> None:
    data = noise(size)
    pieces = (data[start : start + 100_000] for start in range(0, size, 100_000))
    spoiled.spoil("/upload/", fault)
    spoiled.spoil("PUT /upload/", fault)
    assert blobs.write("a", pieces) == sha256(data)
    assert blobs.read("a") == data
    assert len(spoiled.struck) == (2 if size > UPLOAD_BYTES else 1)


def test_a_large_upload_that_is_cut_goes_on_where_it_was(blobs: GcsBlobs, spoiled: Front, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(4 * UPLOAD_BYTES - 10))
    spoiled.spoil("PUT", "pass", times=2)
    spoiled.spoil("PUT", "cut_request")
    blobs.write("a", path)
    puts = [request for request in spoiled.requests if request.startswith("PUT")]
    assert len(puts) == 4 + 1 and len(set(puts)) == 1
    with blobs.open("a") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == sha256(path.read_bytes())


@pytest.mark.parametrize("fault", [410, 308, "less"])
def test_an_upload_of_which_the_server_has_less_than_was_sent_begins_anew(
    blobs: GcsBlobs, spoiled: Front, fault: Any
) -> None:
    """Its session is gone; or it goes on, and of the bytes that were sent none or the first alone have arrived."""
    data = noise(2 * UPLOAD_BYTES)
    spoiled.spoil("PUT", fault)
    blobs.write("a", data)
    assert blobs.read("a") == data


def test_an_upload_that_is_always_forgotten_is_given_up(blobs: GcsBlobs, spoiled: Front) -> None:
    data = noise(2 * UPLOAD_BYTES)
    spoiled.spoil("PUT", 404, times=10)
    with pytest.raises(Overloaded, match="3 tries"):
        blobs.write("b", data)
    assert blobs.find("b") is None


def test_a_process_killed_in_the_middle_of_an_upload_leaves_no_object(
    blobs: GcsBlobs, gcs_url: str, spoiled: Front, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(3 * UPLOAD_BYTES))
    spoiled.spoil("PUT", "pass")
    spoiled.spoil("PUT", "stall")
    code = "import sys; from pathlib import Path; from tuneloom.store import open_blobs; "
    code += "open_blobs(sys.argv[1]).write('a/b', Path(sys.argv[2]))"
    child = subprocess.Popen([sys.executable, "-c", code, gcs_url, str(path)])
    try:
        deadline = time.monotonic() + 60
        while len(spoiled.struck) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(spoiled.struck) == 2
    finally:
        child.kill()
        child.wait(10)
    assert blobs.find("a/b") is None
    assert blobs.list("a") == []
    blobs.write("a/b", b"later")
    assert blobs.read("a/b") == b"later"


def test_a_delete_whose_answer_is_lost_is_done(blobs: GcsBlobs, spoiled: Front) -> None:
    blobs.write("a", b"x")
    spoiled.spoil("DELETE", "lose_answer")
    blobs.delete("a")
    assert blobs.find("a") is None


# --- who does not answer ---


@pytest.mark.parametrize("mode", ["refuse", "hang"])
def test_a_server_that_does_not_answer_is_waited_for_a_while(blobs: GcsBlobs, line: Proxy, mode: Any) -> None:
    blobs.write("a", b"x")
    line.set(mode)
    for call in calls(blobs):
        started = time.monotonic()
        with pytest.raises(Overloaded) as error:
            call()
        assert error.value.retry_after_s
        assert time.monotonic() - started < WAITS.call_s * 2 + SLACK_S
    line.set("forward")
    assert blobs.read("a") == b"x"


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_is_busy_for_long_is_told_as_overloaded(gcs_url: str, spoiled: Front, status: int) -> None:
    spoiled.spoil("/", status, times=1000)
    with pytest.raises(Overloaded) as error:
        GcsBlobs.at(gcs_url, Waits(call_s=4.0)).find("a")
    assert error.value.retry_after_s
    assert len(spoiled.requests) > 1


def test_a_slow_line_only_takes_longer(blobs: GcsBlobs, line: Proxy) -> None:
    line.set("delay", 0.3)
    blobs.write("a", noise(100_000))
    assert blobs.read("a") == noise(100_000)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_the_bucket_and_the_role(blobs: GcsBlobs, spoiled: Front, gcs_url: str, status: int) -> None:
    spoiled.spoil("/", status, times=100)
    bucket = gcs_url.removeprefix("gs://").partition("/")[0]
    for number, call in enumerate(calls(blobs), 1):
        with pytest.raises(TuneloomError) as error:
            call()
        assert bucket in error.value.message and ROLE in error.value.message
        assert len(spoiled.requests) == number


def test_an_answer_that_nobody_expects_is_told_with_its_status(blobs: GcsBlobs, spoiled: Front) -> None:
    spoiled.spoil("/upload/", 400, times=3)
    with pytest.raises(Overloaded, match="3 tries"):
        blobs.write("a", b"x")
    spoiled.spoil("/", 400, times=100)
    for call in calls(blobs)[1:]:
        with pytest.raises(TuneloomError, match="answered 400"):
            call()


def test_an_absent_bucket_is_named(gcs_server: servers.Server) -> None:
    for call in calls(GcsBlobs("no-such-bucket", "home", WAITS)):
        with pytest.raises(TuneloomError, match="no bucket `no-such-bucket`"):
            call()


def test_without_credentials_the_ways_to_them_are_named(tmp_path: Path) -> None:
    code = "from tuneloom.store import open_blobs; open_blobs('gs://bucket').find('a')"
    environment = {name: value for name, value in os.environ.items() if name != EMULATOR}
    environment |= {"HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path), "NO_GCE_CHECK": "true"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert "no Google credentials" in done.stderr and "`bucket`" in done.stderr


def test_no_google_package_is_loaded_for_files(tmp_path: Path) -> None:
    code = "import sys; from tuneloom.store import open_blobs; open_blobs('file:' + sys.argv[1]).write('a', b'x'); "
    code += "print(*(name for name in sys.modules if name.startswith('google')))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not {"google.cloud", "google.auth"} & set(done.stdout.split())


# --- processes ---


def test_a_fork_speaks_over_connections_of_its_own(blobs: GcsBlobs) -> None:
    blobs.write("a", b"parent")
    children = [multiprocessing.get_context("fork").Process(target=come_and_go, args=(blobs, i)) for i in range(2)]
    for child in children:
        child.start()
    come_and_go(blobs, 2)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert blobs.read("a") == b"parent"


def come_and_go(blobs: GcsBlobs, number: int) -> None:
    for i in range(20):
        blobs.write(f"{number}/{i}", b"%d" % number)
        assert blobs.read(f"{number}/{i}") == b"%d" % number


def test_a_large_blob_passes_in_little_memory(gcs_url: str, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "bench.blobs", "--url", gcs_url, "--mb", "256", "--json", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    (growth,) = json.loads(found.read_text())["ratios"]
    assert growth["unit"] == " MB" and growth["wanted"] == 100 and growth["is_met"], growth
