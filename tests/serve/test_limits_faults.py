"""Redis is away, hangs, dies or comes back empty: calls go on with limits of each gateway, costly things do not."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from limits import RateLimitItemPerMinute

from tests.parts import servers
from tests.serve.conftest import BASE, PEPPER, FakeBase, Service, eventually, hello
from tuneloom.config import LimitsSettings, Settings
from tuneloom.domain import Allowance, Rates
from tuneloom.errors import Overloaded
from tuneloom.generation import Started
from tuneloom.serve.ingress import Context, make_app
from tuneloom.serve.limits_policy import Cached
from tuneloom.serve.limits_redis import RedisCounters
from tuneloom.serve.limits_window import Charge, Place
from tuneloom.serve.reads import Reads
from tuneloom.store import Store

pytestmark = pytest.mark.anyio
HI = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}
JOB = {"model": BASE, "training_file": "file-x"}
LIMIT = 5
# Longer than the default: the machine may be busy.
TIMEOUT_S = 1.0


class Redis:
    """A server of the test's own on one port, that may be ended and started again."""

    def __init__(self) -> None:
        self.port = servers.free_port()
        self._stack = ExitStack()
        self.server: servers.Server | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.server = self._stack.enter_context(servers.redis(self.port))

    def stop(self) -> None:
        self._stack.close()


@pytest.fixture
def redis(redis_server: servers.Server) -> Iterator[Redis]:
    # `redis_server` marks the test; this one is its own, since it is ended.
    redis = Redis()
    yield redis
    redis.stop()


class Gateway(Service):
    """A gateway whose owners may call five times a minute; `heard` is what it told of who counts."""

    heard: list[bool]

    async def call(self, key: str) -> httpx2.Response:
        async with self.http(key) as http:
            return await http.post("/v1/chat/completions", json=HI)

    async def statuses(self, key: str, times: int) -> list[int]:
        return [(await self.call(key)).status_code for _ in range(times)]


def open_gateway(settings: Settings, store: Store, url: str, max_concurrent: int | None = None) -> Gateway:
    allowance = Allowance(
        rates=Rates(requests_per_minute=LIMIT),
        costly_per_minute=100,
        light_per_minute=1000,
        max_concurrent=max_concurrent,
    )
    settings = settings.model_copy(
        update={"limits": LimitsSettings(redis_url=url, redis_timeout_s=TIMEOUT_S, owner=allowance)}
    )
    base, heard = FakeBase(), []
    context = Context(settings, store, PEPPER, lambda _: base, lambda: None, watch_limits=heard.append)
    gateway = Gateway(settings, store, base, make_app(context), [])
    gateway.heard = heard
    return gateway


@pytest.fixture
def gateway(settings: Settings, store: Store, redis: Redis) -> Gateway:
    return open_gateway(settings, store, redis.url)


async def test_without_redis_calls_go_on_with_own_limits_and_costly_things_wait(
    gateway: Gateway, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    key = gateway.key(scopes=("inference", "training"))
    with caplog.at_level(logging.WARNING):
        assert await gateway.statuses(key, LIMIT + 2) == [200] * LIMIT + [429] * 2
    async with gateway.http(key) as http:
        for path, options in COSTLY.items():
            refused = await http.post(path, **options)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "limits_unavailable"), path
            assert int(refused.headers["retry-after"]) >= 1
        assert (await http.get("/v1/files")).status_code == 200
    assert gateway.heard == [False]
    assert sum("Redis does not count" in record.message for record in caplog.records) == 1

    redis.start()
    await eventually(lambda: gateway.heard == [False, True])
    async with gateway.http(key) as http:
        assert (await http.post("/v1/fine_tuning/jobs", json=JOB)).status_code == 400
    assert "Redis counts again" in caplog.text
    # It has not seen what was counted here meanwhile.
    assert await gateway.statuses(key, LIMIT + 1) == [200] * LIMIT + [429]


