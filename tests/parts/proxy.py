"""A TCP proxy in front of a part that slows, loses, holds or refuses, as the test says. Knows bytes, no protocol."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, Literal

from tests.parts.servers import HOST, free_port

CALL_TIMEOUT_S = 10.0
_NO_LINGER = struct.pack("ii", 1, 0)

Mode = Literal["forward", "delay", "drop", "refuse", "hang"]


class Proxy:
    """Listens on `address` and connects to `target_port`. Its mode holds for old connections as well as new ones.

    - `forward`: bytes pass.
    - `delay`: replies come `seconds` later.
    - `drop`: requests pass, replies are thrown away. Connections that lost some are reset when the mode changes.
    - `hang`: connections are taken, and bytes of both ways wait until the mode changes.
    - `refuse`: connections are reset, new ones refused.
    """

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self.address = f"{HOST}:{self.port}"
        self.num_connections = 0
        self.mode: Mode = "forward"
        self.delay_s = 0.0
        self._target_port = target_port
        self._sides: set[_Side] = set()
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._set("forward", 0.0))

    def set(self, mode: Mode, seconds: float = 0.0) -> None:
        """It holds when this returns."""
        self._call(self._set(mode, seconds))

    def cut(self) -> None:
        """Reset every connection; new ones are taken as the mode says."""
        self._call(self._cut())

    def close(self) -> None:
        self._call(self._set("refuse", 0.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_TIMEOUT_S)
        self._loop.close()

    def _call(self, step: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(step, self._loop).result(CALL_TIMEOUT_S)

    async def _set(self, mode: Mode, seconds: float) -> None:
        self.mode, self.delay_s = mode, seconds
        for side in list(self._sides):
            if side.has_lost_bytes:
                side.reset()
            elif mode != "hang":
                side.release()
        if mode == "refuse":
            if self._listener is not None:
                self._listener.close()
                self._listener = None
            await self._cut()
        elif self._listener is None:
            self._listener = await self._loop.create_server(self._accept, HOST, self.port)

    async def _cut(self) -> None:
        for side in list(self._sides):
            side.reset()
        await asyncio.sleep(0)

    def _accept(self) -> "_Side":
        self.num_connections += 1
        client, server = _Side(self, is_server=False), _Side(self, is_server=True)
        client.peer, server.peer = server, client
        client.connecting = self._loop.create_task(self._connect(server))
        return client

    async def _connect(self, server: "_Side") -> None:
        try:
            await self._loop.create_connection(lambda: server, HOST, self._target_port)
        except OSError:
            server.peer.reset()


class _Side(asyncio.Protocol):
    """One end of a proxied connection: towards the client, or towards the server."""

    peer: "_Side"
    connecting: "asyncio.Task[None] | None" = None

    def __init__(self, proxy: Proxy, *, is_server: bool) -> None:
        self._proxy = proxy
        self._is_server = is_server
        self._transport: asyncio.Transport | None = None
        self._waiting: list[bytes] = []
        self.has_lost_bytes = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._proxy._sides.add(self)
        if self._proxy.mode != "hang":
            self.release()

    def data_received(self, data: bytes) -> None:
        if self._proxy.mode == "drop" and self._is_server:
            self.has_lost_bytes = True
        elif self._proxy.mode == "delay" and self._is_server:
            self._proxy._loop.call_later(self._proxy.delay_s, self.peer.send, data)
        else:
            self.peer.send(data)

    def send(self, data: bytes) -> None:
        """Towards whoever is at this end; kept while nobody is, or nothing passes."""
        if self._transport is None or self._proxy.mode == "hang":
            self._waiting.append(data)
        elif not self._transport.is_closing():
            self._transport.write(data)

    def release(self) -> None:
        while self._waiting and self._transport is not None:
            self._transport.write(self._waiting.pop(0))

    def reset(self) -> None:
        """Both ends see a reset, not an orderly end."""
        for transport in (self._transport, self.peer._transport):
            if transport is not None and not transport.is_closing():
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
                transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._proxy._sides.discard(self)
        if self.peer._transport is not None:
            self.peer._transport.close()


@contextlib.contextmanager
def proxy(target_port: int) -> Iterator[Proxy]:
    """A proxy that passes all bytes until it is told otherwise."""
    made = Proxy(target_port)
    try:
        yield made
    finally:
        made.close()
