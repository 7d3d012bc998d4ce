"""The wire, by the real OpenAI client over the real application; only the base is scripted."""

import asyncio
import json
import math
import subprocess
import sys
from typing import Any
from urllib.parse import quote

import openai
import pytest
from openai import AsyncOpenAI

from tests.serve.conftest import BASE, Service, hello, make_service
from tuneloom.config import Settings
from tuneloom.errors import ContextLengthExceeded, Overloaded, TuneloomError
from tuneloom.generation import Delta, Finished, Started, TokenLogprob, Usage
from tuneloom.serve.upstream import ReplicaLost
from tuneloom.store import Store

pytestmark = pytest.mark.anyio
HI: Any = [{"role": "user", "content": "hi"}]


async def test_a_chat_answer_has_openais_shape(service: Service, client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=BASE, messages=HI)

    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", BASE)
    assert answer.choices[0].message.model_dump(exclude_none=True) == {
        "role": "assistant",
        "content": "Hello",
        "annotations": [],
    }
    assert (answer.choices[0].finish_reason, answer.choices[0].logprobs) == ("stop", None)
    assert answer.usage and answer.usage.prompt_tokens_details
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 2, 7)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.system_fingerprint and answer.system_fingerprint.startswith("fp_")
    assert service.base.requests[0].owner == "ada"


async def test_a_chat_stream_is_role_text_finish_and_usage(service: Service, client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=BASE, messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    assert {(chunk.id, chunk.created, chunk.object, chunk.model) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, "chat.completion.chunk", BASE)
    }
    first, *texts, finish, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in texts] == ["Hel", "lo"]
    assert finish.choices[0].delta.model_dump(exclude_none=True) == {}
    assert finish.choices[0].finish_reason == "stop"
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    assert usage.choices == [] and usage.usage and usage.usage.total_tokens == 7


async def test_a_stream_without_usage_ends_in_done_and_never_mentions_usage(service: Service) -> None:
    async with service.http(service.key()) as http:
        response = await http.post("/v1/chat/completions", json={"model": BASE, "messages": HI, "stream": True})

    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    assert "usage" not in response.text


async def test_each_choice_of_n_has_its_own_text_and_reason(service: Service, client: AsyncOpenAI) -> None:
    frames = [
        Started(5),
        [Delta(1, "b"), Delta(0, "a")],
        [Delta(0, "A", finish_reason="stop"), Delta(1, "B", finish_reason="length")],
        Finished(Usage(5, 4)),
    ]
    service.base.play(*frames)
    service.base.play(*frames)

    answer = await client.chat.completions.create(model=BASE, messages=HI, n=2)
    stream = await client.chat.completions.create(model=BASE, messages=HI, n=2, stream=True)
    chunks = [chunk async for chunk in stream]

    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (0, "aA", "stop"),
        (1, "bB", "length"),
    ]
    assert [chunk.choices[0].index for chunk in chunks[:2]] == [0, 1]
    assert service.base.requests[0].params.n == 2


async def test_chat_logprobs_carry_bytes_and_alternatives(service: Service, client: AsyncOpenAI) -> None:
    entry = TokenLogprob("é", -0.5, (195, 169), (TokenLogprob("e", -math.inf, (101,)),))
    service.base.play(Started(1), [Delta(0, "é", (entry,), "length")], Finished(Usage(1, 1)))

    answer = await client.chat.completions.create(model=BASE, messages=HI, logprobs=True, top_logprobs=1)

    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    token = answer.choices[0].logprobs.content[0]
    assert (token.token, token.logprob, token.bytes) == ("é", -0.5, [195, 169])
    assert [(other.token, other.logprob) for other in token.top_logprobs] == [("e", -9999.0)]


async def test_text_completions_answer_several_prompts_with_legacy_logprobs(
    service: Service, client: AsyncOpenAI
) -> None:
    a, b = TokenLogprob("né", -0.1, tuple("né".encode())), TokenLogprob("b", -0.2, (98,))
    frames = [
        Started(2),
        [Delta(0, "né", (a,)), Delta(1, "b", (b,), "length")],
        [Delta(0, "b", (b,), "stop")],
        Finished(Usage(2, 3)),
    ]
    service.base.play(*frames)
    service.base.play(*frames)

    answer = await client.completions.create(model=BASE, prompt=["x", "y"], logprobs=0)
    stream = await client.completions.create(model=BASE, prompt=["x", "y"], logprobs=0, stream=True)
    chunks = [chunk async for chunk in stream]

    assert (answer.object, answer.id[:5]) == ("text_completion", "cmpl-")
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [(0, "néb", "stop"), (1, "b", "length")]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (["né", "b"], [-0.1, -0.2], [0, 2])
    assert [(c.choices[0].index, c.choices[0].text) for c in chunks] == [(0, "né"), (1, "b"), (0, "b")]
    assert chunks[-1].choices[0].logprobs and chunks[-1].choices[0].logprobs.text_offset == [2]


