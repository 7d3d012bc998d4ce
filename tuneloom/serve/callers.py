"""Ends the work of callers that died: Ray does not tell an actor that the reader of its stream is gone.

A caller is the name of the Serve replica that asked. No generations, no engine.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio.to_thread

logger = logging.getLogger(__name__)

CHECK_S = 2.0

Abandon = Callable[[], None]


class Callers:
    """Looks now and then whether those live who have work open here, and abandons the work of those who do not."""

    def __init__(self, is_alive: Callable[[str], bool], every_s: float = CHECK_S) -> None:
        """`is_alive` may block; it runs in a thread."""
        self._is_alive = is_alive
        self._every_s = every_s
        self._open: dict[str, list[Abandon]] = {}
        self._watch: asyncio.Task[None] | None = None

    @contextmanager
    def working(self, caller: str, abandon: Abandon) -> Iterator[None]:
        """While this is open and `caller` dies, `abandon` is called. An empty caller is never looked for."""
        if not caller:
            yield
            return
        self._open.setdefault(caller, []).append(abandon)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._open[caller].remove(abandon)
            if not self._open[caller]:
                del self._open[caller]

    async def _run(self) -> None:
        while self._open:
            await asyncio.sleep(self._every_s)
            for caller in list(self._open):
                if not await anyio.to_thread.run_sync(self._is_alive, caller):
                    work = list(self._open.get(caller, ()))
                    logger.warning("%s is gone; %d requests of it are abandoned", caller, len(work))
                    for abandon in work:
                        abandon()
