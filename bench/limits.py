"""What the key check and the limits add to a request whose key is known: the same call of the real application with
them and without, one after another, over a base that computes nothing.

The call meets ten limits: requests by minute and day and tokens by minute of its key and of its owner, requests and
tokens of its model, and calls under way of owner and key. They are counted in a Redis of the script's own, in memory,
or by the library `limits`, one hit after another, as it would be done without a script in Redis.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, ClassVar

import redis
import redis.asyncio
import uvloop
from limits import RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.storage import storage_from_string
from starlette.middleware import Middleware

from bench.machine import ForeignLoad, describe
from bench.report import Report
from tests.parts import servers
from tuneloom.config import BaseSettings, LimitsSettings, Settings, read_pepper
from tuneloom.control import keys
from tuneloom.domain import Allowance, Principal, Rates
from tuneloom.generation import Delta, Finished, Frame, GenerationRequest, Started, Usage
from tuneloom.serve.auth import Authentication
from tuneloom.serve.ingress import Context, make_app
from tuneloom.serve.limits_middleware import Limited, WrongKeys
from tuneloom.store import open_store

BASE = "bench/stub"
OWNER = "bench"
MANY = 1_000_000_000
BODY = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "Is it so?"}], "max_tokens": 16}).encode()
BARE, UNLIMITED, MEMORY, REDIS = (
    "neither key nor limits",
    "key, no limits",
    "key, limits in memory",
    "key, limits in Redis",
)
LIBRARY = "`limits` alone, 8 hits one after another"
WANTED_MS = 1.0
WARM_UPS = 20
IDLE_S = 3.0


class StubBase:
    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Frame, None]:
        yield Started(8)
        yield [Delta(0, "It is so.", finish_reason="stop")]
        yield Finished(Usage(8, 4))

    async def wake(self, wait_s: float) -> None: ...

    stats = is_cold = on_each_replica = wake


class Unlimited:
    """In the place of key check and limits: a caller who is let through."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        principal = Principal(owner=OWNER, key_id="key_bench", scopes=("inference",))
        scope["state"] = {**scope.get("state", {}), "principal": principal, "gate": _Open()}
        await self._app(scope, receive, send)


class _Open:
    headers: ClassVar[dict[str, str]] = {}

    async def admit(self, call: Any, target: Any) -> "_Open":
        return self

    def watch(self, bases: Any) -> Any:
        return bases


def main(arguments: list[str] | None = None) -> Report:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--reps", type=int, default=1500, help="requests of each side")
    options.add_argument("--pause-ms", type=float, default=2.0, help="between two requests")
    options.add_argument("--quick", action="store_true", help="few: to see that the script works")
    options.add_argument("--threads", type=int, default=1, help="not used: the application has one")
    options.add_argument("--home", type=Path, help="not used: the store is a scratch one")
    options.add_argument("--json", type=Path, help="also write the result there")
    parsed = options.parse_args(arguments)
    count = 20 if parsed.quick else parsed.reps
    report = Report(
        "limits",
        describe(1),
        {"requests of each side": count, "limits": "8 windows, 2 places", "pause_ms": parsed.pause_ms},
    )
    with (
        servers.redis() as ours,
        servers.redis() as librarys,
        tempfile.TemporaryDirectory() as folder,
        ForeignLoad() as load,
    ):
        urls = [f"redis://{server.address}/0" for server in (ours, librarys)]
        idle_share = _idle_share(urls[0])
        began, used_s = time.perf_counter(), _used_s(urls[0])
        # The loop that Ray gives to its replicas.
        walls, cpus = uvloop.run(_measure(Path(folder), urls[0], urls[1], count, parsed.pause_ms / 1000))
        used_s = _used_s(urls[0]) - used_s - idle_share * (time.perf_counter() - began)
        redis_ms = report.add("processor of Redis", "ms", [used_s * 1000 / (count + WARM_UPS)]).median
    report.foreign_share = load.share
    for name, values in walls.items():
        report.add(name, "ms", values)
        report.add(f"{name}, processor", "ms", cpus[name])
    for name in (UNLIMITED, MEMORY, REDIS):
        added = [with_ms - without_ms for with_ms, without_ms in zip(walls[name], walls[BARE], strict=True)]
        report.ratio(f"{name}: added", statistics.median(added), WANTED_MS, is_limit=True, unit=" ms")
        calm = _quarter(walls[name]) - _quarter(walls[BARE])
        report.ratio(f"{name}: added, requests that were disturbed least", calm, WANTED_MS, is_limit=True, unit=" ms")
        used = statistics.median(cpus[name]) - statistics.median(cpus[BARE])
        where = "gateway and Redis" if name == REDIS else "gateway"
        used += redis_ms if name == REDIS else 0
        report.ratio(f"{name}: added, processor of {where}", used, None, unit=" ms")
    report.notes.append("disturbed least: up to the first quartile of each side")
    report.notes.append("added: the median of the differences of requests that followed each other")
    report.notes.append(
        "the processor's part has the settling too, which the answer does not wait for, and of Redis what it takes "
        "beside its idle ticking; on a busy machine most of the clock's part is waiting for a core"
    )
    report.notes.append(
        "a gateway that gets a request only now and then pays more for each, most of all where it has to wake Redis: "
        "with `--pause-ms 10` it was 1.10 ms where with 2 ms it was 0.96"
    )
    report.finish(parsed.json)
    return report


