"""The applications on a real local Ray: HTTP in, frames between processes, and what happens when one of them dies."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import httpx2
import openai
import pytest
from openai import OpenAI

from tests.serve.clusters import Cluster, eventually, free_port, ray_cluster
from tests.serve.conftest import BASE
from tuneloom.bases import add_folder
from tuneloom.config import BaseSettings, EngineSettings, GatewaySettings, Settings, read_pepper
from tuneloom.control import keys
from tuneloom.control.models import import_adapter
from tuneloom.serve.app import base_app
from tuneloom.store import open_store

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

HI: Any = [{"role": "user", "content": "hello"}]
# Sixteen choices up to the end of the context, none of which may end before: seconds of work.
LONG: Any = {"model": BASE, "messages": HI, "n": 16, "max_tokens": 480, "logit_bias": {"2": -100}}
RECOVERY_S = 60.0


@pytest.fixture(scope="module")
def cluster(tiny_base: Path, tiny_adapters: list[Path]) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="tlt", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        base = add_folder(home / "bases", tiny_base, BASE)
        settings = Settings(
            home=home,
            bases=(BaseSettings(id=BASE, engine=EngineSettings(threads=1, dtype="fp32")),),
            gateway=GatewaySettings(port=free_port()),
        )
        store = open_store(settings)
        key = keys.mint(store.records, read_pepper(settings), owner="ada").secret
        for owner, adapter in (("ada", tiny_adapters[0]), ("eve", tiny_adapters[1])):
            import_adapter(store, owner, base, "bot", adapter, max_rank=64)
        eve = keys.mint(store.records, read_pepper(settings), owner="eve").secret
        store.close()
        with ray_cluster(home / "ray", settings):
            yield Cluster(f"http://127.0.0.1:{settings.gateway.port}", key, eve)
        shutil.rmtree(home / "ray", ignore_errors=True)


def answers(cluster: Cluster) -> bool:
    return bool(cluster.client(timeout=20).chat.completions.create(model=BASE, messages=HI, max_tokens=2).choices)


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


def test_a_base_that_is_killed_ends_its_streams_in_an_error_and_comes_back(cluster: Cluster) -> None:
    stream = cluster.client().chat.completions.create(**LONG, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    os.kill(cluster.pid(base_app(BASE)), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="ended in the middle") as caught:
        list(stream)
    assert caught.value.code == "overloaded"
    assert eventually(lambda: answers(cluster), RECOVERY_S) < RECOVERY_S


def test_a_request_that_is_not_answered_yet_survives_the_death_of_the_base(cluster: Cluster) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(lambda: cluster.client(timeout=120).chat.completions.create(**LONG))
        eventually(lambda: cluster.stats().running > 0, 10)
        os.kill(cluster.pid(base_app(BASE)), signal.SIGKILL)
        assert len(whole.result(timeout=120).choices) == 16


def test_a_gateway_that_is_killed_comes_back_and_leaves_no_work_behind(cluster: Cluster) -> None:
    killed, before = cluster.pid("gateway"), cluster.stats().tokens_generated
    stream = cluster.client().chat.completions.create(**LONG, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    os.kill(killed, signal.SIGKILL)
    with pytest.raises((openai.APIError, httpx2.TransportError)):
        list(stream)
    eventually(lambda: cluster.stats().running == 0, 20)
    assert cluster.stats().tokens_generated - before < LONG["n"] * LONG["max_tokens"]
    eventually(lambda: cluster.pid("gateway") != killed, RECOVERY_S)
    assert eventually(lambda: answers(cluster), RECOVERY_S) < RECOVERY_S


def test_a_control_that_is_killed_is_replaced(cluster: Cluster) -> None:
    killed = cluster.pid("control")
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: cluster.pid("control") != killed, RECOVERY_S)
