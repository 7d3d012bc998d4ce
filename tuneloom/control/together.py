"""One read for all who ask at the same time, such that nobody's answer is older than their question."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_REMEMBERED = 1024


class Together(Generic[T]):
    """Used on one event loop. Of each key one read runs; who asks meanwhile waits for the next, with all others.

    Reads of a key begin at least `apart_s` from each other, so that under load each has many who asked for it.
    """

    def __init__(self, apart_s: float = 0.0) -> None:
        self._apart_s = apart_s
        self._not_before: dict[Hashable, float] = {}
        self._running: dict[Hashable, asyncio.Task[T]] = {}
        self._next: dict[Hashable, asyncio.Task[T]] = {}

    async def get(self, key: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        """What `read` gives or raises, begun after this was called. Who leaves ends it for nobody else."""
        coming = self._next.get(key)
        if coming is None:
            coming = self._next[key] = asyncio.ensure_future(self._read(key, read))
            coming.add_done_callback(_look)
        return await asyncio.shield(coming)

    async def _read(self, key: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        if (before := self._running.get(key)) is not None:
            await asyncio.wait([before])
        await self._take_turn(key)
        own = self._running[key] = self._next.pop(key)
        try:
            return await read()
        finally:
            if self._running[key] is own:
                del self._running[key]

    async def _take_turn(self, key: Hashable) -> None:
        clock = asyncio.get_running_loop().time
        wait_s = self._not_before.get(key, 0.0) - clock()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        now = clock()
        if len(self._not_before) >= MAX_REMEMBERED:
            self._not_before = {each: at for each, at in self._not_before.items() if at > now}
        self._not_before[key] = now + self._apart_s


def _look(done: "asyncio.Task[T]") -> None:
    # All who asked may have left before it failed.
    if not done.cancelled():
        done.exception()
