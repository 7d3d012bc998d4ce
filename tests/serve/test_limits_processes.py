"""The limit of a whole service: several gateways, each a process of its own, on one Redis."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from tests.parts import servers
from tests.serve.conftest import BASE, PEPPER
from tuneloom.config import BaseSettings, LimitsSettings, Settings
from tuneloom.control import keys
from tuneloom.domain import Allowance, Rates
from tuneloom.store import Store

pytestmark = pytest.mark.anyio
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}

# The real application over the store and the Redis of the test; only the base is scripted.
GATEWAY = """
import sys
import uvicorn
from tests.serve.conftest import PEPPER, FakeBase
from tuneloom.config import Settings
from tuneloom.serve.ingress import Context, make_app
from tuneloom.store import open_store

settings = Settings.model_validate_json(sys.argv[1])
base = FakeBase()
app = make_app(Context(settings, open_store(settings), PEPPER, lambda _: base, lambda: None))
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", lifespan="off")
"""


@pytest.fixture
def settings(tmp_path: Path, redis_url: str) -> Settings:
    limits = LimitsSettings(
        redis_url=redis_url,
        redis_timeout_s=10,
        owner=Allowance(rates=Rates(requests_per_day=100, tokens_per_minute=1_000_000), max_concurrent=1000),
    )
    return Settings(home=tmp_path, bases=(BaseSettings(id=BASE),), limits=limits)


@pytest.fixture
def gateways(settings: Settings, store: Store) -> Iterator[list[str]]:
    """The URLs of three."""
    with ExitStack() as running:
        ports = [servers.free_port() for _ in range(3)]
        for port in ports:
            command = [sys.executable, "-c", GATEWAY, settings.model_dump_json(), str(port)]
            running.enter_context(servers.running(command, port, cwd=Path(__file__).parents[2]))
        yield [f"http://127.0.0.1:{port}" for port in ports]


async def test_of_500_calls_at_once_at_three_gateways_exactly_100_pass(gateways: list[str], store: Store) -> None:
    secrets = [keys.mint(store.records, PEPPER, owner="ada", scopes=("inference",)).secret for _ in range(2)]
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=60, limits=limits, trust_env=False) as http:

        async def call(i: int) -> httpx2.Response:
            headers = {"authorization": f"Bearer {secrets[i % 2]}"}
            return await http.post(f"{gateways[i % 3]}/v1/chat/completions", json=CHAT, headers=headers)

        answers = await asyncio.gather(*(call(i) for i in range(500)))
        statuses = [answer.status_code for answer in answers]
        assert (statuses.count(200), statuses.count(429)) == (100, 400)
        assert [(await call(i)).status_code for i in range(3)] == [429] * 3
        left = [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers]
        assert sorted(left[i] for i, status in enumerate(statuses) if status == 200) == list(range(100))

        # What was reserved is given back, seven tokens a call stay; 400 refused calls took none.
        async def used() -> int:
            headers = {"authorization": f"Bearer {secrets[0]}"}
            body = (await http.get(f"{gateways[0]}/v1/tuneloom/limits", headers=headers)).json()
            return next(1_000_000 - each["remaining"] for each in body["rates"] if "tokens" in each["limit"])

        deadline = asyncio.get_running_loop().time() + 10
        while await used() != 700:
            assert asyncio.get_running_loop().time() < deadline, await used()
            await asyncio.sleep(0.1)