async def _measure(
    folder: Path, redis_url: str, librarys_url: str, count: int, pause_s: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of each side's requests, of the clock and of this process's processor."""
    sides: dict[str, Callable[[], Any]] = {
        BARE: _app(folder / "a", None, is_bare=True),
        UNLIMITED: _app(folder / "b", LimitsSettings(owner=Allowance())),
        MEMORY: _app(folder / "c", _limits(None)),
        REDIS: _app(folder / "d", _limits(redis_url)),
        LIBRARY: _library(librarys_url),
    }
    walls: dict[str, list[float]] = {name: [] for name in sides}
    cpus: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        for _ in range(WARM_UPS):
            await call()
    for i in range(count):
        for name in sides if i % 2 else reversed(sides):
            wall, cpu = time.perf_counter(), time.process_time()
            await sides[name]()
            # What is settled beside the answer counts for the processor of the request that it belongs to.
            walls[name].append((time.perf_counter() - wall) * 1000)
            await asyncio.sleep(pause_s)
            cpus[name].append((time.process_time() - cpu) * 1000)
    return walls, cpus


def _quarter(values: list[float]) -> float:
    return statistics.quantiles(values, n=4)[0]


def _idle_share(redis_url: str) -> float:
    """The share of a processor that this Redis uses when nobody asks it anything."""
    before = _used_s(redis_url)
    time.sleep(IDLE_S)
    return (_used_s(redis_url) - before) / IDLE_S


def _used_s(redis_url: str) -> float:
    """The processor's time that this Redis has used."""
    with redis.Redis.from_url(redis_url) as admin:
        used = admin.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def _limits(redis_url: str | None) -> LimitsSettings:
    three = Rates(requests_per_minute=MANY, requests_per_day=MANY, tokens_per_minute=MANY)
    two = Rates(requests_per_minute=MANY, tokens_per_minute=MANY)
    owner = Allowance(rates=three, model_rates=two, max_concurrent=MANY, max_concurrent_per_key=MANY)
    return LimitsSettings(redis_url=redis_url, key=three, owner=owner)


def _app(home: Path, limits: LimitsSettings | None, *, is_bare: bool = False) -> Callable[[], Any]:
    settings = Settings(home=home, bases=(BaseSettings(id=BASE),), limits=limits or LimitsSettings())
    store, pepper, base = open_store(settings), read_pepper(settings), StubBase()
    secret = keys.mint(store.records, pepper, owner=OWNER, scopes=("inference",)).secret
    app = make_app(Context(settings, store, pepper, lambda _: base, lambda: None))
    if is_bare:
        kept = [each for each in app.user_middleware if each.cls not in (Authentication, Limited, WrongKeys)]
        app.user_middleware = [*kept, Middleware(Unlimited)]
    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {secret}".encode())]

    async def call() -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [*headers, (b"content-length", str(len(BODY)).encode())],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        bodies = iter([{"type": "http.request", "body": BODY, "more_body": False}])
        status = 0

        async def receive() -> Any:
            if (message := next(bodies, None)) is not None:
                return message
            await asyncio.sleep(3600)

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        await app(scope, receive, send)
        if status != 200:
            raise SystemExit(f"an answer is {status}")

    return call


def _library(redis_url: str) -> Callable[[], Any]:
    pool = redis.asyncio.BlockingConnectionPool.from_url(redis_url, max_connections=20, timeout=2)
    storage = storage_from_string(f"async+{redis_url}", implementation="redispy", connection_pool=pool)
    limiter = SlidingWindowCounterRateLimiter(storage)
    items = [RateLimitItemPerMinute(MANY), RateLimitItemPerDay(MANY), RateLimitItemPerMinute(MANY)] * 2
    items += [RateLimitItemPerMinute(MANY)] * 2

    async def call() -> None:
        for i, item in enumerate(items):
            await limiter.hit(item, "bench", str(i))

    return call


if __name__ == "__main__":
    main(sys.argv[1:])
