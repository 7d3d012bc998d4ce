"""The whole application while its store is away, and several applications over one store."""

import asyncio
import time

import httpx2
import openai
import pytest

from tests.serve.conftest import BASE, Service, make_service
from tests.serve.outages import Outage
from tuneloom.config import Settings
from tuneloom.store import Store
from tuneloom.store.records import Records

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={"gateway": settings.gateway.model_copy(update={"key_cache_s": 0.2, "store_wait_s": 0.3})}
    )


@pytest.fixture
def outage(store: Store) -> Outage:
    return Outage(store.records.documents)


@pytest.fixture
def service(settings: Settings, store: Store, outage: Outage) -> Service:
    return make_service(settings, Store(Records(outage), store.blobs))


async def chat(service: Service, key: str, model: str = "bot") -> httpx2.Response:
    async with service.http(key) as http:
        return await http.post("/v1/chat/completions", json={"model": model, "messages": HI})


async def ready(service: Service) -> tuple[int, dict]:
    async with service.http() as http:
        answer = await http.get("/readyz")
    return answer.status_code, answer.json()


async def test_what_was_asked_before_goes_on_while_the_store_is_down(service: Service, outage: Outage) -> None:
    version = service.add_version("ada", "bot")
    seen, unseen = service.key(), service.key()
    assert (await chat(service, seen)).status_code == 200
    outage.fail()
    await asyncio.sleep(0.3)

    assert (await chat(service, seen)).json()["choices"][0]["message"]["content"] == "Hello"
    assert service.base.requests[-1].adapter == version.adapter
    assert (await chat(service, seen, BASE)).status_code == 200
    async with service.http(seen) as http:
        others = [await http.get("/v1/models"), await chat(service, seen, "bot@v1"), await chat(service, unseen)]
    for answer in others:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1

    outage.end()
    second = service.add_version("ada", "bot", 2)
    assert (await chat(service, unseen)).status_code == 200
    assert service.base.requests[-1].adapter == second.adapter


async def test_a_store_that_hangs_holds_up_no_request_for_long(service: Service, outage: Outage) -> None:
    service.add_version("ada", "bot")
    key = service.key()
    await chat(service, key)
    outage.hangs = True
    started = time.monotonic()
    async with asyncio.timeout(15):
        answers = [await chat(service, key) for _ in range(5)]
    outage.end()
    assert [answer.status_code for answer in answers] == [200] * 5
    assert time.monotonic() - started < 15


async def test_ready_is_degraded_while_requests_go_on_without_the_store(service: Service, outage: Outage) -> None:
    assert await ready(service) == (200, {"status": "ok"})
    outage.fail()
    assert await ready(service) == (200, {"status": "degraded", "failing": ["store"]})
    outage.end()
    assert await ready(service) == (200, {"status": "ok"})


async def test_ready_fails_for_who_never_had_the_store_and_once_nothing_counts_anymore(
    settings: Settings, store: Store, outage: Outage
) -> None:
    gateway = settings.gateway.model_copy(update={"stale_s": 0.0})
    service = make_service(settings.model_copy(update={"gateway": gateway}), Store(Records(outage), store.blobs))
    outage.fail()
    wanted = (503, {"status": "not ready", "failing": ["store"]})
    assert await ready(service) == wanted
    outage.end()
    key = service.key()
    assert (await ready(service))[0] == 200
    assert (await chat(service, key, BASE)).status_code == 200
    outage.fail()
    await asyncio.sleep(0.3)
    assert await ready(service) == wanted
    assert (await chat(service, key, BASE)).status_code == 503


async def test_ready_fails_if_a_base_is_away_too(
    service: Service, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneloom.serve.ingress.READY_TIMEOUT_S", 0.2)
    await ready(service)
    outage.fail()
    service.base.is_up = False
    assert await ready(service) == (503, {"status": "not ready", "failing": ["store", BASE]})


async def test_a_key_that_one_gateway_revokes_ends_at_all_within_seconds(settings: Settings, store: Store) -> None:
    first, second = make_service(settings, store), make_service(settings, store)
    key, admin = first.key(), first.key("root", ("admin",))
    for gateway in (first, second):
        assert (await chat(gateway, key, BASE)).status_code == 200
    async with first.http(admin) as http:
        listed = (await http.get("/v1/tuneloom/keys", params={"owner": "ada"})).json()["data"]
        await http.delete(f"/v1/tuneloom/keys/{listed[0]['id']}")
    assert (await chat(first, key, BASE)).status_code == 401
    await asyncio.sleep(settings.gateway.key_cache_s)
    assert (await chat(second, key, BASE)).status_code == 401


async def test_a_rotated_key_ends_at_once_where_it_was_rotated(settings: Settings, store: Store) -> None:
    service = make_service(settings, store)
    key = service.key("ada", ("account", "inference"))
    assert (await chat(service, key, BASE)).status_code == 200
    async with service.http(key) as http:
        id = (await http.get("/v1/tuneloom/keys")).json()["data"][0]["id"]
        fresh = (await http.post(f"/v1/tuneloom/keys/{id}/rotate", json={})).json()["secret"]
    assert (await chat(service, key, BASE)).status_code == 401
    assert (await chat(service, fresh, BASE)).status_code == 200


async def test_a_key_for_one_model_calls_it_by_body_and_by_url_and_nothing_else(service: Service) -> None:
    version = service.add_version("ada", "bot")
    service.add_version("ada", "other")
    key = service.key(models=("bot",))
    absent = await chat(service, key, "zzzzz")
    async with service.http(key) as http:
        for name in ("bot", "bot@v1", version.ft_name):
            assert (await chat(service, key, name)).status_code == 200
            for path, body in (("chat/completions", {"messages": HI}), ("completions", {"prompt": "hi"})):
                assert (await http.post(f"/v1/{name}/{path}", json=body)).status_code == 200
            assert (await http.get(f"/v1/{name}/models")).json()["data"][0]["id"] == name
        for name in ("other", "other@v1", BASE, "gpt-old"):
            answer = await chat(service, key, name)
            assert answer.status_code == 404
            assert answer.content == absent.content.replace(b"zzzzz", name.encode())
            for path, body in (("chat/completions", {"messages": HI}), ("completions", {"prompt": "hi"})):
                assert (await http.post(f"/v1/{name}/{path}", json=body)).status_code == 404
            assert (await http.get(f"/v1/{name}/models")).status_code == 404
        assert [model["id"] for model in (await http.get("/v1/models")).json()["data"]] == [
            "bot",
            "bot@v1",
            version.ft_name,
        ]


async def test_an_unknown_key_is_a_401_and_a_flood_of_them_a_503_that_says_when_to_come_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service.openai("sk-nobody") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    monkeypatch.setattr("tuneloom.serve.keys._Budget.has_room", lambda self: False)
    async with service.openai("sk-another") as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.models.list()
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")
