import asyncio
from collections import deque

import pytest
from starlette.types import Message

from tuneloom.serve.flow import EXTENSION, WINDOW_BYTES, ApplicationEnd, ConnectionEnd

pytestmark = pytest.mark.anyio

MB = 1 << 20
MOST_BYTES = WINDOW_BYTES + 2 * MB


class Serve:
    """What Serve does between proxy and replica: it takes both ways all there is, at once, into queues without end."""

    def __init__(self, app) -> None:
        self._app = app
        self.most_bytes = 0
        self.seen: list[Message] = []

    async def __call__(self, scope, receive, send) -> None:
        incoming, outgoing = _Pile(self), _Pile(self)

        async def take() -> None:
            while True:
                await incoming.put(message := await receive())
                if message["type"] == "http.disconnect":
                    return

        async def run() -> None:
            await self._app(scope, incoming.get, outgoing.put)
            await outgoing.put({"type": "end"})

        tasks = [asyncio.ensure_future(take()), asyncio.ensure_future(run())]
        try:
            while (message := await outgoing.get())["type"] != "end":
                await send(message)
        finally:
            for task in tasks:
                task.cancel()


class _Pile:
    def __init__(self, serve: Serve) -> None:
        self._serve, self._messages, self._filled, self._bytes = serve, deque(), asyncio.Event(), 0

    async def put(self, message: Message) -> None:
        self._serve.seen.append(message)
        self._messages.append(message)
        self._bytes += len(message.get("body", b""))
        self._serve.most_bytes = max(self._serve.most_bytes, self._bytes)
        self._filled.set()

    async def get(self) -> Message:
        while not self._messages:
            self._filled.clear()
            await self._filled.wait()
        message = self._messages.popleft()
        self._bytes -= len(message.get("body", b""))
        return message


class Client:
    """Sends megabytes as fast as they are taken, and takes a megabyte every few turns of the loop."""

    def __init__(self, num_mb: int = 0, *, method: str = "POST", length: str | None = None, leaves: bool = False):
        self._left, self._leaves, self._over = num_mb, leaves, asyncio.Event()
        headers = [] if length is None else [(b"content-length", length.encode())]
        self.scope = {"type": "http", "method": method, "path": "/", "headers": headers}
        self.got: list[Message] = []

    async def receive(self) -> Message:
        await asyncio.sleep(0)
        if self._left > 0:
            self._left -= 1
            return {"type": "http.request", "body": b"x" * MB, "more_body": self._left > 0 or self._leaves}
        if not self._leaves:
            await self._over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        self.got.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.got)


async def reads_slowly(scope, receive, send) -> None:
    size, message = 0, {"more_body": True}
    while message.get("more_body"):
        for _ in range(20):
            await asyncio.sleep(0)
        message = await receive()
        size += len(message.get("body", b""))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"{message['type']} {size}".encode()})


async def sends_much(scope, receive, send) -> None:
    """As Starlette's streams: it listens for the client's end beside."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    listening = asyncio.ensure_future(listen())
    await asyncio.sleep(0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for number in range(30):
        await send({"type": "http.response.body", "body": bytes([number]) * MB, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
    listening.cancel()


async def run(app, client: Client) -> Serve:
    serve = Serve(ApplicationEnd(app))
    async with asyncio.timeout(60):
        await ConnectionEnd(serve)(client.scope, client.receive, client.send)
    assert all(message["type"] != EXTENSION for message in client.got)
    return serve


@pytest.mark.parametrize("length", [None, str(30 * MB), "+1"], ids=["chunked", "announced", "nonsense"])
async def test_a_large_body_never_stands_whole_between_client_and_application(length):
    client = Client(30, length=length)
    serve = await run(reads_slowly, client)
    assert client.body == f"http.request {30 * MB}".encode()
    assert serve.most_bytes <= MOST_BYTES


async def test_a_client_that_leaves_in_the_middle_is_noticed():
    client = Client(10, leaves=True)
    await run(reads_slowly, client)
    assert client.body == f"http.disconnect {10 * MB}".encode()


async def test_an_application_that_refuses_a_body_need_not_read_it():
    async def refuses(scope, receive, send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await send({"type": "http.response.body", "body": b"too large"})

    client = Client(30)
    await run(refuses, client)
    assert client.body == b"too large"


async def test_a_large_answer_waits_for_a_client_that_reads_slowly():
    client = Client(method="GET")
    serve = await run(sends_much, client)
    assert client.body == b"".join(bytes([number]) * MB for number in range(30))
    assert serve.most_bytes <= MOST_BYTES


async def test_an_application_that_does_not_listen_is_not_held_up():
    async def deaf(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (10 * MB), "more_body": True})
        await send({"type": "http.response.body", "body": b"x"})

    client = Client(method="GET")
    await run(deaf, client)
    assert len(client.body) == 10 * MB + 1


async def test_small_requests_go_as_they_are():
    client = Client(1, length=str(MB))
    serve = await run(reads_slowly, client)
    assert client.body == f"http.request {MB}".encode()
    assert all(message["type"] != EXTENSION for message in serve.seen)
