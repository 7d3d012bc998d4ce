import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.store.contract.texts import HARD_TEXTS
from tuneloom.domain import AdapterRef, File, Version, adapter_sha256
from tuneloom.errors import Conflict
from tuneloom.store import Store, copy, open_pair
from tuneloom.store.artifacts import ADAPTER_FILES
from tuneloom.store.base import Create, Delete, Replace
from tuneloom.store.check import check_store
from tuneloom.store.copy import PAGE, compare_stores, copy_store

NUM_BLOBS = 40


@pytest.fixture
def local(tmp_path: Path) -> str:
    return pair(tmp_path / "local")


@pytest.fixture
def cloud(firestore_url: str, gcs_url: str) -> str:
    return f"{firestore_url},{gcs_url}"


def pair(folder: Path) -> str:
    return f"sqlite:{folder / 'tuneloom.db'},file:{folder / 'blobs'}"


@contextmanager
def opened(*urls: str) -> Iterator[list[Store]]:
    stores = [open_pair(*url.split(",")) for url in urls]
    yield stores
    for store in stores:
        store.close()


def fill(store: Store) -> None:
    """Something of every kind of record and more than a page of one, every kind of value, blobs of many sizes."""
    values: list[Any] = [None, True, 1, 1.0, -0.5, 2**63 - 1, [1, [], {}], {"a b": {"": "q", "é": [None]}}, *HARD_TEXTS]
    for collection in store.records.collections:
        store.records.commit(*(Create(collection, f"{collection}-{i}", {"v": v}) for i, v in enumerate(values)))
    # In the order of their code points, which is not that of UTF-16, nor that of an alphabet.
    names = ["B", "a", "é", "日", "\ue000", "\uff5e", "🙂", "a%_", "o'clock", "x" * 1500]
    store.records.commit(*(Create("keys", name, {"v": name[:9]}) for name in names))
    for start in (0, PAGE):
        store.records.commit(*(Create("events", f"{start + i:06}", {"i": i}) for i in range(PAGE)))
    chooser = random.Random(0)
    for i in range(NUM_BLOBS):
        store.blobs.write(f"jobs/{i % 7}/a{i}", chooser.randbytes(chooser.choice((0, 1, 1000, 300_000))))
    store.blobs.write("files/large", chooser.randbytes(9_000_000))


def content(store: Store) -> tuple[dict[Any, Any], dict[str, bytes]]:
    documents = {
        (collection, each.id): repr(sorted(each.data.items()))
        for collection in store.records.collections
        for each in store.records.documents.query(collection)
    }
    return documents, {info.key: store.blobs.read(info.key) for info in store.blobs.walk()}


def test_an_installation_goes_through_every_pair_and_comes_back_the_same(
    local: str, cloud: str, firestore_url: str, gcs_url: str, tmp_path: Path
) -> None:
    records, bytes_of = pair(tmp_path / "mixed").split(",")
    others = [f"{firestore_url}-other,{bytes_of}", cloud, f"{records},{gcs_url}-other", pair(tmp_path / "back")]
    with opened(local, *(url.replace("/(default)-other", "-other/(default)") for url in others)) as stores:
        fill(stores[0])
        for here, there in itertools.pairwise(stores):
            result = copy_store(here, there)
            assert result.is_equal and all(result.records.values())
            assert result.copied_blobs == result.blobs == NUM_BLOBS + 1
            assert result.copied_records == sum(result.records.values()) > 2 * PAGE
        assert content(stores[0]) == content(stores[2]) == content(stores[-1])


