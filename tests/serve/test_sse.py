import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from tuneloom.serve.sse import DONE, HEARTBEAT, EventStream, event, with_heartbeats

pytestmark = pytest.mark.anyio


async def slow(closed: list[str]) -> AsyncGenerator[bytes, None]:
    try:
        await asyncio.sleep(0.35)
        yield b"a"
        await asyncio.sleep(60)
    finally:
        closed.append("closed")


def test_an_event_is_one_line_whatever_its_text() -> None:
    text = "é\n\r\x0b\x0c\x1c\x85\u2028\u2029🙂"
    data = event({"text": text}).decode()
    assert len(data.splitlines()) == 2
    assert "é" in data and json.loads(data.removeprefix("data: ")) == {"text": text}
    assert DONE == b"data: [DONE]\n\n"


async def test_silence_is_filled_with_comments_and_loses_nothing() -> None:
    closed: list[str] = []
    events = with_heartbeats(slow(closed), every_s=0.1)
    seen = []
    async for data in events:
        seen.append(data)
        if data == b"a":
            break
    await events.aclose()
    assert seen[-1] == b"a" and seen[:-1] and set(seen[:-1]) == {HEARTBEAT}
    assert closed == ["closed"]


async def test_a_connection_that_breaks_while_sending_closes_the_source() -> None:
    closed: list[str] = []

    async def send(message: dict[str, Any]) -> None:
        if message.get("body"):
            raise OSError("broken pipe")

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    await asyncio.wait_for(EventStream(slow(closed))({"type": "http"}, receive, send), 10)
    assert closed == ["closed"]


async def test_a_cancelled_response_closes_the_source() -> None:
    closed: list[str] = []

    async def send(message: dict[str, Any]) -> None:
        return

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    response = EventStream(with_heartbeats(slow(closed)))
    task = asyncio.create_task(response({"type": "http"}, receive, send))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == ["closed"]


async def test_a_response_cancelled_while_its_source_closes_waits_for_that() -> None:
    # Serve cancels a request whose client has left, at about the moment when the application sees it leave.
    closed: list[str] = []

    async def source() -> AsyncGenerator[bytes, None]:
        try:
            yield b"a"
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            closed.append("closed")

    async def send(message: dict[str, Any]) -> None:
        return

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    response = EventStream(with_heartbeats(source()))
    task = asyncio.create_task(response({"type": "http"}, receive, send))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == ["closed"]
