"""The service on Firestore, Cloud Storage and Redis while one of them is slow, down or loses answers.

Each test says what a caller sees, that nothing is lost or doubled, and that all is well once the part is back.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.parts.front import Front, front
from tests.parts.proxy import Proxy, proxy
from tests.parts.servers import Server
from tests.serve.conftest import BASE, Service, make_service
from tests.serve.tenants import HI, ROWS
from tuneloom.config import BaseSettings, LimitsSettings, Settings
from tuneloom.store import open_store

pytestmark = pytest.mark.anyio
SLOW_S = 2.0
# Longer than any call of a store tries.
PATIENCE_S = 60.0


@dataclass
class Cloud:
    """A service whose parts are each behind a proxy; `database` and `bucket` can refuse single requests behind it."""

    service: Service
    key: str
    firestore: Proxy
    gcs: Proxy
    redis: Proxy
    database: Front
    bucket: Front

    def client(self, **more: object) -> AsyncOpenAI:
        return self.service.openai(self.key, timeout=PATIENCE_S, **more)

    def files(self) -> list[str]:
        return [stored.value.filename for stored in self.service.store.records.files.query({"owner": "ada"})]


@pytest.fixture
def cloud(
    firestore_server: Server,
    gcs_server: Server,
    redis_server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Cloud]:
    bucket = f"tuneloom-{uuid.uuid4().hex[:12]}"
    made = httpx.post(f"http://{gcs_server.address}/storage/v1/b", json={"name": bucket}, timeout=10, trust_env=False)
    made.raise_for_status()
    with (
        front(firestore_server.port) as database,
        front(gcs_server.port) as refusing,
        proxy(database.port) as firestore,
        proxy(refusing.port) as gcs,
        proxy(redis_server.port) as redis,
    ):
        monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", firestore.address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{gcs.address}")
        settings = Settings(
            home=tmp_path,
            documents_url=f"firestore:demo-{uuid.uuid4().hex[:12]}",
            blobs_url=f"gs://{bucket}/home",
            bases=(BaseSettings(id=BASE),),
            limits=LimitsSettings(redis_url=f"redis://{redis.address}/0"),
        )
        store = open_store(settings)
        service = make_service(settings, store)
        key = service.key("ada", ("inference", "training"))
        yield Cloud(service, key, firestore, gcs, redis, database, refusing)
        for part in (firestore, gcs, redis):
            part.set("forward")
        store.close()


async def chat(client: AsyncOpenAI, model: str = BASE) -> str | None:
    return (await client.chat.completions.create(model=model, messages=HI)).choices[0].message.content


async def upload(client: AsyncOpenAI, name: str) -> str:
    return (await client.files.create(file=(name, ROWS), purpose="fine-tune")).id


async def refused(call: Awaitable[object]) -> openai.InternalServerError:
    """The 503 with a time to come back that a call ends in."""
    with pytest.raises(openai.InternalServerError) as caught:
        await call
    assert caught.value.status_code == 503, caught.value
    assert float(caught.value.response.headers["retry-after"]) > 0
    return caught.value


async def test_all_is_well(cloud: Cloud) -> None:
    async with cloud.client() as client:
        cloud.service.add_version("ada", "bot")
        file = await upload(client, "a.jsonl")
        job = await client.fine_tuning.jobs.create(model=BASE, training_file=file)
        assert await chat(client) and await chat(client, "bot")
        assert (await client.files.content(file)).content == ROWS
        assert job.status == "validating_files"


async def test_redis_down_stops_what_is_costly_and_nothing_else(cloud: Cloud) -> None:
    async with cloud.client() as client:
        file = await upload(client, "a.jsonl")
        for mode in ("refuse", "hang"):
            cloud.redis.set(mode)
            started = time.monotonic()
            assert await chat(client)
            assert time.monotonic() - started < SLOW_S, "a request does not wait for a dead Redis"
            await refused(client.fine_tuning.jobs.create(model=BASE, training_file=file))
            await refused(upload(client, "b.jsonl"))
            cloud.redis.set("forward")
            async with cloud.client(max_retries=8) as patient:
                await patient.fine_tuning.jobs.create(model=BASE, training_file=file, suffix=f"after-{mode}")
        jobs = [job async for job in client.fine_tuning.jobs.list()]
        assert (len(jobs), cloud.files()) == (2, ["a.jsonl"])


async def test_a_slow_firestore_holds_up_writes_but_no_known_chat(cloud: Cloud) -> None:
    async with cloud.client() as client:
        cloud.service.add_version("ada", "bot")
        assert await chat(client, "bot")
        cloud.firestore.set("delay", SLOW_S)
        await asyncio.sleep(2.5)  # the key is to be looked up again
        started = time.monotonic()
        assert await chat(client, "bot")
        assert time.monotonic() - started < SLOW_S + 1, "one read at most is waited for"
        assert await upload(client, "slow.jsonl")
        cloud.firestore.set("forward")
        assert cloud.files() == ["slow.jsonl"]


async def test_firestore_down_refuses_what_is_new_and_goes_on_with_what_is_known(cloud: Cloud) -> None:
    async with cloud.client() as client:
        cloud.service.add_version("ada", "bot")
        assert await chat(client, "bot") and await chat(client)
        cloud.firestore.set("refuse")
        assert await chat(client, "bot") and await chat(client)
        await refused(upload(client, "a.jsonl"))
        await refused(chat(client, "never-asked-before"))
        async with cloud.service.openai("sk-never-seen", timeout=PATIENCE_S) as stranger:
            await refused(chat(stranger))
        async with cloud.service.http() as http:
            assert (await http.get("/readyz")).json() == {"status": "degraded", "failing": ["store"]}
        cloud.firestore.set("forward")
        assert await upload(client, "b.jsonl") and await chat(client, "bot")
        assert cloud.files() == ["b.jsonl"]


async def test_a_lost_answer_of_firestore_makes_nothing_twice(cloud: Cloud) -> None:
    async with cloud.client() as client:
        file = await upload(client, "a.jsonl")
        assert await chat(client)
        cloud.firestore.set("drop")
        with pytest.raises(openai.APIError):
            await client.fine_tuning.jobs.create(
                model=BASE, training_file=file, extra_headers={"Idempotency-Key": "create-1"}
            )
        cloud.firestore.set("forward")
        again = [
            await client.fine_tuning.jobs.create(
                model=BASE, training_file=file, extra_headers={"Idempotency-Key": "create-1"}
            )
            for _ in range(2)
        ]
        jobs = [job.id async for job in client.fine_tuning.jobs.list()]
        assert jobs == [again[0].id] == [again[1].id]


@pytest.mark.parametrize("mode", ["refuse", "hang"])
async def test_a_bucket_that_is_away_leaves_no_file_without_bytes(cloud: Cloud, mode: str) -> None:
    async with cloud.client() as client:
        kept = await upload(client, "kept.jsonl")
        cloud.gcs.set(mode)
        await refused(upload(client, "lost.jsonl"))
        await refused(client.files.content(kept))
        assert await chat(client)
        assert cloud.files() == ["kept.jsonl"]
        cloud.gcs.set("forward")
        assert (await client.files.content(kept)).content == ROWS
        await upload(client, "after.jsonl")
        assert sorted(cloud.files()) == ["after.jsonl", "kept.jsonl"]


@pytest.mark.parametrize("part", ["bucket", "database"])
async def test_a_part_that_refuses_the_server_is_for_its_operator_to_read_of(
    cloud: Cloud, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    refusing: Front = getattr(cloud, part)
    async with cloud.client() as client:
        cloud.service.add_version("ada", "bot")
        kept = await upload(client, "kept.jsonl")
        assert await chat(client, "bot")
        refusing.spoil("/", 403, times=1000)
        for call in (upload(client, "lost.jsonl"), client.files.content(kept)):
            error = await refused(call)
            assert error.response.headers["x-request-id"] in error.message
            assert not any(word in str(error.body) for word in ("roles/", "gs://", "demo-", "tuneloom-"))
        assert "Grant the account `roles/" in caplog.text
        assert await chat(client, "bot")
        refusing.heal()
        assert (await client.files.content(kept)).content == ROWS
        await upload(client, "after.jsonl")
        assert sorted(cloud.files()) == ["after.jsonl", "kept.jsonl"]
