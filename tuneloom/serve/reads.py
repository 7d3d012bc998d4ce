"""Reads of the store for requests that could go on with what was read before: none of them waits long. No records.

The reads have few threads of their own, so that a store that hangs does not take those of other work.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import anyio.to_thread

from tuneloom.errors import Overloaded, TuneloomError

logger = logging.getLogger(__name__)

THREADS = 32
# Where there is nothing older to go on with.
MAX_WAIT_S = 5.0
# Of a store that was slow the last time; a read that ends in time afterwards ends this.
SLOW_WAIT_S = 0.1
HEALTH_TIMEOUT_S = 10.0

T = TypeVar("T")


class Reads:
    """Waits for a read up to `wait_s` where there is an older answer, less while the store is known to be slow.

    A read that takes longer goes on in its thread. What it has to say, `work` must keep by itself.
    """

    def __init__(self, wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._wait_s = wait_s
        self._clock = clock
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="store-read")
        self._is_slow = False
        self._answered_at = float("-inf")

    @property
    def silent_s(self) -> float:
        """How long ago the store answered last; infinite if it never has."""
        return self._clock() - self._answered_at

    async def read(self, work: Callable[[], T], *, has_older: bool) -> T:
        """What `work` returns, run in a thread.

        Raises:
            TuneloomError: the store failed, with a status of 500 or more; Overloaded if it did not answer in time.
        """
        wait_s = MAX_WAIT_S
        if has_older:
            wait_s = min(self._wait_s, SLOW_WAIT_S) if self._is_slow else self._wait_s
        try:
            running = asyncio.wrap_future(self._threads.submit(self._timed, work))
            return await asyncio.wait_for(running, wait_s)
        except TimeoutError as error:
            self._is_slow = True
            raise Overloaded("The store does not answer in time. Try again.", retry_after_s=1.0) from error
        except OSError as error:
            raise Overloaded("The store does not answer. Try again.", retry_after_s=1.0) from error

    def _timed(self, work: Callable[[], T]) -> T:
        started = self._clock()
        try:
            result = work()
        except TuneloomError as error:
            if error.status < 500:
                self._note_answer(started)
            raise
        self._note_answer(started)
        return result

    def _note_answer(self, started: float) -> None:
        self._answered_at = self._clock()
        if self._answered_at - started < self._wait_s:
            self._is_slow = False


class StoreHealth:
    """Whether a process without the store is still of use: for `stale_s` after the store's last answer.

    A new process would know less, so an outage that is shorter is no reason for one.
    """

    def __init__(
        self, probe: Callable[[], object], stale_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._probe = probe
        self._stale_s = stale_s
        self._clock = clock
        self._answered_at = clock()

    async def check(self, timeout_s: float = HEALTH_TIMEOUT_S) -> None:
        """Raises Overloaded once nothing that was read before counts anymore."""
        try:
            async with asyncio.timeout(timeout_s):
                await anyio.to_thread.run_sync(self._probe, abandon_on_cancel=True)
        except (TuneloomError, OSError) as error:
            silent_s = self._clock() - self._answered_at
            if silent_s > self._stale_s:
                raise Overloaded(f"The store has not answered for {silent_s:.0f} s.") from error
            logger.warning("the store does not answer: %s", error)
        else:
            self._answered_at = self._clock()