async def test_a_refusal_of_the_replica_is_a_status_also_for_a_stream(service: Service, client: AsyncOpenAI) -> None:
    for stream in (False, True):
        service.base.play(ContextLengthExceeded("This model's maximum context length is 8.", param="messages"))
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=BASE, messages=HI, stream=stream)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


async def test_an_overloaded_base_says_when_to_come_back(service: Service, client: AsyncOpenAI) -> None:
    service.base.play(Overloaded("Too many requests wait.", retry_after_s=1.5))
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model=BASE, messages=HI)
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.response.headers["retry-after-ms"] == "1500"


@pytest.mark.parametrize(
    ("error", "code"), [(ReplicaLost("The process ended."), "overloaded"), (RuntimeError("secret detail"), None)]
)
async def test_a_stream_that_breaks_ends_in_an_error_event_and_done(
    service: Service, client: AsyncOpenAI, error: Exception, code: str | None
) -> None:
    script = [Started(5), [Delta(0, "Hel")], error]
    service.base.play(*script)
    service.base.play(*script)

    texts = []
    with pytest.raises(openai.APIError) as caught:
        async for chunk in await client.chat.completions.create(model=BASE, messages=HI, stream=True):
            texts.append(chunk.choices[0].delta.content)
    async with service.http(service.key()) as http:
        response = await http.post("/v1/chat/completions", json={"model": BASE, "messages": HI, "stream": True})

    assert texts == ["", "Hel"]
    assert caught.value.code == code
    assert "secret" not in caught.value.message
    *_, last, done, _ = response.text.split("\n\n")
    assert set(json.loads(last.removeprefix("data: "))["error"]) == {"message", "type", "param", "code"}
    assert done == "data: [DONE]"


async def test_a_replica_lost_before_the_first_text_is_not_noticed(service: Service, client: AsyncOpenAI) -> None:
    service.base.play(Started(5), ReplicaLost("gone"))
    chunks = [c async for c in await client.chat.completions.create(model=BASE, messages=HI, stream=True)]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello"
    assert sum(c.choices[0].delta.role == "assistant" for c in chunks) == 1

    service.base.play(Started(5), [Delta(0, "Bro")], ReplicaLost("gone"))
    answer = await client.chat.completions.create(model=BASE, messages=HI)
    assert answer.choices[0].message.content == "Hello"
    assert (len(service.base.requests), service.base.closed) == (4, 4)


async def test_a_replica_lost_twice_is_a_503_to_retry(service: Service, client: AsyncOpenAI) -> None:
    service.base.play(ReplicaLost("gone", retry_after_s=5))
    service.base.play(ReplicaLost("gone", retry_after_s=5))
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model=BASE, messages=HI)
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "5")