@pytest.mark.parametrize("kind", ["local", pytest.param("cloud", marks=pytest.mark.cloud)])
def test_records_that_are_more_than_one_commit_takes_are_copied(
    local: str, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    target = pair(tmp_path / "other") if kind == "local" else request.getfixturevalue("cloud")
    largest = [*("x" * size for size in (999_980, 999_980, 999_980, 500_000)), *("é" * 499_980 for _ in range(3)), "x"]
    with opened(local, target) as (here, there):
        for i, value in enumerate(largest):
            here.records.commit(Create("drafters", f"{i}", {"v": value}))
        result = copy_store(here, there)
        assert result.is_equal and result.records["drafters"] == len(largest)


def test_a_large_blob_is_told_of_before_it_is_copied(
    local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "LARGE_BYTES", 10)
    told: list[str] = []
    with opened(local, pair(tmp_path / "other")) as (here, there):
        here.blobs.write("a/b", b"small")
        here.blobs.write("a/c", b"0123456789")
        copy_store(here, there, lambda line: told.append(f"{line} {there.blobs.find('a/c') is not None}"))
    assert "; next is a/c of 10 bytes False" in told[0] and not any("next is a/b" in line for line in told)


@pytest.mark.parametrize("kind", ["local", pytest.param("cloud", marks=pytest.mark.cloud)])
def test_a_second_copy_has_nothing_to_do(local: str, tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    target = pair(tmp_path / "other") if kind == "local" else request.getfixturevalue("cloud")
    with opened(local, target) as (here, there):
        here.records.commit(Create("jobs", "a", {"v": 1}))
        here.blobs.write("a/b", b"x")
        copy_store(here, there)
        revision = there.records.documents.find("jobs", "a")
        again = copy_store(here, there)
        assert again.is_equal and (again.copied_records, again.copied_blobs) == (0, 0)
        assert there.records.documents.find("jobs", "a") == revision


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda store: store.records.commit(Create("keys", "foreign", {})), "keys/foreign is only at the target"),
        (lambda store: store.records.commit(Create("jobs", "a", {"v": 1.0})), "jobs/a differs"),
        (lambda store: store.blobs.write("a/foreign", b"x"), "blobs/a/foreign is only at the target"),
        (lambda store: store.blobs.write("a/b", b"other"), "blobs/a/b differs in size"),
    ],
)
def test_a_target_with_other_things_is_refused_and_left_as_it_is(
    local: str, tmp_path: Path, change: Any, named: str
) -> None:
    with opened(local, pair(tmp_path / "other")) as (here, there):
        here.records.commit(Create("jobs", "a", {"v": 1}), Create("jobs", "b", {}))
        here.blobs.write("a/b", b"x")
        change(there)
        before = content(there)
        with pytest.raises(Conflict) as error:
            copy_store(here, there)
        assert named in error.value.message
        assert content(there) == before


def test_a_blob_of_the_same_size_with_other_bytes_is_named_and_kept(local: str, cloud: str) -> None:
    with opened(local, cloud) as (here, there):
        here.blobs.write("a", b"hello")
        there.blobs.write("a", b"hellO")
        result = copy_store(here, there)
        assert [(each.name, each.problem.split()[0]) for each in result.differences] == [("blobs/a", "differs:")]
        assert there.blobs.read("a") == b"hellO"


def test_a_comparison_writes_nothing_and_names_everything(local: str, tmp_path: Path) -> None:
    with opened(local, pair(tmp_path / "other")) as (here, there):
        for store in (here, there):
            store.records.commit(Create("jobs", "same", {"v": 1}), Create("jobs", "other", {"v": 1}))
            store.blobs.write("a/same", b"x")
        here.records.commit(Create("jobs", "new", {}))
        here.blobs.write("a/new", b"x")
        there.blobs.write("b/old", b"x")
        stored = there.records.documents.find("jobs", "other")
        assert stored is not None
        there.records.commit(Replace("jobs", "other", {"v": True}, stored.rev))
        before = content(there)
        result = compare_stores(here, there)
        assert {str(each) for each in result.differences} == {
            "jobs/new is only at the source",
            "jobs/other differs",
            "blobs/a/new is only at the source",
            "blobs/b/old is only at the target",
        }
        assert (result.records["jobs"], result.blobs) == (1, 1)
        assert content(there) == before


def test_a_blob_that_was_spoiled_at_either_side_is_named(local: str, tmp_path: Path) -> None:
    with opened(local, pair(tmp_path / "other")) as (here, there):
        here.blobs.write("a/b", b"hello")
        copy_store(here, there)
        spoil(tmp_path / "other/blobs/data/a/b")
        (found,) = compare_stores(here, there).differences
        assert found.name == "blobs/a/b" and found.problem.startswith("differs")


