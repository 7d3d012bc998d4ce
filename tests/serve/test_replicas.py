"""Several replicas of a base and of the gateway on a real local Ray: who gets which request, how many there are, and
what they count together.
"""

import asyncio
import concurrent.futures
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.parts import servers
from tests.serve.clusters import Cluster, eventually, ray_cluster
from tests.serve.conftest import BASE
from tuneloom.bases import add_folder
from tuneloom.config import BaseSettings, EngineSettings, GatewaySettings, LimitsSettings, Settings, read_pepper
from tuneloom.control import audit, keys, owner_limits
from tuneloom.control.models import import_adapter
from tuneloom.domain import Allowance, Rates
from tuneloom.errors import TuneloomError
from tuneloom.serve.app import base_app
from tuneloom.serve.placement import rendezvous
from tuneloom.store import open_store

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

PAIR, RARE, GROWING = BASE, "tiny/rare", "tiny/growing"
HI: Any = [{"role": "user", "content": "hello"}]
START_S = 90.0
# Of eve: calls of models. Of an address: wrong keys in a minute.
PER_DAY, REFUSED = 10, 3


@pytest.fixture(scope="module")
def cluster(tiny_base: Path, tiny_adapters: list[Path], redis_server: servers.Server) -> Iterator[Cluster]:
    engine = EngineSettings(threads=1, dtype="fp32")
    small = EngineSettings(threads=1, dtype="fp32", max_sequences=2)
    quick = {"scale_window_s": 1.0, "scale_up_delay_s": 0.5, "scale_down_delay_s": 2.0, "scale_to_zero_delay_s": 2.0}
    with tempfile.TemporaryDirectory(prefix="tlt", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        settings = Settings(
            home=home,
            bases=(
                BaseSettings(id=PAIR, engine=engine, replicas=2),
                BaseSettings(id=RARE, engine=engine, min_replicas=0, **quick),
                BaseSettings(id=GROWING, engine=small, max_replicas=2, target_waiting_tokens=5, **quick),
            ),
            base_aliases={},
            gateway=GatewaySettings(port=servers.free_port(), replicas=2),
            limits=LimitsSettings(
                redis_url=f"redis://{redis_server.address}/0", redis_timeout_s=10, refused_per_minute=REFUSED
            ),
        )
        added = {base.id: add_folder(home / "bases", tiny_base, base.id) for base in settings.bases}
        store = open_store(settings)
        for number, adapter in enumerate(tiny_adapters):
            import_adapter(store, "ada", added[PAIR], f"bot-{number}", adapter, max_rank=64)
        key, of_eve = (keys.mint(store.records, read_pepper(settings), owner=owner).secret for owner in ("ada", "eve"))
        few = Allowance(rates=Rates(requests_per_day=PER_DAY))
        owner_limits.put(store.records, "eve", few, audit.cli_actor())
        store.close()
        with ray_cluster(home / "ray", settings):
            yield Cluster(f"http://127.0.0.1:{settings.gateway.port}", key, of_eve)
        shutil.rmtree(home / "ray", ignore_errors=True)


def ask(cluster: Cluster, model: str, **more: Any) -> str | None:
    client = cluster.client(timeout=120)
    answer = client.chat.completions.create(model=model, messages=HI, temperature=0, **{"max_tokens": 4, **more})
    return answer.choices[0].message.content


def on_each(base: str, method: str) -> dict[str, Any]:
    """What a method says on every replica of a base that answers, by the replica's id."""
    from tuneloom.serve.handles import ServeBase

    answers = asyncio.run(ServeBase(base, "").on_each_replica(method))
    return {id: answer for id, answer in answers.items() if not isinstance(answer, TuneloomError)}


def used(base: str) -> dict[str, set[str]]:
    """The adapters that each replica has worked with."""
    return {replica: {use.adapter.sha256 for use in uses} for replica, uses in on_each(base, "uses").items()}


def test_each_adapter_has_its_replica_and_a_killed_ones_adapters_move(cluster: Cluster) -> None:
    eventually(lambda: len(cluster.pids(base_app(PAIR))) == 2, START_S)
    names = [f"bot-{number}" for number in range(4)]
    first = {name: [ask(cluster, name) for _ in range(3)] for name in names}
    seen = used(PAIR)
    adapters = set.union(*seen.values())
    assert len(adapters) == 4 and sum(map(len, seen.values())) == 4
    assert all(sha256 in seen[rendezvous(sha256, seen)[0]] for sha256 in adapters)

    gone = max(seen, key=lambda replica: len(seen[replica]))
    os.kill(cluster.pids(base_app(PAIR))[gone], signal.SIGKILL)
    assert {name: ask(cluster, name) for name in names} == {name: answers[0] for name, answers in first.items()}
    (left,) = set(seen) - {gone}
    assert used(PAIR)[left] == adapters

    eventually(lambda: len(on_each(PAIR, "uses")) == 2, START_S)
    (newcomer,) = set(used(PAIR)) - {left}
    warm = {sha256 for sha256 in adapters if rendezvous(sha256, [left, newcomer])[0] == newcomer}
    assert on_each(PAIR, "stats")[newcomer].adapter_loads == len(warm)


def test_many_calls_inside_one_request_are_all_answered(cluster: Cluster) -> None:
    from ray import serve
    from ray.serve import context

    handle = serve.get_app_handle(base_app(PAIR))
    token = context._serve_request_context.set(context._RequestContext(_internal_request_id="the-same"))
    try:
        for key in ("", "an-adapter/"):
            calls = [handle.options(session_id=key).operate.remote("stats", ()) for _ in range(12)]
            assert len([call.result(timeout_s=30) for call in calls]) == 12
    finally:
        context._serve_request_context.reset(token)


def test_no_header_steers_a_request(cluster: Cluster) -> None:
    ask(cluster, "bot-0")
    before = used(PAIR)
    for header in ("x-session-id", "x_session_id", "serve_multiplexed_model_id", "serve-multiplexed-model-id"):
        for value in ("steered/", "0" * 64):
            ask(cluster, "bot-0", extra_headers={header: value})
    assert used(PAIR) == before


def test_a_rare_base_starts_when_it_is_asked_and_ends_when_it_is_not(cluster: Cluster) -> None:
    app = base_app(RARE)
    assert cluster.pids(app) == {} and cluster.get("/readyz").status_code == 200
    assert on_each(RARE, "stats") == {}
    asked_at = time.monotonic()
    with pytest.raises(openai.InternalServerError) as caught:
        ask(cluster, RARE)
    assert (caught.value.status_code, caught.value.code) == (503, "model_loading")
    assert 2 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert time.monotonic() - asked_at < 10
    eventually(lambda: len(cluster.pids(app)) == 1, START_S)
    assert ask(cluster, RARE)

    eventually(lambda: cluster.pids(app) == {}, START_S)
    assert cluster.get("/readyz").status_code == 200
    assert ask(cluster, RARE, extra_headers={"prefer": f"wait={START_S:.0f}"})
    eventually(lambda: cluster.pids(app) == {}, START_S)


def test_tokens_that_wait_bring_a_second_replica_and_quiet_ends_it(cluster: Cluster) -> None:
    app = base_app(GROWING)
    assert len(cluster.pids(app)) == 1
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        long = {"max_tokens": 400, "logit_bias": {"2": -100}}
        calls = [pool.submit(ask, cluster, GROWING, **long) for _ in range(48)]
        eventually(lambda: len(cluster.pids(app)) == 2, START_S)
        assert all(call.result(timeout=120) for call in calls)
    eventually(lambda: len(cluster.pids(app)) == 1, START_S)
    assert httpx.get(f"{cluster.url}/readyz", timeout=30).status_code == 200


def call(cluster: Cluster, key: str, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    # Each on a connection of its own, so that both gateways get some.
    return httpx.post(
        f"{cluster.url}/v1/chat/completions",
        json={"model": "nothing", "messages": HI},
        headers={"authorization": f"Bearer {key}", **named},
        timeout=30,
    )


def test_two_gateways_let_as_many_in_as_the_limit_says(cluster: Cluster) -> None:
    answers = [call(cluster, cluster.key_of_eve) for _ in range(PER_DAY + 5)]
    assert [answer.status_code for answer in answers] == [404] * PER_DAY + [429] * 5
    headers = {"authorization": f"Bearer {cluster.key_of_eve}"}
    shown = [httpx.get(f"{cluster.url}/v1/tuneloom/limits", headers=headers, timeout=30).json() for _ in range(6)]
    assert all(each["is_shared"] for each in shown)
    assert {rate["remaining"] for each in shown for rate in each["rates"] if rate["value"] == PER_DAY} == {0}


def test_a_client_cannot_say_where_it_comes_from(cluster: Cluster) -> None:
    """Serve's proxy is uvicorn, which would believe whoever calls from this machine."""
    answers = [call(cluster, f"sk-wrong-{i}", x_forwarded_for=f"198.51.100.{i}") for i in range(2 * REFUSED)]
    assert [answer.status_code for answer in answers] == [401] * REFUSED + [429] * REFUSED
