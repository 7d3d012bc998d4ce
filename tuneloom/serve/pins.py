"""The adapters of a base that operators want kept, as the store says: each replica reads it, also a later one."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import anyio.to_thread

from tuneloom.domain import AdapterPin, AdapterRef
from tuneloom.errors import TuneloomError
from tuneloom.store.records import Records

logger = logging.getLogger(__name__)

EVERY_S = 10.0
_START_TIMEOUT_S = 10.0


def read_pins(records: Records, base: str) -> dict[str, AdapterPin]:
    """By the adapter's sha256. Blocks."""
    return {stored.value.id: stored.value for stored in records.adapter_pins.query({"base": base})}


class PinFollower:
    """Makes the pins of one engine those of the store. `pin(ref, is_pinned)` is the engine's, and safe to repeat."""

    def __init__(
        self,
        records: Records,
        base: str,
        pin: Callable[[AdapterRef, bool], Awaitable[None]],
        *,
        every_s: float = EVERY_S,
    ) -> None:
        self._records = records
        self._base = base
        self._pin = pin
        self._every_s = every_s
        self._pinned: dict[str, AdapterRef] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Pin what is wanted now, and follow from here on. A store that does not answer is asked again later."""
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await self._try_once()
        except TimeoutError:
            logger.warning("the pins of %s could not be read within %.0f s", self._base, _START_TIMEOUT_S)
        self._task = asyncio.create_task(self._follow(), name="follow-pins")

    async def set(self, ref: AdapterRef, is_pinned: bool) -> None:
        """What the store says already, or will in a moment; at once."""
        await self._pin(ref, is_pinned)
        if is_pinned:
            self._pinned[ref.sha256] = ref
        else:
            self._pinned.pop(ref.sha256, None)

    async def follow_once(self) -> None:
        """Bring the engine's pins up to date."""
        # Those of before the look at the store: one that is set meanwhile is not yet in what it shows.
        before = dict(self._pinned)
        wanted = await anyio.to_thread.run_sync(read_pins, self._records, self._base)
        for sha256 in before.keys() - wanted.keys():
            await self.set(before[sha256], False)
        for pin in wanted.values():
            try:
                # Also one that is pinned: its load may have failed.
                await self.set(pin.adapter, True)
            except TuneloomError as error:
                logger.warning("the adapter of %s is not pinned here: %s", pin.name, error.message)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self._try_once()

    async def _try_once(self) -> None:
        try:
            await self.follow_once()
        except TuneloomError as error:
            logger.warning("the pins of %s could not be followed: %s", self._base, error.message)
        except Exception:
            # Whatever the store's driver raises: serving goes on, and the next round may fare better.
            logger.exception("the pins of %s could not be followed", self._base)
