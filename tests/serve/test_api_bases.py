"""The operators' calls over the real application and store; only the replicas are scripted."""

import asyncio
from typing import Any

import httpx2
import pytest

from tests.serve.conftest import BASE, Service, make_service
from tuneloom.config import BaseSettings, EngineSettings, Settings
from tuneloom.domain import AdapterRef
from tuneloom.engine.base import AdapterState, EngineStats, TierStats
from tuneloom.errors import Overloaded
from tuneloom.serve.pins import PinFollower, read_pins
from tuneloom.store import Store

pytestmark = pytest.mark.anyio
URL = f"/v1/tuneloom/bases/{BASE}"
LOST = Overloaded("This replica did not answer.", retry_after_s=5)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Room for two pins."""
    return settings.model_copy(update={"bases": (BaseSettings(id=BASE, engine=EngineSettings(adapter_slots=3)),)})


@pytest.fixture
async def admin(service: Service) -> Any:
    async with service.http(service.key("ada", ("admin",))) as http:
        yield http


async def act(http: httpx2.AsyncClient, action: str, **body: str) -> dict[str, Any]:
    answer = await http.post(f"{URL}/{action}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_each_replica_tells_its_numbers_and_one_that_is_silent_is_told(
    service: Service, admin: httpx2.AsyncClient
) -> None:
    tier = TierStats(2, 200, 300, hits=3, misses=1, fills=1, evictions=0, failures=0, fill_s=0.25)
    stats = EngineStats(4, 2, 10, 100, 9, 12.5, 77, 1, 0, 55, 0, 30.0, 160.0, {"slot": tier}, {"device": "cpu"})
    service.base.answers["stats"] = {"r1": stats, "r2": LOST}

    listed = (await admin.get("/v1/tuneloom/bases")).json()

    assert listed["object"] == "list" and listed["data"] == [(await admin.get(URL)).json()]
    one, two = listed["data"][0]["replicas"]
    assert (one["id"], one["status"], one["running"], one["waiting"], one["waiting_tokens"]) == ("r1", "ok", 4, 2, 55)
    assert (one["step_ms"], one["tokens_per_s"], one["kv_tokens_used"], one["kv_tokens_total"]) == (12.5, 160, 10, 100)
    assert one["tiers"]["slot"]["hit_rate"] == 0.75 and one["tiers"]["slot"]["size_bytes"] == 200
    assert one["details"] == {"device": "cpu"}
    assert (two["id"], two["status"], two["error"]["message"]) == ("r2", "error", LOST.message)


async def test_having_no_replica_is_a_problem_but_for_a_base_that_runs_only_while_it_is_used(
    settings: Settings, store: Store
) -> None:
    bases = (BaseSettings(id="steady"), BaseSettings(id="rare", min_replicas=0))
    service = make_service(settings.model_copy(update={"bases": bases, "base_aliases": {}}), store)
    service.base.answers["stats"] = {}
    async with service.http(service.key("ada", ("admin",))) as http:
        steady, rare = (await http.get("/v1/tuneloom/bases")).json()["data"]
    assert "one is starting, or fails to" in steady["problem"] and rare["problem"] is None
    assert steady["replicas"] == rare["replicas"] == []


async def test_a_base_that_hangs_holds_up_the_list_once(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = tuple(BaseSettings(id=f"b{number}") for number in range(3))
    service = make_service(settings.model_copy(update={"bases": bases, "base_aliases": {}}), store)
    all_asked = asyncio.Barrier(3)

    async def ask(method: str, **limits: float) -> dict[str, Any]:
        await all_asked.wait()
        return {"r1": LOST}

    monkeypatch.setattr(service.base, "on_each_replica", ask)
    async with service.http(service.key("ada", ("admin",))) as http, asyncio.timeout(20):
        listed = (await http.get("/v1/tuneloom/bases")).json()
    assert [base["id"] for base in listed["data"]] == ["b0", "b1", "b2"]


async def test_adapters_are_listed_with_their_names_the_last_used_first(
    service: Service, admin: httpx2.AsyncClient
) -> None:
    version = service.add_version("eve", "bot")
    known = AdapterState(version.adapter.sha256, "slot", 4, 100, 1, True, 50.0)
    other = AdapterState("f" * 64, "host", 8, 200, 0, False, 60.0)
    service.base.answers["adapters"] = {"r1": [known], "r2": [other], "r3": LOST}

    listed = (await admin.get(f"{URL}/adapters")).json()

    assert [(each["replica"], each["tier"], each["pinned"]) for each in listed["data"]] == [
        ("r2", "host", False),
        ("r1", "slot", True),
    ]
    assert listed["data"][1]["models"] == [{"name": "bot@v1", "owner": "eve"}]
    assert [error["id"] for error in listed["errors"]] == ["r3"] and not listed["has_more"]
    short = (await admin.get(f"{URL}/adapters?limit=1")).json()
    assert len(short["data"]) == 1 and short["has_more"]


async def test_prewarming_goes_to_all_replicas_and_tells_of_each(service: Service, admin: httpx2.AsyncClient) -> None:
    version = service.add_version("ada", "bot")
    service.base.answers["prewarm"] = {"r1": None, "r2": LOST}

    done = await act(admin, "prewarm", model="bot")

    assert service.base.operations == [("prewarm", version.adapter)]
    assert (done["sha256"], done["failed"]) == (version.adapter.sha256, 1)
    assert [(each["id"], each["status"]) for each in done["replicas"]] == [("r1", "ok"), ("r2", "error")]


async def test_a_pin_is_kept_for_replicas_to_come_until_it_is_taken_back(
    service: Service, admin: httpx2.AsyncClient
) -> None:
    ref = service.add_version("eve", "bot").adapter
    for _ in range(2):
        await act(admin, "pin", model="bot@v1", owner="eve")
    assert [pin["model"] for pin in (await admin.get(URL)).json()["pins"]] == ["bot@v1"]
    pinned = await admin.post(f"{URL}/unload", json={"sha256": ref.sha256})
    assert pinned.status_code == 409 and "Unpin it first" in pinned.text
    await act(admin, "unpin", model="bot", owner="eve")
    assert read_pins(service.store.records, BASE) == {}
    assert service.base.operations[-1] == ("pin", ref, False)
    assert (await admin.post(f"{URL}/unpin", json={"model": "bot", "owner": "eve"})).status_code == 404
    await act(admin, "unload", sha256=ref.sha256)
    assert service.base.operations[-1] == ("unload", ref.sha256)


async def test_one_slot_is_never_pinned(service: Service, admin: httpx2.AsyncClient) -> None:
    for number in (1, 2, 3):
        service.add_version("ada", "bot", number)
    for number in (1, 2):
        await act(admin, "pin", model=f"bot@v{number}")
    full = await admin.post(f"{URL}/pin", json={"model": "bot@v3"})
    assert full.status_code == 409 and "adapter_slots" in full.json()["error"]["message"]
    assert len(read_pins(service.store.records, BASE)) == 2


async def test_a_pin_outlives_the_model_and_is_taken_back_by_its_hash(
    service: Service, admin: httpx2.AsyncClient
) -> None:
    ref = service.add_version("ada", "bot").adapter
    await act(admin, "pin", model="bot")
    records = service.store.records
    records.commit(*(table.delete(table.query()[0]) for table in (records.versions, records.models)))
    await act(admin, "unpin", sha256=ref.sha256)
    assert read_pins(records, BASE) == {}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("prewarm", {}, 400, "model"),
        ("prewarm", {"model": "nobody"}, 404, "model"),
        ("prewarm", {"model": "bot", "owner": "eve"}, 404, "model"),
        ("prewarm", {"model": BASE}, 404, "model"),
        ("prewarm", {"sha256": "0" * 64}, 400, "sha256"),
        ("unload", {"sha256": "x"}, 400, "sha256"),
        ("unload", {"sha256": "0" * 64, "model": "bot"}, 400, "sha256"),
        ("pin", {"model": 3}, 400, "model"),
        ("pin", {"modle": "bot"}, 400, "modle"),
    ],
)
async def test_wrong_actions_are_refused_by_name(
    service: Service, admin: httpx2.AsyncClient, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    service.add_version("ada", "bot")
    answer = await admin.post(f"{URL}/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert service.base.operations == []


async def test_unknown_bases_are_not_found_and_only_admins_may_look(
    service: Service, admin: httpx2.AsyncClient
) -> None:
    assert (await admin.get("/v1/tuneloom/bases/x/y")).status_code == 404
    assert (await admin.post("/v1/tuneloom/bases/x/y/pin", json={"model": "bot"})).status_code == 404
    assert (await admin.get("/v1/tuneloom/bases/gpt-old")).json()["id"] == BASE
    async with service.http(service.key("ada", ("inference", "training"))) as http:
        for path in ("", f"/{BASE}", f"/{BASE}/adapters"):
            assert (await http.get(f"/v1/tuneloom/bases{path}")).status_code == 403
        for action in ("prewarm", "pin", "unpin", "unload"):
            assert (await http.post(f"{URL}/{action}", json={"model": "bot"})).status_code == 403


async def test_a_base_that_is_not_running_is_shown_as_such(service: Service, admin: httpx2.AsyncClient) -> None:
    async def fail(*_: Any, **__: Any) -> Any:
        raise Overloaded("The base is not running.")

    service.base.on_each_replica = fail  # type: ignore[method-assign]
    shown = (await admin.get(URL)).json()
    assert (shown["problem"], shown["replicas"]) == ("The base is not running.", [])


async def test_a_replica_follows_the_pins_of_the_store(service: Service, store: Store) -> None:
    first, second = (service.add_version("ada", "bot", number).adapter for number in (1, 2))
    pinned: set[str] = set()

    async def pin(ref: AdapterRef, is_pinned: bool) -> None:
        if is_pinned and ref == second and not is_loadable:
            raise Overloaded("It cannot be read.")
        (pinned.add if is_pinned else pinned.discard)(ref.sha256)

    is_loadable = False
    follower = PinFollower(store.records, BASE, pin, every_s=0.01)
    async with service.http(service.key("ada", ("admin",))) as http:
        for model in ("bot@v1", "bot@v2"):
            await act(http, "pin", model=model)
        await follower.start()
        assert pinned == {first.sha256}
        is_loadable = True
        await follower.follow_once()
        assert pinned == {first.sha256, second.sha256}
        await act(http, "unpin", model="bot@v1")
        await follower.follow_once()
        assert pinned == {second.sha256}
    await follower.stop()


async def test_what_operators_do_to_adapters_is_in_the_audit_log(service: Service, admin: httpx2.AsyncClient) -> None:
    version = service.add_version("eve", "bot")
    for action in ("prewarm", "pin", "unpin", "unload"):
        await act(admin, action, model="bot", owner="eve")
    entries = [
        stored.value for stored in service.store.records.audit_entries.query({"owner": "eve"}, order_by="created_at")
    ]
    done = ("prewarmed", "pinned", "unpinned", "unloaded")
    assert [entry.action for entry in entries] == [f"base.adapter.{participle}" for participle in done]
    for entry in entries:
        assert (entry.actor.owner, entry.target.name, entry.target.id) == ("ada", "bot", version.adapter.sha256)
        assert (entry.data, entry.actor.request_id is not None) == ({"base": BASE}, True)


async def test_the_audit_log_tells_the_client_behind_a_trusted_proxy(settings: Settings, store: Store) -> None:
    limits = settings.limits.model_copy(update={"trusted_proxies": ("127.0.0.0/8",)})
    service = make_service(settings.model_copy(update={"limits": limits}), store)
    service.add_version("ada", "bot")
    async with service.http(service.key("ada", ("admin",))) as http:
        http.headers["x-forwarded-for"] = "6.6.6.6, 2001:db8::7"
        await act(http, "pin", model="bot")
    (entry,) = [s.value for s in store.records.audit_entries.query({"action": "base.adapter.pinned"})]
    assert entry.actor.address == "2001:db8::7"
