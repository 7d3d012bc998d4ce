"""Keeps large bodies from piling up between the connection and the application.

Serve takes what comes from a client, and what the application sends, as fast as it comes and keeps it in memory until
the other side has asked for it: a file of 512 MB stood whole in proxy and replica. So the two ends of that way tell
each other how many bytes have arrived, in messages of a type of their own that go the way of the bodies, and neither
sends more than `WINDOW_BYTES` ahead. Nothing of it reaches a client or the application.
"""

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# In a scope's extensions, which clients cannot write to: there is an end at the connection.
EXTENSION = "tuneloom.flow"
WINDOW_BYTES = 4 << 20
TOLD_EVERY_BYTES = WINDOW_BYTES // 4


class ConnectionEnd:
    """ASGI: at the connection, where Serve's proxy begins. There must be an `ApplicationEnd` behind it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _may_be_large(scope):
            await self._app(scope, receive, send)
            return
        flow = _AtConnection(receive, send)
        extensions = {**(scope.get("extensions") or {}), EXTENSION: {}}
        try:
            await self._app({**scope, "extensions": extensions}, flow.receive, flow.send)
        finally:
            flow.close()


class ApplicationEnd:
    """ASGI: before the application. Without an end at the connection it does nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and EXTENSION in (scope.get("extensions") or {}):
            flow = _AtApplication(receive, send)
            receive, send = flow.receive, flow.send
        await self._app(scope, receive, send)


def _may_be_large(scope: Scope) -> bool:
    """Whether the body of the request, or of the answer to a GET, could be larger than the window."""
    length = Headers(scope=scope).get("content-length", "")
    return scope["method"] == "GET" or not length.isdecimal() or int(length[:20]) > WINDOW_BYTES


class _Flow:
    """One end: it counts the bytes that it passes on to the other end, waits when too many are under way, and tells of
    those that have come from there.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._passed = self._arrived = 0
        self._handed = self._told = 0
        self._credit = asyncio.Event()

    def _pass(self, message: Message) -> None:
        self._passed += len(message.get("body", b""))

    def _hand(self, message: Message) -> Message | None:
        """Count what was handed on; the message that tells of it, when it is time."""
        self._handed += len(message.get("body", b""))
        if self._handed - self._told < TOLD_EVERY_BYTES:
            return None
        self._told = self._handed
        return {"type": EXTENSION, "bytes": self._told}

    def _hear(self, message: Message) -> bool:
        """Whether it was a message of the other end."""
        if message["type"] != EXTENSION:
            return False
        self._arrived = max(self._arrived, message["bytes"])
        self._credit.set()
        return True

    async def _wait(self, is_over: Callable[[], bool] = lambda: False) -> None:
        """Until there is room in the window."""
        while self._passed - self._arrived > WINDOW_BYTES and not is_over():
            self._credit.clear()
            await self._credit.wait()


class _AtConnection(_Flow):
    """Passes on bodies of requests, and hands those of answers to the client. Close it."""

    def __init__(self, receive: Receive, send: Send) -> None:
        super().__init__(receive, send)
        self._next: asyncio.Task[Message] | None = None
        self._news: asyncio.Queue[Message] = asyncio.Queue()

    async def receive(self) -> Message:
        """The next of the client, or what there is to tell the application's end."""
        await self._wait()
        if self._next is None:
            self._next = asyncio.ensure_future(self._receive())
        news = asyncio.ensure_future(self._news.get())
        try:
            await asyncio.wait({self._next, news}, return_when=asyncio.FIRST_COMPLETED)
            if news.done():
                return news.result()
        finally:
            news.cancel()
        message, self._next = self._next.result(), None
        self._pass(message)
        return message

    async def send(self, message: Message) -> None:
        if self._hear(message):
            return
        await self._send(message)
        if (told := self._hand(message)) is not None:
            self._news.put_nowait(told)

    def close(self) -> None:
        if self._next is not None:
            self._next.cancel()


class _AtApplication(_Flow):
    """Passes on bodies of answers, and hands those of requests to the application."""

    def __init__(self, receive: Receive, send: Send) -> None:
        super().__init__(receive, send)
        self._num_listening = 0
        self._is_gone = False

    async def receive(self) -> Message:
        self._num_listening += 1
        try:
            while self._hear(message := await self._receive()):
                pass
        finally:
            self._num_listening -= 1
            # Who waits for room looks whether anybody still listens.
            self._credit.set()
        if message["type"] == "http.disconnect":
            self._is_gone = True
        elif (told := self._hand(message)) is not None:
            await self._send(told)
        return message

    async def send(self, message: Message) -> None:
        # While nobody listens, nothing can be heard of the other end.
        await self._wait(lambda: self._is_gone or not self._num_listening)
        self._pass(message)
        await self._send(message)