COSTLY: dict[str, dict[str, Any]] = {
    "/v1/fine_tuning/jobs": {"json": JOB},
    "/v1/fine_tuning/jobs/ftjob-x/resume": {"json": {}},
    "/v1/files": {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": "fine-tune"}},
    "/v1/uploads": {"json": {}},
    "/v1/tuneloom/keys": {"json": {}},
    "/v1/tuneloom/drafts": {"json": {}},
    "/v1/tuneloom/estimate": {"json": {}},
    "/v1/tuneloom/files/file-x/check": {"json": {}},
    "/v1/tuneloom/models/import": {"json": {}},
}


async def test_redis_dies_and_comes_back_empty(gateway: Gateway, redis: Redis) -> None:
    key = gateway.key()
    redis.start()
    assert await gateway.statuses(key, 3) == [200] * 3
    redis.stop()
    assert await gateway.statuses(key, LIMIT + 1) == [200] * LIMIT + [429]
    assert gateway.heard == [False]

    redis.start()
    await eventually(lambda: gateway.heard == [False, True])
    other = gateway.key("bob")
    assert await gateway.statuses(other, LIMIT + 1) == [200] * LIMIT + [429]


async def test_a_connection_that_was_closed_is_opened_anew_without_a_word(gateway: Gateway, redis: Redis) -> None:
    import redis as client

    key = gateway.key()
    redis.start()
    assert await gateway.statuses(key, 2) == [200] * 2
    with client.Redis.from_url(redis.url) as admin:
        admin.client_kill_filter(_type="normal", skipme=True)
    assert await gateway.statuses(key, LIMIT) == [200] * 3 + [429] * 2
    assert gateway.heard == []


async def test_a_redis_that_hangs_holds_up_one_moment_and_then_nobody(gateway: Gateway, redis: Redis) -> None:
    key = gateway.key()
    redis.start()
    assert await gateway.statuses(key, 2) == [200] * 2
    assert redis.server
    redis.server.pause()
    started = time.monotonic()
    assert await gateway.statuses(key, LIMIT) == [200] * LIMIT
    # Each of them would wait for a second.
    assert time.monotonic() - started < 4
    assert gateway.heard == [False]

    redis.server.resume()
    await eventually(lambda: gateway.heard == [False, True])
    assert await gateway.statuses(gateway.key("bob"), LIMIT + 1) == [200] * LIMIT + [429]


async def test_a_redis_that_takes_no_writes_counts_as_away(gateway: Gateway, redis: Redis) -> None:
    import redis as client

    redis.start()
    with client.Redis.from_url(redis.url) as admin:
        admin.config_set("maxmemory", "1")
        assert await gateway.statuses(gateway.key(), LIMIT + 1) == [200] * LIMIT + [429]
        assert gateway.heard == [False]
        admin.config_set("maxmemory", "0")
    await eventually(lambda: gateway.heard == [False, True])


async def test_a_call_that_began_before_redis_died_ends_well(gateway: Gateway, redis: Redis) -> None:
    key = gateway.key()
    redis.start()
    async with gateway.openai(key) as client:
        stream = await client.chat.completions.create(**HI, stream=True)
        redis.stop()
        assert [chunk async for chunk in stream]
        answer = await client.chat.completions.create(**HI)
    assert answer.choices[0].message.content == "Hello"


async def test_places_of_long_calls_are_renewed_also_in_a_redis_that_forgot_them(
    settings: Settings, store: Store, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    import redis as client

    monkeypatch.setattr("tuneloom.serve.limits.HOLD_EVERY_S", 0.1)
    monkeypatch.setattr("tuneloom.serve.limits_redis.PLACE_LIFE_S", 1.5)
    redis.start()
    gateway = open_gateway(settings, store, redis.url, max_concurrent=1)
    key = gateway.key()
    gateway.base.play(Started(1), 6.0, *hello()[1:])
    long = asyncio.create_task(gateway.call(key))
    await eventually(lambda: len(gateway.base.requests) == 1)
    with client.Redis.from_url(redis.url) as admin:
        admin.flushall()
        await eventually(lambda: admin.exists("{tuneloom}:po:ada") == 1)
    await asyncio.sleep(2)
    assert await gateway.statuses(key, 1) == [429]
    assert (await long).status_code == 200
    assert await gateway.statuses(key, 2) == [200] * 2


async def test_a_busy_event_loop_is_not_taken_for_a_dead_redis(gateway: Gateway, redis: Redis) -> None:
    redis.start()
    key = gateway.key()
    assert await gateway.statuses(key, 1) == [200]

    async def block() -> None:
        for _ in range(4):
            await asyncio.sleep(0)
            time.sleep(0.2)  # noqa: ASYNC251

    answers = await asyncio.gather(gateway.call(key), block(), gateway.call(key))
    assert [answer.status_code for answer in answers if answer] == [200, 200]
    assert gateway.heard == []


async def test_who_leaves_before_redis_answers_has_taken_nothing(redis: Redis) -> None:
    redis.start()
    counters = RedisCounters(redis.url, lambda is_up: None, timeout_s=10)
    charge = Charge("k", RateLimitItemPerMinute(10), "tokens", "x", 4)
    place = Place("p", 1, "x", "y")
    try:
        await counters.take([replace(charge, cost=0)], (), "")
        leaving = asyncio.create_task(counters.take([charge], [place], "gone"))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        deadline = time.monotonic() + 5
        # Its place, at least, was held for a moment, or is not yet.
        while not (taken := await counters.take([charge], [place], "next")).is_admitted:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert (await counters.take([replace(charge, cost=0)], (), "")).levels[0].used == 4
        assert taken.held == (0,)
    finally:
        await counters.close()


async def test_limits_that_were_read_hold_while_the_store_is_away() -> None:
    now, is_away = 0.0, False

    def read(name: str) -> int:
        if is_away:
            raise Overloaded("away")
        return len(name)

    cached = Cached(read, Reads(0.5), fresh_s=2, kept_s=4, stale_s=300, clock=lambda: now)
    assert await cached.get("ada") == 3
    is_away, now = True, 200.0
    assert await cached.get("ada") == 3
    with pytest.raises(Overloaded):
        await cached.get("unknown")
    now = 301.0
    with pytest.raises(Overloaded):
        await cached.get("ada")


async def test_a_password_comes_from_a_file(settings: Settings, store: Store, redis: Redis, tmp_path: Path) -> None:
    import redis as client

    redis.start()
    with client.Redis.from_url(redis.url) as admin:
        admin.config_set("requirepass", "secret word")
    without = open_gateway(settings, store, redis.url)
    assert await without.statuses(without.key(), 1) == [200]
    assert without.heard == [False]

    file = tmp_path / "password"
    file.write_text("secret word\n")
    limits = without.settings.limits.model_copy(update={"redis_password_file": file})
    heard: list[bool] = []
    known = settings.model_copy(update={"limits": limits})
    app = make_app(Context(known, store, PEPPER, lambda _: FakeBase(), lambda: None, watch_limits=heard.append))
    service = Service(known, store, FakeBase(), app, [])
    async with service.http(service.key("bob")) as http:
        assert [(await http.post("/v1/chat/completions", json=HI)).status_code for _ in range(LIMIT + 1)][-1] == 429
    assert heard == []