async def test_an_unexpected_error_is_a_500_that_names_only_the_request(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.base.play(RuntimeError("/secret/path"))
    async with service.http(service.key()) as http:
        response = await http.post(
            "/v1/chat/completions", json={"model": BASE, "messages": HI}, headers={"x-request-id": "my-id-1"}
        )
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "my-id-1" in response.json()["error"]["message"] and "secret" not in response.text
    assert sum("my-id-1" in record.getMessage() for record in caplog.records) == 1


async def test_a_client_that_leaves_ends_the_generation(service: Service) -> None:
    for body in ({"stream": True}, {}):
        service.base.play(Started(5), [Delta(0, "a")], 60.0)
        sent: list[dict[str, Any]] = []
        await asyncio.wait_for(leave_after_text(service, body, sent), 10)
        assert sent[0]["status"] == (200 if body else 499)
    assert service.base.closed == 2


async def leave_after_text(service: Service, more: dict[str, Any], sent: list[dict[str, Any]]) -> None:
    """One request whose client disconnects once the base is at work."""
    body = json.dumps({"model": BASE, "messages": HI, **more}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    service.base.is_asleep.clear()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await service.base.is_asleep.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {service.key()}".encode())],
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    await service.app(scope, receive, send)


async def test_a_model_may_be_named_in_the_url(service: Service) -> None:
    key, name = service.key(), "a" * 64
    version = service.add_version("ada", name)
    for model in (BASE, name, f"{name}@v1", version.ft_name, "gpt-old"):
        async with service.openai(key, f"/v1/{quote(model, safe='')}") as client:
            chat = await client.post("/chat/completions", body={"messages": HI}, cast_to=object)
            text = await client.completions.create(model=model, prompt="x")
            models = await client.models.list()
        assert chat["model"] == text.model == model
        assert [entry.id for entry in models.data] == [model]
    async with service.openai(key, f"/v1/{BASE}") as client:
        with pytest.raises(openai.BadRequestError, match="differs"):
            await client.chat.completions.create(model=name, messages=HI)


async def test_the_adapter_of_the_name_goes_to_the_base(service: Service, client: AsyncOpenAI) -> None:
    first = service.add_version("ada", "bot", 1)
    await client.chat.completions.create(model="bot", messages=HI)
    second = service.add_version("ada", "bot", 2)
    await client.chat.completions.create(model="bot", messages=HI)
    await client.chat.completions.create(model="bot@v1", messages=HI)
    assert [request.adapter for request in service.base.requests] == [first.adapter, second.adapter, first.adapter]


async def test_a_foreign_and_an_absent_model_look_the_same(service: Service, client: AsyncOpenAI) -> None:
    service.add_version("eve", "bot")
    for name in ("bot", "nothing", "../bot", "gpt-gone", "x" * 600, "bot@v1"):
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model=name, messages=HI)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert "does not exist or you do not have access to it" in caught.value.message
    assert service.base.requests == []


async def test_the_client_lists_and_retrieves_models_through_the_same_door(
    service: Service, client: AsyncOpenAI
) -> None:
    service.add_version("ada", "bot")
    assert {"bot", BASE} <= {model.id for model in (await client.models.list()).data}
    assert (await client.models.retrieve(BASE)).id == BASE


@pytest.mark.parametrize(
    ("authorization", "code", "says"),
    [
        (None, None, "did not provide an API key"),
        ("Basic abc", None, "did not provide an API key"),
        ("Bearer ", None, "did not provide an API key"),
        ("Bearer sk-unknown", "invalid_api_key", "Incorrect API key provided: ***"),
        ("Bearer sk-" + "a" * 40, "invalid_api_key", "sk-aaa...aaaa"),
        ("Bearer sk-a b", "invalid_api_key", "Incorrect API key"),
        ("Bearer sk-\xe9" + "a" * 40, "invalid_api_key", "Incorrect API key"),
        ("Bearer " + "x" * 5000, "invalid_api_key", "Incorrect API key"),
    ],
)
async def test_a_bad_key_is_a_401_that_masks_it(
    service: Service, authorization: str | None, code: str | None, says: str
) -> None:
    headers = {"authorization": authorization.encode("latin-1")} if authorization else {}
    async with service.http() as http:
        response = await http.get("/v1/models", headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (401, "invalid_request_error", code)
    assert says in error["message"] and "a" * 20 not in error["message"]


async def test_a_key_without_the_inference_scope_may_not_generate(service: Service) -> None:
    async with service.openai(service.key(scopes=("training",))) as client:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await client.chat.completions.create(model=BASE, messages=HI)
    assert caught.value.code == "insufficient_permissions"


async def test_every_answer_has_openais_headers(service: Service) -> None:
    async with service.http(service.key()) as http:
        responses = [
            await http.post("/v1/chat/completions", json={"model": BASE, "messages": HI}),
            await http.post("/v1/chat/completions", json={"model": BASE, "messages": HI, "stream": True}),
            await http.post("/v1/chat/completions", content=b"{"),
            await http.get("/v1/nowhere"),
        ]
    for response in responses:
        assert response.headers["x-request-id"].startswith("req_")
        assert response.headers["openai-version"] == "2020-10-01"
        assert response.headers["openai-processing-ms"].isdigit()
        assert response.headers["openai-organization"] == "ada"
    assert len({response.headers["x-request-id"] for response in responses}) == 4


async def test_a_sound_request_id_of_the_client_is_kept_and_another_replaced(service: Service) -> None:
    async with service.http(service.key()) as http:
        sound = await http.get("/v1/models", headers={"x-request-id": "trace-7"})
        unsound = await http.get("/v1/models", headers={"x-request-id": "a b\xe9".encode("latin-1")})
    assert sound.headers.get_list("x-request-id") == ["trace-7"]
    assert unsound.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nowhere", 404, "unknown_url"),
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/v1//etc/passwd", 404, "unknown_url"),
    ],
)
async def test_an_unknown_url_is_an_error_object(
    service: Service, method: str, path: str, status: int, code: str
) -> None:
    async with service.http(service.key()) as http:
        response = await http.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert f"{method} {path}" in response.json()["error"]["message"]


async def test_a_body_over_the_limit_is_refused_while_it_arrives(service: Service) -> None:
    arrived = 0

    async def endless() -> Any:
        nonlocal arrived
        while arrived < 1 << 30:
            arrived += 1 << 20
            yield b" " * (1 << 20)

    async with service.http(service.key()) as http:
        declared = await http.post("/v1/completions", content=b"{}", headers={"content-length": "100000000"})
        streamed = await http.post("/v1/completions", content=endless())
    for response in (declared, streamed):
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert arrived <= service.settings.gateway.max_body_bytes + (2 << 20)


