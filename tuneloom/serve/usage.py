"""Counts what the requests of one base take, while they run: also of those whose client goes away. No HTTP, no Ray."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import anyio.to_thread

from tuneloom.config import UsageSettings
from tuneloom.domain import Amounts, Used
from tuneloom.generation import GenerationRequest, Usage
from tuneloom.store.usage_writer import FLUSH_S, UsageWriter

logger = logging.getLogger(__name__)

# A clean end does not wait longer for the store.
STOP_S = 8.0
# Flushes after which the engine has noticed that a request was given up.
LINGERS = 2
_NONE = Usage(0, 0)


class _Count:
    """One request: what it has taken, and what of it was counted."""

    def __init__(self, owner: str, used: Used, usage: Callable[[], Usage]) -> None:
        self.owner = owner
        self.used = used
        self._usage = usage
        self._counted = _NONE
        self._device_us = 0
        self._has_begun = False
        self.lingers = LINGERS

    def take(self) -> Amounts:
        """What has come since the last time."""
        now, before = self._usage(), self._counted
        device_us = round(now.device_s * 1e6)
        has_begun = self._has_begun or now != _NONE
        amounts = Amounts(
            requests=int(has_begun) - int(self._has_begun),
            input_tokens=now.prompt_tokens - before.prompt_tokens,
            cached_tokens=now.cached_tokens - before.cached_tokens,
            output_tokens=now.completion_tokens - before.completion_tokens,
            device_us=device_us - self._device_us,
        )
        self._counted, self._device_us, self._has_begun = now, device_us, has_begun
        return amounts


class Recorder:
    """Adds up the requests of a base and writes them out every few seconds. Used from one event loop."""

    def __init__(self, writer: UsageWriter, base: str, settings: UsageSettings, *, flush_s: float = FLUSH_S) -> None:
        self._writer = writer
        self._base = base
        self._settings = settings
        self._flush_s = flush_s
        self._open: dict[_Count, None] = {}
        self._given_up: list[_Count] = []
        self._task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def counting(self, request: GenerationRequest, usage: Callable[[], Usage]) -> Iterator[None]:
        """While this is open, what `usage` says of the request is counted now and then, and at the end."""
        used = Used(kind="inference", base=self._base, model=request.model or self._base, key_id=request.key_id)
        count = _Count(request.owner, used, usage)
        self._open[count] = None
        try:
            yield
        except BaseException:
            # The engine may be in a step for it still.
            self._given_up.append(count)
            raise
        finally:
            del self._open[count]
            self._add(count)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write out what there is. The engine is to be closed before."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        try:
            async with asyncio.timeout(STOP_S):
                await self._flush()
        except TimeoutError:
            logger.error("usage was not written out within %.0f s; the last seconds are lost", STOP_S)

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(self._flush_s)
            try:
                await self._flush()
            except Exception:
                # The totals are in memory; nothing may end this but `stop`.
                logger.exception("usage was not written out")
            slow_s = time.monotonic() - began - self._flush_s
            if slow_s > self._flush_s:
                logger.warning("usage took %.1f s to be written out", slow_s)

    async def _flush(self) -> None:
        for count in [*self._open, *self._given_up]:
            self._add(count)
        for count in self._given_up:
            count.lingers -= 1
        self._given_up = [count for count in self._given_up if count.lingers > 0]
        await anyio.to_thread.run_sync(self._writer.flush, abandon_on_cancel=True)

    def _add(self, count: _Count) -> None:
        amounts = count.take()
        if not amounts.is_nothing:
            self._writer.add(count.owner, count.used, self._settings.priced(self._base, amounts))
