"""`tuneloom store` as an operator meets it."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.store.test_copy import opened, pair, spoil
from tests.test_cli import Shell
from tuneloom import cluster, config
from tuneloom.domain import File, Job, JobSpec, Progress
from tuneloom.store import Store, open_store
from tuneloom.store.keys import find_secret


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(tmp_path / "home", capsys, monkeypatch)


@pytest.fixture
def secret(shell: Shell) -> str:
    """That of a key of the home, which has a file besides."""
    assert shell("keys", "create", "--owner", "ada") == 0
    secret = shell.out.strip()
    store = open_store(config.load(shell.home))
    add_file(store)
    store.close()
    return secret


def add_file(store: Store) -> None:
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
    store.records.commit(store.records.files.create(file))


def test_a_home_is_copied_and_a_key_is_known_where_the_pepper_is_the_same(
    shell: Shell, secret: str, firestore_url: str, gcs_url: str, tmp_path: Path
) -> None:
    there = f"{firestore_url},{gcs_url}"
    assert shell("store", "copy", str(shell.home), there) == 0, shell.err
    assert "1 blobs with 5 bytes" in shell.out and "copied now" in shell.out
    assert str(shell.home / "pepper") in shell.out

    new = tmp_path / "new"
    new.mkdir()
    (new / "config.yaml").write_text(f"documents_url: {firestore_url}\nblobs_url: {gcs_url}\n")
    shutil.copy(shell.home / "pepper", new / "pepper")
    settings = config.load(new)
    store = open_store(settings)
    found = find_secret(store.records, config.read_pepper(settings).hashes(secret))
    assert found is not None and found.key.owner == "ada"
    (new / "pepper").unlink()
    assert find_secret(store.records, config.read_pepper(settings).hashes(secret)) is None
    store.close()

    assert shell("store", "copy", str(new), str(tmp_path / "back")) == 0, shell.err
    assert shell("store", "copy", str(shell.home), str(tmp_path / "back"), "--verify") == 0


def test_for_programs_all_of_it_is_told_as_json(shell: Shell, secret: str, tmp_path: Path) -> None:
    assert shell("store", "copy", str(shell.home), pair(tmp_path / "other"), "--json") == 0
    told = json.loads(shell.out)
    assert (told["is_equal"], told["blobs"], told["copied_blobs"], told["records"]["files"]) == (True, 1, 1, 1)
    assert str(shell.home / "pepper") in told["not_in_the_store"]


def test_a_difference_is_named_and_the_exit_code_is_1(shell: Shell, secret: str, tmp_path: Path) -> None:
    other = pair(tmp_path / "other")
    assert shell("store", "copy", str(shell.home), other) == 0
    spoil(tmp_path / "other/blobs/data/files/1")
    assert shell("store", "copy", str(shell.home), other, "--verify") == 1
    assert "FAIL  blobs/files/1 differs" in shell.out and "not the same: 1" in shell.out
    with opened(other) as (there,):
        there.records.commit(there.records.files.delete(there.records.files.get("file-1")))
        there.blobs.write("files/foreign", b"x")
    assert shell("store", "copy", str(shell.home), other) == 1
    assert "blobs/files/foreign is only at the target" in shell.err and "Nothing was written" in shell.err


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        ("sqlite:x", "other", "Name both"),
        ("nothing-here", "other", "There is nothing at"),
        ("{home}", "{home}", "the same store"),
        ("{home}", "{home}/../home", "the same store"),
        ("{home}", "link", "the same store"),
        ("{home}", "sqlite:link/tuneloom.db, file:link/blobs/", "the same store"),
        ("firestore:p,gs://bucket/a", "firestore:p/(default),gs://bucket/a/", "the same store"),
        ("{home}", "sqlite:x.db,file:{home}/blobs/data/x", "lie inside those of the other"),
        ("sqlite:x.db,gs://bucket", "sqlite:y.db,gs://bucket/new", "lie inside those of the other"),
        ("sqlite:x.db,gs://bucket/a/b", "sqlite:y.db,gs://bucket/a", "lie inside those of the other"),
        ("{home}", "", "is no place"),
        ("{home}", "plain", "is a file"),
        ("{home}", "sqlite:x.db,file:plain", "`file:plain` cannot be opened: Not a directory"),
        ("{home}", "sqlite:plain/x.db,file:x", "`sqlite:plain/x.db` cannot be opened"),
        ("mysql:x,gs://bucket", "other", "is not a documents URL"),
        ("{home}", "sqlite:x,s3:y", "is not a blobs URL"),
    ],
)
def test_a_wrong_place_is_refused(
    shell: Shell, secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").touch()
    (tmp_path / "link").symlink_to(shell.home)
    assert shell("store", "copy", source.format(home=shell.home), target.format(home=shell.home)) == 1
    assert told in shell.err
    assert not (tmp_path / "nothing-here").exists() and not (tmp_path / "x.db").exists()


def test_blobs_alone_can_be_moved_to_a_place_beside(shell: Shell, secret: str, tmp_path: Path) -> None:
    beside = f"sqlite:{shell.home}/tuneloom.db,file:{shell.home}/blobs-new"
    assert shell("store", "copy", str(shell.home), beside) == 0, shell.err
    assert "copied now: 0 records and 1 blobs" in shell.out


def test_a_check_of_a_home_that_is_not_there_makes_none(shell: Shell) -> None:
    assert shell("store", "check") == 1
    assert "There is nothing at" in shell.err and not shell.home.exists()


def test_a_store_that_something_runs_on_is_not_copied(shell: Shell, secret: str, tmp_path: Path) -> None:
    state = cluster.ClusterState(
        id="x", started_at=time.time(), host="127.0.0.1", port=1, gcs_address="", dashboard_port=2, folder=tmp_path
    )
    cluster.write_state(shell.home, state)
    marks = {cluster.MARKER: "x", "TUNELOOM_HOME": str(shell.home), "PATH": ""}
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=marks)
    try:
        time.sleep(0.2)
        for places in ((str(shell.home), pair(tmp_path / "other")), (pair(tmp_path / "other"), str(shell.home))):
            assert shell("store", "copy", *places) == 1
            assert f"tuneloom --home {shell.home} down" in shell.err
    finally:
        running.kill()
        running.wait(10)
    assert shell("store", "copy", str(shell.home), pair(tmp_path / "other")) == 0


@pytest.mark.parametrize(("silent_s", "code"), [(5, 1), (3600, 0)])
def test_a_job_that_trains_somewhere_is_told(shell: Shell, tmp_path: Path, silent_s: float, code: int) -> None:
    with opened(pair(tmp_path / "one")) as (store,):
        spec = JobSpec(base="b", training_file="file-1", suffix="s", seed=1)
        job = Job(id="ftjob-1", owner="ada", spec=spec, requested_model="b", created_at=1.0, state="running", attempt=1)
        said = Progress(id=job.id, owner="ada", attempt=1, heartbeat_at=time.time() - silent_s)
        store.records.commit(store.records.jobs.create(job), store.records.progress.create(said))
    assert shell("store", "copy", pair(tmp_path / "one"), pair(tmp_path / "two")) == code
    assert ("ftjob-1 is training" in shell.err) is bool(code)


def test_a_check_reads_all_that_the_records_promise(shell: Shell, secret: str) -> None:
    assert shell("store", "check") == 0
    assert "1 files and 0 adapters, 0 wrong" in shell.out
    spoil(shell.home / "blobs/data/files/1")
    assert shell("store", "check") == 1
    assert "FAIL  files/file-1 has the sha256" in shell.out
    assert shell("store", "check", "--json") == 1
    assert json.loads(shell.out)["differences"][0]["name"] == "files/file-1"
