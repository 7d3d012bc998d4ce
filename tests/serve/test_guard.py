import json

import pytest
from starlette.types import Message, Receive, Scope, Send

from tuneloom.serve.guard import Guard


def scope(**headers: str) -> Scope:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": "GET", "path": "/", "headers": pairs}


async def call(app, request: Scope) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    await Guard(app)(request, receive, send)
    return sent


def streaming(*bodies: bytes, is_whole: bool, content_type: str = "text/event-stream; charset=utf-8"):
    async def app(request: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type.encode())]}
        )
        for body in bodies:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if is_whole:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


@pytest.mark.anyio
async def test_a_stream_whose_server_died_ends_in_an_error_event() -> None:
    sent = await call(streaming(b'data: {"a": 1}\n\n', b'data: {"b', is_whole=False), scope())

    text = b"".join(message.get("body", b"") for message in sent).decode()
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-2])["error"]["code"] == "stream_interrupted"
    assert events[-1] == "[DONE]"
    assert sent[-1]["more_body"] is False


@pytest.mark.anyio
async def test_a_whole_stream_gets_nothing_added() -> None:
    sent = await call(streaming(b"data: [DONE]\n\n", is_whole=True), scope())
    assert [message["body"] for message in sent[1:]] == [b"data: [DONE]\n\n", b""]


@pytest.mark.anyio
async def test_a_broken_answer_that_is_no_stream_stays_broken() -> None:
    sent = await call(streaming(b"{", is_whole=False, content_type="application/json"), scope())
    assert sent[-1]["body"] == b"{"


@pytest.mark.anyio
async def test_a_steering_header_is_refused_and_an_unsound_id_replaced() -> None:
    app = streaming(b"x", is_whole=True)
    refused = await call(app, scope(x_request_timeout_seconds="0"))
    assert refused[0]["status"] == 400
    kept = await call(app, scope(x_request_id="mine-1"))
    assert (b"x-request-id", b"mine-1") in kept[0]["headers"]
    replaced = await call(app, scope(x_request_id="a b\t"))
    assert dict(replaced[0]["headers"])[b"x-request-id"].startswith(b"req_")
