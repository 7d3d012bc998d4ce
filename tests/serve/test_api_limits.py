import asyncio
import time

import pytest

from tests.serve.conftest import BASE, Service, make_service
from tuneloom.config import LimitsSettings, Settings
from tuneloom.domain import Allowance, Rates
from tuneloom.store import Store

pytestmark = pytest.mark.anyio
LIMITS = "/v1/tuneloom/limits"
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def service(settings: Settings, store: Store) -> Service:
    owner = Allowance(rates=Rates(requests_per_minute=10), light_per_minute=30, tokens_per_month=500)
    return make_service(settings.model_copy(update={"limits": LimitsSettings(owner=owner)}), store)


async def test_anybody_sees_their_own_limits_and_what_is_left(service: Service) -> None:
    key = service.key(rates=Rates(tokens_per_minute=1000))
    async with service.http(key) as http:
        for _ in range(3):
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
        body = (await http.get(LIMITS)).json()
        again = (await http.get(LIMITS)).json()

    assert (body["owner"], body["is_shared"]) == ("ada", False)
    assert body["limits"]["rates"]["requests_per_minute"] == 10
    assert {entry["limit"] for entry in body["rates"]} == {"requests per minute", "tokens per minute"}
    left = {(entry["whose"].split()[0], entry["value"]): entry["remaining"] for entry in body["rates"]}
    # Three calls of seven tokens each, and this request itself.
    assert left == {("key", 1000): 979, ("owner", 10): 7, ("owner", 30): 29}
    assert [entry["remaining"] for entry in again["rates"]] == [979, 7, 28]
    assert body["month"] == {"tokens": 0, "cost": None, "tokens_limit": 500, "cost_limit": None}


async def test_nobody_sees_the_limits_of_others(service: Service) -> None:
    async with service.http(service.key()) as http:
        await http.post("/v1/chat/completions", json=CHAT)
    async with service.http(service.key("bob")) as http:
        body = (await http.get(LIMITS)).json()
        assert (await http.get(LIMITS + "/ada")).status_code == 403
    assert "ada" not in str(body)
    assert {entry["value"]: entry["remaining"] for entry in body["rates"]} == {10: 10, 30: 29}


async def test_what_an_admin_sets_counts_within_five_seconds(service: Service) -> None:
    key, admin = service.key(), service.key("root", scopes=("admin",))
    async with service.http(key) as http, service.http(admin) as operator:
        assert (await http.get(LIMITS)).json()["limits"]["max_concurrent"] is None
        put = await operator.put(LIMITS + "/ada", json={"max_concurrent": 7})
        changed = time.monotonic()
        assert put.status_code == 200
        while (await http.get(LIMITS)).json()["limits"]["max_concurrent"] != 7:
            assert time.monotonic() - changed < 5
            await asyncio.sleep(0.5)
