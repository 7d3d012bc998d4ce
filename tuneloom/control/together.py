"""One read for all who ask at the same time, such that nobody's answer is older than their question."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Together(Generic[T]):
    """Used on one event loop. Of each key one read runs; who asks meanwhile waits for the next, with all others."""

    def __init__(self) -> None:
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
        own = self._running[key] = self._next.pop(key)
        try:
            return await read()
        finally:
            if self._running[key] is own:
                del self._running[key]


def _look(done: "asyncio.Task[T]") -> None:
    # All who asked may have left before it failed.
    if not done.cancelled():
        done.exception()
