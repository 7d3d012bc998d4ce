"""The applications on a real local Ray: HTTP in, frames between processes, what happens when one of them dies, and what
usage a killed gateway, a killed base and a clean end leave.

In this order: usage is counted from the start of the base, and the last test ends the cluster.
"""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import httpx2
import openai
import pytest
from openai import OpenAI

from tests.parts import servers
from tests.serve.clusters import Cluster, eventually, ray_cluster
from tests.serve.conftest import BASE
from tuneloom.bases import add_folder
from tuneloom.config import BaseSettings, EngineSettings, GatewaySettings, Settings, read_pepper
from tuneloom.control import keys
from tuneloom.control.models import import_adapter
from tuneloom.domain import Amounts
from tuneloom.serve.app import base_app
from tuneloom.store import Store, open_store, usage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

HI: Any = [{"role": "user", "content": "hello"}]
# Sixteen choices up to the end of the context, none of which may end before: seconds of work.
LONG: Any = {"model": BASE, "messages": HI, "n": 16, "max_tokens": 480, "logit_bias": {"2": -100}}
RECOVERY_S = 60.0
LOST_S = 5.0
NAMES = {BASE, "bot@v1"}
TOOL: Any = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


@dataclass
class Counted(Cluster):
    """With its store, which usage is read from, and what ends it."""

    store: Store
    life: ExitStack

    def used(self) -> Amounts:
        """Of all owners together."""
        found = usage.read(self.store.records, "2000", "2100")
        assert all(one.used.model in NAMES and one.used.key_id.startswith("key_") for one in found)
        return sum((one.amounts for one in found), Amounts())

    def is_all_counted(self) -> bool:
        """Whether all that the device has done since the base's start is on somebody's account."""
        return self.used().device_s == pytest.approx(self.stats().busy_s, abs=1e-3)


