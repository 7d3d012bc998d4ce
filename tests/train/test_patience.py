"""A run's blobs where the store goes away for a while."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parts import servers
from tests.parts.proxy import proxy
from tuneloom.errors import Overloaded
from tuneloom.store.base import BlobInfo
from tuneloom.store.gcs import GcsBlobs
from tuneloom.store.gcs_client import EMULATOR, Waits
from tuneloom.train.patience import PatientBlobs


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100_000)
    return path


CALLS: list[tuple[Callable[[PatientBlobs, Path], Any], Any]] = [
    (lambda blobs, path: blobs.write("a/new", path), None),
    (lambda blobs, path: blobs.write("a/new", b"bytes"), None),
    (lambda blobs, path: blobs.read("a/old"), b"old"),
    (lambda blobs, path: blobs.open("a/old").read(), b"old"),
    (lambda blobs, path: blobs.find("a/old"), BlobInfo("a/old", 3)),
    (lambda blobs, path: blobs.list("a"), [BlobInfo("a/old", 3)]),
    (lambda blobs, path: blobs.delete("a/old"), None),
]


@pytest.mark.parametrize(("call", "wanted"), CALLS)
def test_every_call_waits_for_a_store_that_comes_back(
    gcs_server: servers.Server, gcs_url: str, path: Path, monkeypatch: pytest.MonkeyPatch, call: Any, wanted: Any
) -> None:
    with proxy(gcs_server.port) as line:
        monkeypatch.setenv(EMULATOR, f"http://{line.address}")
        blobs = GcsBlobs.at(gcs_url, Waits(call_s=0.3, piece_s=0.3))
        blobs.write("a/old", b"old")
        line.set("refuse")
        pauses = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                line.set("forward")

        found = call(PatientBlobs(blobs, sleep=sleep), path)
        assert wanted is None or found == wanted
        assert len(pauses) == 2


def test_patience_ends(gcs_server: servers.Server, gcs_url: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(gcs_server.port) as line:
        monkeypatch.setenv(EMULATOR, f"http://{line.address}")
        line.set("refuse")
        with pytest.raises(Overloaded):
            PatientBlobs(GcsBlobs.at(gcs_url, Waits(call_s=0.3, piece_s=0.3)), patience_s=0).write("a", path)
