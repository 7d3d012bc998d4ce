"""The life cycle on the cloud pair: records in Firestore, blobs in a bucket, through the plain client only.

A cluster of its own, since its home names other stores; the servers are processes of this test run. Its gateways stand
behind HAProxy, so the tests of that mode are here too.
"""

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import (
    BASE,
    Home,
    all_events,
    rows_jsonl,
    running,
    start_job,
    steps_of,
    wait_for,
    wait_for_job,
)
from tests.e2e.modes import BOT, Modes
from tests.e2e.test_life_cycle import ask
from tests.parts import servers
from tests.tiny import make_adapter
from tuneloom import config
from tuneloom.store import Store, open_store

pytestmark = [pytest.mark.cluster, pytest.mark.cloud, pytest.mark.timeout(600)]

PROJECT = "demo-life-cycle"
BUCKET = "tuneloom-life-cycle"


@pytest.fixture(scope="module")
def cloud_home(firestore_server: servers.Server, gcs_server: servers.Server) -> Iterator[Home]:
    """An installation whose cluster learns from the environment of `tuneloom up` where the servers are."""
    url = f"http://{gcs_server.address}/storage/v1/b"
    httpx.post(url, json={"name": BUCKET}, timeout=10, trust_env=False).raise_for_status()
    cloud = {"documents_url": f"firestore:{PROJECT}", "blobs_url": f"gs://{BUCKET}/home"}
    with running(**cloud, gateway={"port": 0, "mode": "haproxy", "replicas": 2}) as home:
        yield home


@pytest.fixture
def client(cloud_home: Home) -> openai.OpenAI:
    return cloud_home.client()


@pytest.fixture(scope="module")
def store(cloud_home: Home) -> Iterator[Store]:
    """What is kept, looked at from beside."""
    opened = open_store(config.load(cloud_home.path))
    yield opened
    opened.close()


def test_a_file_becomes_a_version_that_answers(cloud_home: Home, client: openai.OpenAI, tmp_path: Path) -> None:
    first = start_job(client, rows_jsonl(60), suffix="bot", epochs=3, checkpoint_every_steps=15)
    done = wait_for_job(client, first.id, "succeeded")

    events = all_events(client, first.id)
    assert steps_of(events) == list(range(1, 46))
    losses = [event.data["train_loss"] for event in events if event.type == "metrics"]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    table = list(csv.DictReader(io.StringIO(client.files.content(done.result_files[0]).text)))
    assert len(table) == 45
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(first.id))
    assert {checkpoint.step_number for checkpoint in checkpoints} == {15, 30, 45}

    serious = ask(client, "bot")
    assert serious.startswith("serious") and serious != ask(client, BASE)
    assert ask(client, done.fine_tuned_model) == serious
    assert ask(client, checkpoints[0].fine_tuned_model_checkpoint)

    cloud_home.run("models", "export", "bot@v1", "--to", str(tmp_path / "bot"))
    assert (tmp_path / "bot" / "adapter_model.safetensors").stat().st_size > 1000
    assert "FAIL" not in cloud_home.run("verify", "bot@v1")


def test_a_paused_job_goes_on_where_it_was_to_the_second_version(
    cloud_home: Home, client: openai.OpenAI, store: Store
) -> None:
    job = start_job(client, rows_jsonl(80, answer="satire"), suffix="bot", epochs=4)
    wait_for("ten steps", lambda: len(steps_of(all_events(client, job.id))) >= 10, timeout_s=180)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    states = wait_for("its state in the bucket", lambda: store.blobs.list(f"jobs/{job.id}/states"), timeout_s=30)
    assert any(blob.size_bytes > 1000 for blob in states)

    # As on another machine: nothing of the run is on this disk.
    wait_for("the attempt to end", lambda: not store.records.jobs.get(job.id).value.attempt_open, timeout_s=60)
    shutil.rmtree(cloud_home.path / "runs" / job.id)

    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    wait_for_job(client, job.id, "succeeded")
    assert steps_of(all_events(client, job.id)) == list(range(1, 81))
    wait_for("its states to go", lambda: not store.blobs.list(f"jobs/{job.id}/states"), timeout_s=60)


def test_versions_are_activated_and_go_with_their_model(cloud_home: Home, client: openai.OpenAI, store: Store) -> None:
    assert ask(client, "bot@v2").startswith("satire")
    assert ask(client, "bot") == ask(client, "bot@v1")
    assert ask(client, "bot").startswith("serious")
    cloud_home.run("models", "activate", "bot@v2")
    wait_for("the second version", lambda: ask(client, "bot").startswith("satire"), timeout_s=30)
    assert {BASE, "bot", "bot@v1", "bot@v2"} <= {model.id for model in client.models.list()}

    # All of it is in the cloud, and nothing of it in the home.
    assert not (cloud_home.path / "blobs").exists() and not list(cloud_home.path.glob("*.db"))
    adapters = [stored.value.adapter.uri for stored in store.records.versions.query()]
    assert len(adapters) == 2 and all(store.blobs.list(uri) for uri in adapters)

    assert client.models.delete("bot").deleted

    def is_unknown() -> bool:
        try:
            ask(client, "bot@v1")
        except openai.NotFoundError:
            return True
        return False

    wait_for("both gateways to know it", lambda: all(is_unknown() for _ in range(8)), timeout_s=30)
    wait_for("the adapters to be gone", lambda: not any(store.blobs.list(uri) for uri in adapters), timeout_s=30)


def test_a_cancelled_job_ends_and_its_file_can_be_deleted(client: openai.OpenAI, store: Store) -> None:
    job = start_job(client, rows_jsonl(100), suffix="never", epochs=40)
    wait_for_job(client, job.id, "running")
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    blob = store.records.files.get(job.training_file).value.blob

    def deleted() -> Any:
        try:
            return client.files.delete(job.training_file).deleted
        except openai.ConflictError:
            return None

    wait_for("its file to be let go", deleted, timeout_s=60)
    assert store.blobs.find(blob) is None
    with pytest.raises(openai.NotFoundError):
        client.files.content(job.training_file)


@pytest.fixture(scope="module")
def served(cloud_home: Home, tmp_path_factory: pytest.TempPathFactory) -> Home:
    adapter = make_adapter(tmp_path_factory.mktemp("modes") / "bot", cloud_home.path / "source", seed=3, rank=4)
    cloud_home.run("models", "import", str(adapter), "--name", BOT)
    return cloud_home


class TestHaproxy(Modes):
    """Behind HAProxy."""


def test_the_whole_installation_can_be_taken_home(cloud_home: Home, store: Store, tmp_path: Path) -> None:
    cloud_home.run("down")
    assert "0 wrong" in cloud_home.run("store", "check")
    told = cloud_home.run("store", "copy", str(cloud_home.path), str(tmp_path / "home"))
    assert "the same on both sides" in told and str(cloud_home.path / "pepper") in told
    assert (tmp_path / "home" / "tuneloom.db").exists()
