"""A client that costs little: one fixed request over and over on connections that stay open. For HTTP/1.1 on loopback.

A full HTTP client takes more of the machine for a request than the server under measurement does.
"""

import asyncio
import time
from dataclasses import dataclass

_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Load:
    """What one run of `seconds` has seen. `latencies` in seconds, ascending."""

    per_second: float
    latencies: list[float]

    def percentile(self, share: float) -> float:
        return self.latencies[min(int(len(self.latencies) * share), len(self.latencies) - 1)]


def get(path: str, host: str, key: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n\r\n".encode()


def post(path: str, host: str, key: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def drive(host: str, port: int, request: bytes, *, connections: int, seconds: float) -> Load:
    """Send `request` on every connection, again as soon as it is answered.

    Raises:
        SystemExit: an answer is not 200.
    """
    return asyncio.run(_drive(host, port, request, connections, seconds))


async def _drive(host: str, port: int, request: bytes, connections: int, seconds: float) -> Load:
    latencies: list[float] = []
    started = time.perf_counter()
    end = started + seconds
    await asyncio.gather(*(_repeat(host, port, request, end, latencies) for _ in range(connections)))
    return Load(len(latencies) / (time.perf_counter() - started), sorted(latencies))


async def _repeat(host: str, port: int, request: bytes, end: float, latencies: list[float]) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    while (sent := time.perf_counter()) < end:
        writer.write(request)
        try:
            async with asyncio.timeout(60):
                await _read_answer(reader)
        except asyncio.IncompleteReadError as error:
            # A server may close a connection between two requests.
            if error.partial:
                raise
            writer.close()
            reader, writer = await asyncio.open_connection(host, port)
            continue
        latencies.append(time.perf_counter() - sent)
    writer.close()


async def _read_answer(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(_END)).lower()
    if b" 200 " not in head[:20]:
        body = await reader.read(500)
        raise SystemExit(f"the server answered {head[:60]!r} {body!r}")
    if b"transfer-encoding: chunked" in head:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            await reader.readexactly(size + 2)
        await reader.readexactly(2)
        return
    start = head.index(b"content-length:") + len(b"content-length:")
    await reader.readexactly(int(head[start : head.index(b"\r\n", start)]))