@pytest.fixture(scope="module")
def cluster(tiny_base: Path, tiny_adapters: list[Path]) -> Iterator[Counted]:
    with tempfile.TemporaryDirectory(prefix="tlt", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        base = add_folder(home / "bases", tiny_base, BASE)
        settings = Settings(
            home=home,
            bases=(BaseSettings(id=BASE, engine=EngineSettings(threads=1, dtype="fp32")),),
            gateway=GatewaySettings(port=servers.free_port()),
        )
        store = open_store(settings)
        scopes = ("inference", "account")
        key = keys.mint(store.records, read_pepper(settings), owner="ada", scopes=scopes).secret
        for owner, adapter in (("ada", tiny_adapters[0]), ("eve", tiny_adapters[1])):
            import_adapter(store, owner, base, "bot", adapter, max_rank=64)
        eve = keys.mint(store.records, read_pepper(settings), owner="eve").secret
        with ExitStack() as life:
            life.enter_context(ray_cluster(home / "ray", settings))
            yield Counted(f"http://127.0.0.1:{settings.gateway.port}", key, eve, store, life)
        store.close()
        shutil.rmtree(home / "ray", ignore_errors=True)


def answers(cluster: Cluster) -> bool:
    return bool(cluster.client(timeout=20).chat.completions.create(model=BASE, messages=HI, max_tokens=2).choices)


def ask(cluster: Cluster, **more: Any) -> Any:
    return cluster.client().chat.completions.create(**{"model": BASE, "messages": HI, **more}).usage


def test_answers_are_counted(cluster: Counted) -> None:
    said = [ask(cluster, max_tokens=8, n=2), ask(cluster, max_tokens=8, tools=[TOOL])]
    eventually(lambda: cluster.used().requests == 2, 3 * LOST_S)
    found = cluster.used()
    assert found.input_tokens == sum(one.prompt_tokens for one in said)
    assert found.output_tokens == sum(one.completion_tokens for one in said)
    page = cluster.get(f"/v1/tuneloom/usage?start_time={int(time.time()) - 3600}&group_by=model").json()
    results = [result for bucket in page["data"] for result in bucket["results"]]
    assert sum(result["output_tokens"] for result in results) == found.output_tokens
    assert {result["model"] for result in results} == {BASE}
    assert cluster.get("/v1/organization/costs?start_time=0").status_code == 403


def test_chat_and_text_answer_whole_and_streamed(cluster: Cluster) -> None:
    client = cluster.client()
    whole = client.chat.completions.create(model=BASE, messages=HI, temperature=0, max_tokens=8)
    stream = client.chat.completions.create(model=BASE, messages=HI, temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
    assert whole.usage and whole.usage.completion_tokens <= 8
    by_url = OpenAI(api_key=cluster.key, base_url=f"{cluster.url}/v1/{quote(BASE, safe='')}", max_retries=0)
    assert by_url.completions.create(model=BASE, prompt=[5, 6], max_tokens=3).model == BASE
    assert cluster.get("/readyz").status_code == 200


def test_one_name_is_another_model_for_each_owner(cluster: Cluster) -> None:
    def say(client: OpenAI, model: str) -> str | None:
        answer = client.chat.completions.create(model=model, messages=HI, temperature=0, max_tokens=16)
        return answer.choices[0].message.content

    ada, eve = cluster.client(), cluster.client(api_key=cluster.key_of_eve)
    assert len({say(ada, BASE), say(ada, "bot"), say(eve, "bot")}) == 3
    assert say(ada, "bot") == say(ada, "bot@v1")


def test_errors_of_the_replica_keep_their_status_through_ray(cluster: Cluster) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            cluster.client().chat.completions.create(model=BASE, messages=HI, max_tokens=5000, stream=stream)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_serves_proxy_obeys_none_of_a_clients_headers_and_answers_one_request_id(cluster: Cluster) -> None:
    ours = cluster.get("/v1/models", x_session_id="a", serve_multiplexed_model_id="b")
    theirs = cluster.get("/v1/models", x_request_id="trace-1")
    refused = cluster.get("/v1/models", x_request_timeout_seconds="0")
    (request_id,) = ours.headers.get_list("x-request-id")
    assert request_id.startswith("req_")
    assert theirs.headers.get_list("x-request-id") == ["trace-1"]
    assert (refused.status_code, len(refused.headers.get_list("x-request-id"))) == (400, 1)


def test_a_body_of_100_mb_is_a_413(cluster: Cluster) -> None:
    response = httpx.post(
        f"{cluster.url}/v1/completions",
        content=b" " * 100_000_000,
        headers={"authorization": f"Bearer {cluster.key}"},
        timeout=60,
    )
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_a_client_that_leaves_frees_its_slots(cluster: Cluster) -> None:
    stream = cluster.client().chat.completions.create(**LONG, stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    assert cluster.stats().running == 16
    stream.close()
    eventually(lambda: cluster.stats().running == 0, 10)

    with pytest.raises(openai.APITimeoutError):
        cluster.client(timeout=1.0).chat.completions.create(**LONG)
    eventually(lambda: cluster.stats().running == 0, 10)


def test_a_gateway_that_is_killed_comes_back_leaves_no_work_behind_and_loses_no_usage(cluster: Counted) -> None:
    eventually(cluster.is_all_counted, 3 * LOST_S)
    requests = cluster.used().requests
    killed, before = cluster.pid("gateway"), cluster.stats().tokens_generated
    stream = cluster.client().chat.completions.create(**LONG, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    os.kill(killed, signal.SIGKILL)
    with pytest.raises((openai.APIError, httpx2.TransportError)):
        list(stream)
    eventually(lambda: cluster.stats().running == 0, 20)
    assert cluster.stats().tokens_generated - before < LONG["n"] * LONG["max_tokens"]
    eventually(cluster.is_all_counted, 3 * LOST_S)
    assert cluster.used().requests == requests + 1
    eventually(lambda: cluster.pid("gateway") != killed, RECOVERY_S)
    assert eventually(lambda: answers(cluster), RECOVERY_S) < RECOVERY_S


def test_a_base_that_is_killed_loses_the_usage_of_the_last_seconds_at_most(cluster: Counted) -> None:
    eventually(cluster.is_all_counted, 3 * LOST_S)
    before, generated = cluster.used().output_tokens, cluster.stats().tokens_generated
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
    found = cluster.used().output_tokens - before
    assert least > 100 and found >= 0.95 * least, (least, found, samples)
    for thread in threads:
        thread.join(120)
    eventually(lambda: answers(cluster), RECOVERY_S)


def give_up(cluster: Cluster) -> None:
    """Ask for much; the answer breaks off."""
    try:
        list(cluster.client(timeout=120).chat.completions.create(**LONG, stream=True))
    except (openai.APIError, httpx2.TransportError):
        return


def test_a_base_that_is_killed_ends_its_streams_in_an_error_and_comes_back(cluster: Cluster) -> None:
    stream = cluster.client().chat.completions.create(**LONG, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    os.kill(cluster.pid(base_app(BASE)), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="ended in the middle") as caught:
        list(stream)
    assert caught.value.code == "overloaded"
    assert eventually(lambda: answers(cluster), RECOVERY_S) < RECOVERY_S


def test_a_request_that_is_not_answered_yet_survives_the_death_of_the_base(cluster: Cluster) -> None:
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(lambda: cluster.client(timeout=120).chat.completions.create(**LONG))
        eventually(lambda: cluster.stats().running > 0, 10)
        os.kill(cluster.pid(base_app(BASE)), signal.SIGKILL)
        assert len(whole.result(timeout=120).choices) == 16


def test_a_control_that_is_killed_is_replaced(cluster: Cluster) -> None:
    killed = cluster.pid("control")
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: cluster.pid("control") != killed, RECOVERY_S)


def test_an_answer_right_before_the_clusters_end_is_counted(cluster: Counted) -> None:
    eventually(lambda: answers(cluster), RECOVERY_S)
    time.sleep(LOST_S + 1)  # until all before is counted
    before = cluster.used()
    said = ask(cluster, max_tokens=5, temperature=0)
    cluster.life.close()
    after = cluster.used()
    assert after.requests == before.requests + 1
    assert after.output_tokens == before.output_tokens + said.completion_tokens
