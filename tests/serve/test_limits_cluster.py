"""Two gateways of a real cluster count together in Redis, and believe nobody's `X-Forwarded-For`."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.clusters import eventually, free_port, ray_cluster
from tuneloom.config import GatewaySettings, LimitsSettings, Settings, read_pepper
from tuneloom.control import keys
from tuneloom.domain import Allowance, Rates
from tuneloom.store import open_store

pytestmark = pytest.mark.cluster
CHAT = {"model": "nothing", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, redis_server) -> Settings:  # type: ignore[no-untyped-def]
    limits = LimitsSettings(
        redis_url=f"redis://{redis_server.address}/0",
        redis_timeout_s=10,
        owner=Allowance(rates=Rates(requests_per_day=10)),
        refused_per_minute=3,
    )
    gateway = GatewaySettings(port=free_port(), replicas=2)
    return Settings(home=tmp_path_factory.mktemp("home"), bases=(), gateway=gateway, limits=limits)


@pytest.fixture(scope="module")
def key(settings: Settings) -> Iterator[str]:
    """Of an owner, with the cluster up."""
    store = open_store(settings)
    secret = keys.mint(store.records, read_pepper(settings), owner="ada", scopes=("inference",)).secret
    store.close()
    with tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp") as folder, ray_cluster(Path(folder), settings):
        url = f"http://127.0.0.1:{settings.gateway.port}/readyz"
        eventually(lambda: httpx.get(url, timeout=5).status_code == 200, 60)
        yield secret


def call(settings: Settings, key: str, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    # Each on a connection of its own, so that both gateways get some.
    return httpx.post(
        f"http://127.0.0.1:{settings.gateway.port}/v1/chat/completions",
        json=CHAT,
        headers={"authorization": f"Bearer {key}", **named},
        timeout=30,
    )


def test_two_gateways_let_as_many_in_as_the_limit_says(settings: Settings, key: str) -> None:
    answers = [call(settings, key) for _ in range(15)]
    assert [answer.status_code for answer in answers] == [404] * 10 + [429] * 5
    url = f"http://127.0.0.1:{settings.gateway.port}/v1/tuneloom/limits"
    shown = [httpx.get(url, headers={"authorization": f"Bearer {key}"}, timeout=30).json() for _ in range(6)]
    assert all(each["is_shared"] for each in shown)
    assert {rate["remaining"] for each in shown for rate in each["rates"] if rate["value"] == 10} == {0}


def test_a_client_cannot_say_where_it_comes_from(settings: Settings, key: str) -> None:
    """Serve's proxy is uvicorn, which would believe whoever calls from this machine."""
    answers = [call(settings, f"sk-wrong-{i}", x_forwarded_for=f"198.51.100.{i}") for i in range(6)]
    assert [answer.status_code for answer in answers] == [401] * 3 + [429] * 3
