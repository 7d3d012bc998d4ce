"""Server-sent events: framing, heartbeats, errors as events, and the end of a stream when its reader leaves.

Knows nothing of what the events say.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

HEARTBEAT_S = 15.0
HEARTBEAT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


# Ends of lines to `str.splitlines`, by which many a reader takes a stream apart, though not to JSON nor to SSE.
_LINE_ENDS = "\x85\u2028\u2029"


def event(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for char in _LINE_ENDS:
        text = text.replace(char, f"\\u{ord(char):04x}")
    return f"data: {text}\n\n".encode()


async def guarded(
    events: AsyncGenerator[bytes, None], describe: Callable[[Exception], Mapping[str, Any]]
) -> AsyncGenerator[bytes, None]:
    """`events` and the end mark; a failure becomes an error event, since the status is out already."""
    try:
        async for data in events:
            yield data
    except Exception as error:
        yield event(describe(error))
    finally:
        await events.aclose()
    yield DONE


async def with_heartbeats(
    events: AsyncGenerator[bytes, None], every_s: float = HEARTBEAT_S
) -> AsyncGenerator[bytes, None]:
    """`events`, with a comment in each silence of `every_s`, so that no proxy between takes the stream for dead."""
    coming: asyncio.Future[bytes] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(events))
            while not (await asyncio.wait({coming}, timeout=every_s))[0]:
                yield HEARTBEAT
            try:
                data = coming.result()
            except StopAsyncIteration:
                return
            yield data
    finally:
        try:
            if coming is not None:
                await _end(coming)
        finally:
            await events.aclose()


class EventStream(Response):
    """Sends events as they come. When the client leaves or sending fails, `events` is closed before this returns."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await until_disconnect(receive, self._pump(send))
        except (ClientGone, OSError):
            pass
        finally:
            await self._events.aclose()

    async def _pump(self, send: Send) -> None:
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; cancels it and raises ClientGone if the client leaves first. The body was read before."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        try:
            await _end(working)
        finally:
            await _end(watching)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it has cleaned up; its result was used, or is of no use.

    Being cancelled does not cut that short: a generator that still runs cannot be closed by whoever comes next.
    """
    cancelled: asyncio.CancelledError | None = None
    if not task.done():
        task.cancel()
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if not task.cancelled():
        task.exception()
    if cancelled is not None:
        raise cancelled


async def each(events: AsyncIterator[Mapping[str, Any]]) -> AsyncGenerator[bytes, None]:
    async for data in events:
        yield event(data)
