"""Writes down when keys were last used: in the background, once a minute for each key at most. No requests wait."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import anyio.to_thread

from tuneloom.config import HashedSecret
from tuneloom.errors import TuneloomError
from tuneloom.store.keys import USE_INTERVAL_S, Found, note_use
from tuneloom.store.records import Records

logger = logging.getLogger(__name__)

FLUSH_S = 30.0
MAX_PENDING = 10_000


@dataclass(frozen=True)
class _Use:
    at: float
    seen: str
    fresh: HashedSecret | None


class KeyUses:
    """What is lost when the process dies is at most the last minute."""

    def __init__(self, records: Records, flush_s: float = FLUSH_S) -> None:
        self._records = records
        self._flush_s = flush_s
        self._pending: dict[str, _Use] = {}
        self._task: asyncio.Task[None] | None = None

    def note(self, found: Found, at: float, fresh: HashedSecret | None) -> None:
        """A key was used; `fresh` is the hash of its secret as it should be kept, if that is another one."""
        if fresh is None and at - (found.key.last_used_at or 0) < USE_INTERVAL_S:
            return
        if found.key.id not in self._pending and len(self._pending) >= MAX_PENDING:
            return
        self._pending[found.key.id] = _Use(at, found.hash, fresh)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._flush_later())

    async def _flush_later(self) -> None:
        while self._pending:
            await asyncio.sleep(self._flush_s)
            await anyio.to_thread.run_sync(self.flush)

    def flush(self, note: Callable[..., None] = note_use) -> None:
        """Write all; what the store does not take now stays for the next time."""
        pending, self._pending = self._pending, {}
        for id, use in pending.items():
            try:
                note(self._records, id, use.at, seen=use.seen, fresh=use.fresh)
            except (TuneloomError, OSError) as error:
                logger.warning("uses of keys are not written down yet: %s", error)
                self._pending = {**pending, **self._pending}
                return
