"""The unmodified `openai` client against the API of control."""

import io

import httpx2
import openai
import pytest

from tests.control.conftest import BASE
from tests.control.fakes import FakeChecker, FakeClock, FakeLauncher
from tuneloom.config import TrainSettings
from tuneloom.control.reconcile import Reconciler

pytestmark = pytest.mark.anyio


@pytest.fixture
def client(api) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key="ada:training,inference",
        base_url="http://tuneloom/v1",
        http_client=httpx2.AsyncClient(transport=httpx2.ASGITransport(app=api.app)),
        max_retries=1,
    )


async def test_the_whole_life_of_a_job(api, client):
    clock = FakeClock()
    launcher = FakeLauncher(api.store, clock)
    reconciler = Reconciler(api.store, launcher, FakeChecker(), TrainSettings(), clock, observe_every_s=0)
    file = await client.files.create(file=("rows.jsonl", b"{}\n"), purpose="fine-tune")
    assert (await client.files.wait_for_processing(file.id)).status == "processed"
    job = await client.fine_tuning.jobs.create(
        model="gpt-4o-mini-2024-07-18", training_file=file.id, suffix="bot", extra_body={"tuneloom": {"rank": 4}}
    )
    assert (await client.fine_tuning.jobs.pause(job.id)).status == "paused"
    assert (await client.fine_tuning.jobs.resume(job.id)).status == "validating_files"
    for _ in range(20):
        reconciler.tick()
        for trainer in launcher.trainers.values():
            trainer.step()
        clock.advance(1)
    job = await client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.error) == ("succeeded", None)
    assert [found.id async for found in client.fine_tuning.jobs.list(limit=1)] == [job.id]
    events = [event async for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert len(events) == len({event.id for event in events}) > 6
    assert events[0].message == "The job has successfully completed"
    checkpoints = [c async for c in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
    assert [c.step_number for c in checkpoints] == [4, 2]
    results = await client.files.content(job.result_files[0])
    assert results.text.startswith("step,train_loss")
    for name in (job.fine_tuned_model, "bot", checkpoints[0].fine_tuned_model_checkpoint):
        assert (await client.models.retrieve(name)).id == name
    assert {BASE, "bot", "bot@v1"} <= {model.id async for model in client.models.list()}
    with pytest.raises(openai.ConflictError) as caught:
        await client.fine_tuning.jobs.cancel(job.id)
    assert caught.value.code == "succeeded"
    assert (await client.models.delete(job.fine_tuned_model)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve(job.fine_tuned_model)
    assert (await client.files.delete(file.id)).deleted


async def test_a_file_in_chunks_by_the_clients_own_helper(client):
    data = b"0123456789" * 100
    done = await client.uploads.upload_file_chunked(
        file=data, filename="rows.jsonl", bytes=len(data), mime_type="text/jsonl", purpose="fine-tune", part_size=300
    )
    assert done.status == "completed"
    assert (await client.files.content(done.file.id)).content == data


async def test_a_file_with_an_expiry(client):
    file = await client.files.create(
        file=("a.jsonl", io.BytesIO(b"{}")),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at - file.created_at == 3600