async def test_a_body_that_does_not_arrive_is_a_408(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloom.serve.ingress.BODY_TIMEOUT_S", 0.1)

    async def stuck() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    async with service.http(service.key()) as http:
        response = await http.post("/v1/completions", content=stuck())
    assert (response.status_code, response.json()["error"]["type"]) == (408, "invalid_request_error")


@pytest.mark.parametrize("header", ["x-request-timeout-seconds", "X-Request-Disconnect-Disabled"])
async def test_headers_that_steer_serve_are_refused(service: Service, header: str) -> None:
    async with service.http(service.key()) as http:
        response = await http.get("/v1/models", headers={header: "0"})
    assert response.status_code == 400
    assert header.lower() in response.json()["error"]["message"]


async def test_a_browser_may_call_and_read_the_headers(service: Service) -> None:
    async with service.http(service.key()) as http:
        preflight = await http.options(
            "/v1/models",
            headers={
                "origin": "https://a.example",
                "access-control-request-method": "GET",
                "access-control-request-headers": "authorization",
            },
        )
        error = await http.get("/v1/nowhere", headers={"origin": "https://a.example"})
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == "*"
    assert error.headers["access-control-allow-origin"] == "*"
    assert "x-request-id" in error.headers["access-control-expose-headers"].lower()


async def test_live_and_ready_need_no_key_and_ready_asks_the_bases(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneloom.serve.ingress.READY_TIMEOUT_S", 0.2)
    async with service.http() as http:
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).status_code == 200
        service.base.is_up = False
        not_ready = await http.get("/readyz")
    assert (not_ready.status_code, not_ready.json()["failing"]) == (503, [BASE])


async def test_a_cold_base_answers_soon_that_it_is_coming_and_when_to_ask_again(
    service: Service, client: AsyncOpenAI
) -> None:
    for stream in (False, True):
        service.base.starts_in_s = 60.0
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=BASE, messages=HI, stream=stream)
        assert (caught.value.status_code, caught.value.code) == (503, "model_loading")
        assert caught.value.response.headers["retry-after"] == "7"
    async with service.http() as http:
        assert (await http.get("/readyz")).status_code == 200
    assert service.base.requests == []


@pytest.mark.parametrize("prefer", ["wait=20", "respond-async, wait=20", 'Wait="20"; foo'])
async def test_a_client_that_prefers_to_wait_for_a_cold_base_gets_its_answer(
    service: Service, client: AsyncOpenAI, prefer: str
) -> None:
    service.base.starts_in_s = 0.8
    answer = await client.chat.completions.create(model=BASE, messages=HI, extra_headers={"prefer": prefer})
    assert answer.choices[0].message.content == "Hello"


@pytest.mark.parametrize("prefer", ["wait=", "wait=-1", "await=20", "wait=1e9", "wait=0"])
async def test_no_other_wish_makes_it_wait(service: Service, client: AsyncOpenAI, prefer: str) -> None:
    service.base.starts_in_s = 60.0
    with pytest.raises(openai.InternalServerError, match="being loaded"):
        await client.chat.completions.create(model=BASE, messages=HI, extra_headers={"prefer": prefer})


async def test_a_request_over_its_time_ends_and_is_not_to_be_repeated(settings: Settings, store: Store) -> None:
    gateway = settings.gateway.model_copy(update={"request_timeout_s": 0.3})
    service = make_service(settings.model_copy(update={"gateway": gateway}), store)
    service.base.play(Started(5), [Delta(0, "a")], 60.0)
    async with service.openai(service.key()) as client:
        with pytest.raises(openai.InternalServerError, match="longer than") as caught:
            await client.chat.completions.create(model=BASE, messages=HI)
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert service.base.closed == 1


async def test_an_answer_that_the_model_failed_on_is_an_error(service: Service, client: AsyncOpenAI) -> None:
    service.base.play(*hello(finish_reason="error"))
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model=BASE, messages=HI)
    service.base.play(Started(5), [Delta(0, "a")])
    with pytest.raises(openai.InternalServerError, match="before it was complete"):
        await client.chat.completions.create(model=BASE, messages=HI)
    service.base.play(Started(5), TuneloomError("The step failed."))
    with pytest.raises(openai.APIError, match="step failed"):
        async for _ in await client.chat.completions.create(model=BASE, messages=HI, stream=True):
            pass


def test_the_ingress_imports_neither_torch_nor_transformers_nor_ray() -> None:
    heavy = "{'torch', 'transformers', 'ray'}"
    code = f"import sys, tuneloom.serve.ingress, tuneloom.serve.app; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
