"""How far a draft is, as server-sent events: what `GET drafts/{id}` shows, at once and whenever it has changed."""

import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio

from tuneloom.errors import NotFound, RateLimited, TuneloomError

POLL_S = 1.0
# In silence, so that no proxy between takes the stream for dead.
HEARTBEAT_S = 15.0
HEARTBEAT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
# Streams of one owner at this process: each looks at the store again and again.
MAX_STREAMS = 16

Shown = dict[str, Any]


class Streams:
    """Counts those of each owner. Used on one event loop."""

    def __init__(self) -> None:
        self._open = Counter[str]()

    @contextmanager
    def one(self, owner: str) -> Iterator[None]:
        """Raises RateLimited if the owner has too many."""
        self.check(owner)
        self._open[owner] += 1
        try:
            yield
        finally:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]

    def check(self, owner: str) -> None:
        if self._open[owner] >= MAX_STREAMS:
            raise RateLimited(
                f"{MAX_STREAMS} streams of events are open. Close one first.",
                code="too_many_streams",
                retry_after_s=POLL_S,
            )


async def progress(
    first: Shown, read: Callable[[], Awaitable[Shown]], *, until: float, clock: Callable[[], float] = time.monotonic
) -> AsyncGenerator[bytes, None]:
    """Events until the draft has ended, or until `until` of `clock`; then the reader connects again.

    `first` is what the draft looks like now, `read` gives it anew. A store that is away is waited for.
    """
    shown, said, said_at = first, None, clock()
    while True:
        if shown != said:
            is_over = shown["finished_at"] is not None
            type = "draft.ended" if is_over else "draft.progress"
            yield _event({"object": "tuneloom.draft.event", "type": type, "draft": shown})
            said, said_at = shown, clock()
            if is_over:
                break
        elif clock() - said_at >= HEARTBEAT_S:
            yield HEARTBEAT
            said_at = clock()
        if clock() >= until:
            break
        await anyio.sleep(POLL_S)
        try:
            shown = await read()
        except NotFound as error:
            # It was removed, and its owner with it.
            yield _event(error.body())
            break
        except TuneloomError as error:
            if error.status < 500:
                raise
    yield DONE


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
