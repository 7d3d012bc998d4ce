"""Usage of a real local Ray: what a killed gateway, a killed base and a clean end leave of it."""

import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.serve.clusters import Cluster, eventually, free_port, ray_cluster
from tests.serve.conftest import BASE
from tuneloom.bases import add_folder
from tuneloom.config import BaseSettings, EngineSettings, GatewaySettings, Settings, read_pepper
from tuneloom.control import keys
from tuneloom.domain import Amounts
from tuneloom.serve.app import base_app
from tuneloom.store import Store, open_store, usage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

HI: Any = [{"role": "user", "content": "hello"}]
# Sixteen choices up to the end of the context, none of which may end before: seconds of work.
LONG: Any = {"model": BASE, "messages": HI, "n": 16, "max_tokens": 480, "logit_bias": {"2": -100}}
RECOVERY_S = 60.0
LOST_S = 5.0


def counted(store: Store) -> Amounts:
    found = usage.read(store.records, "2000", "2100", "ada")
    assert all(one.used.model == BASE and one.used.key_id.startswith("key_") for one in found)
    return sum((one.amounts for one in found), Amounts())


def test_usage_survives_what_dies(tiny_base: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tlu", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        add_folder(home / "bases", tiny_base, BASE)
        settings = Settings(
            home=home,
            bases=(BaseSettings(id=BASE, engine=EngineSettings(threads=1, dtype="fp32")),),
            gateway=GatewaySettings(port=free_port()),
        )
        store = open_store(settings)
        scopes = ("inference", "account")
        key = keys.mint(store.records, read_pepper(settings), owner="ada", scopes=scopes).secret
        with ray_cluster(home / "ray", settings):
            cluster = Cluster(f"http://127.0.0.1:{settings.gateway.port}", key, key)
            answers_are_counted(cluster, store)
            a_killed_gateway_loses_nothing(cluster, store)
            a_killed_base_loses_the_last_seconds(cluster, store)
            before = counted(store)
            said = ask(cluster, max_tokens=5, temperature=0)
        # The cluster was ended right after the answer.
        after = counted(store)
        assert after.requests == before.requests + 1
        assert after.output_tokens == before.output_tokens + said.completion_tokens
        store.close()
        shutil.rmtree(home / "ray", ignore_errors=True)


def ask(cluster: Cluster, **more: Any) -> Any:
    return cluster.client().chat.completions.create(**{"model": BASE, "messages": HI, **more}).usage


def answers_are_counted(cluster: Cluster, store: Store) -> None:
    said = [ask(cluster, max_tokens=8, n=2), ask(cluster, max_tokens=8, tools=[TOOL])]
    eventually(lambda: counted(store).requests == 2, LOST_S + 1)
    found = counted(store)
    assert found.input_tokens == sum(one.prompt_tokens for one in said)
    assert found.output_tokens == sum(one.completion_tokens for one in said)
    page = cluster.get(f"/v1/tuneloom/usage?start_time={int(time.time()) - 3600}&group_by=model").json()
    results = [result for bucket in page["data"] for result in bucket["results"]]
    assert sum(result["output_tokens"] for result in results) == found.output_tokens
    assert {result["model"] for result in results} == {BASE}
    assert cluster.get("/v1/organization/costs?start_time=0").status_code == 403


def a_killed_gateway_loses_nothing(cluster: Cluster, store: Store) -> None:
    killed = cluster.pid("gateway")
    stream = cluster.client().chat.completions.create(**LONG, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    os.kill(killed, signal.SIGKILL)
    with pytest.raises((openai.APIError, httpx2.TransportError)):
        list(stream)
    eventually(lambda: cluster.stats().running == 0, 20)
    busy_s = cluster.stats().busy_s
    # All that the device has done since the start is on somebody's account.
    eventually(lambda: counted(store).device_s == pytest.approx(busy_s, abs=1e-3), 3 * LOST_S)
    assert counted(store).requests == 3
    eventually(lambda: cluster.pid("gateway") != killed, RECOVERY_S)
    eventually(lambda: bool(ask(cluster, max_tokens=2)), RECOVERY_S)


def a_killed_base_loses_the_last_seconds(cluster: Cluster, store: Store) -> None:
    eventually(lambda: counted(store).device_s == pytest.approx(cluster.stats().busy_s, abs=1e-3), 3 * LOST_S)
    before, generated = counted(store).output_tokens, cluster.stats().tokens_generated
    threads = [threading.Thread(target=give_up, args=(cluster,), daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    samples = []
    started = time.monotonic()
    while time.monotonic() - started < 2 * LOST_S + 3:
        samples.append((time.monotonic(), cluster.stats().tokens_generated - generated))
        time.sleep(0.2)
    os.kill(cluster.pid(base_app(BASE)), signal.SIGKILL)
    killed_at = time.monotonic()
    least = max(count for at, count in samples if at < killed_at - LOST_S)
    found = counted(store).output_tokens - before
    assert least > 100 and found >= 0.95 * least, (least, found, samples)
    for thread in threads:
        thread.join(120)
    eventually(lambda: bool(ask(cluster, max_tokens=2)), RECOVERY_S)
    eventually(lambda: cluster.stats().running == 0, RECOVERY_S)
    time.sleep(LOST_S)


def give_up(cluster: Cluster) -> None:
    """Ask for much; the answer breaks off."""
    try:
        list(cluster.client(timeout=120).chat.completions.create(**LONG, stream=True))
    except (openai.APIError, httpx2.TransportError):
        return


TOOL: Any = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