def test_a_spoiled_blob_of_a_bucket_is_not_copied(cloud: str, local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuneloom.store import gcs

    with opened(cloud, local) as (here, there):
        here.blobs.write("a", b"fine")
        here.blobs.write("b", b"hello")
        monkeypatch.setattr(gcs, "_sha256_of", lambda blob: "0" * 64 if blob.name.endswith("/b") else None)
        (found,) = copy_store(here, there).differences
        assert found.name == "blobs/b" and "cannot be read at the source" in found.problem
        assert [info.key for info in there.blobs.walk()] == ["a"]


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["local", pytest.param("cloud", marks=pytest.mark.cloud)])
def test_a_copy_that_is_killed_again_and_again_is_whole_in_the_end(
    local: str, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    target = pair(tmp_path / "other") if kind == "local" else request.getfixturevalue("cloud")
    with opened(local, target) as (here, there):
        fill(here)
        command = [sys.executable, "-m", "tuneloom.cli", "store", "copy", local, target]
        for wanted in (1, NUM_BLOBS // 2, NUM_BLOBS + 1):
            child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            deadline = time.monotonic() + 60
            while (count := sum(1 for _ in there.blobs.walk())) < wanted and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(child.pid, signal.SIGKILL)
            assert count >= wanted and child.wait(10) == -signal.SIGKILL
        result = copy_store(here, there)
        assert result.is_equal and result.copied_records > 0
        assert content(here) == content(there)


# --- one store against its own records ---


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Store]:
    """A store with one file and one adapter that a Version names."""
    with opened(pair(tmp_path / "kept")) as (store,):
        file = File(
            id="file-1",
            owner="ada",
            filename="rows.jsonl",
            purpose="fine-tune",
            size_bytes=5,
            sha256=store.blobs.write("files/1", b"hello"),
            blob="files/1",
            created_at=1.0,
        )
        hashes = {name: store.blobs.write(f"jobs/1/adapter/{name}", name.encode()) for name in ADAPTER_FILES}
        ref = AdapterRef(sha256=adapter_sha256(hashes), uri="jobs/1/adapter", rank=4, size_bytes=5)
        version = Version(
            id="v", owner="ada", model="m", number=1, base="b", ft_name="ft:b:ada:m:1", adapter=ref, created_at=1.0
        )
        store.records.commit(store.records.files.create(file), store.records.versions.create(version))
        yield store


def test_a_store_that_keeps_its_promises_is_said_to(kept: Store) -> None:
    checked = check_store(kept)
    assert (checked.files, checked.adapters, checked.differences) == (1, 1, [])


@pytest.mark.parametrize(
    ("blob", "named"), [("files/1", "files/file-1"), (f"jobs/1/adapter/{ADAPTER_FILES[0]}", "versions/v")]
)
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_spoiled_or_missing_blob_is_named_by_its_record(
    kept: Store, tmp_path: Path, blob: str, named: str, is_gone: bool
) -> None:
    kept.blobs.delete(blob) if is_gone else spoil(tmp_path / "kept/blobs/data" / blob)
    (found,) = check_store(kept).differences
    assert found.name == named
    assert ("cannot be read" in found.problem) is is_gone


def test_a_file_that_is_deleted_while_it_is_checked_is_no_problem(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read = kept.blobs.open

    def delete_and_read(key: str) -> Any:
        for stored in kept.records.files.query():
            kept.records.commit(kept.records.files.delete(stored))
            kept.blobs.delete(stored.value.blob)
        return read(key)

    monkeypatch.setattr(kept.blobs, "open", delete_and_read)
    checked = check_store(kept)
    assert (checked.files, checked.differences) == (1, [])


def test_a_record_that_another_process_deletes_while_it_is_copied_is_told(local: str, tmp_path: Path) -> None:
    with opened(local, pair(tmp_path / "other")) as (here, there):
        here.records.commit(Create("jobs", "a", {}), Create("jobs", "b", {}))

        def report(line: str) -> None:
            if line.startswith("jobs:"):
                here.records.commit(Delete("jobs", "a"))

        (found,) = copy_store(here, there, report).differences
        assert str(found) == "jobs/a is only at the target"
