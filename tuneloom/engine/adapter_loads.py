"""Adapters on their way into host memory: each is read once at a time, in threads of their own. No slots, no eviction.

All but the reading happens under the lock of the cache that owns the entries, which hears of each end.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from tuneloom.domain import AdapterRef
from tuneloom.engine.adapter_entry import Counters, Entry, finish
from tuneloom.engine.lora import HostAdapter
from tuneloom.errors import Overloaded, TuneloomError

logger = logging.getLogger(__name__)

# A failure that may pass by itself, such as that of a network, is remembered no longer than this.
_PASSING_FAILURE_S = 1.0


class Loads:
    """Loads that run, wait for room, or failed a while ago.

    `has_room` says whether host memory takes one more. `begun` and `ended` tell the cache; `ended` has what was read:
    None if that failed, nobody wants it any more, or a failure of a while ago was forgotten.
    """

    def __init__(
        self,
        lock: threading.RLock,
        counters: Counters,
        *,
        load: Callable[[AdapterRef], HostAdapter],
        has_room: Callable[[Entry], bool],
        begun: Callable[[Entry], None],
        ended: Callable[[Entry, HostAdapter | None], None],
        wake: Callable[[], None],
        clock: Callable[[], float],
        num_loaders: int,
        failure_s: float,
    ) -> None:
        self._lock, self._counters = lock, counters
        self._read, self._has_room, self._begun, self._ended = load, has_room, begun, ended
        self._wake, self._clock, self._failure_s = wake, clock, failure_s
        # Both: first come first.
        self._failed: OrderedDict[str, Entry] = OrderedDict()
        self._deferred: OrderedDict[str, Entry] = OrderedDict()
        self._pool = ThreadPoolExecutor(num_loaders, thread_name_prefix="adapter-load")
        self.is_closed = False

    def start(self, entry: Entry, *, is_urgent: bool = False) -> None:
        """Begin a load unless it runs or failed a moment ago; later, if it would overfill host memory with adapters
        that wait for slots.
        """
        if entry.host is not None or entry.slot is not None or self.is_closed:
            return
        entry.is_urgent = entry.is_urgent or is_urgent
        if entry.loading is not None:
            return
        if entry.failure is not None:
            if self._remembers(entry):
                return
            self.forget_failure(entry)
        if not is_urgent and not self._has_room(entry):
            self._deferred.setdefault(entry.ref.sha256, entry)
            return
        self.forget(entry)
        entry.loading = Future()
        self._begun(entry)
        self._pool.submit(self._load, entry, entry.loading)

    def start_deferred(self) -> None:
        """Begin what waits for room, as far as there is some."""
        while self._deferred:
            entry = next(iter(self._deferred.values()))
            if entry.is_needed and not self._has_room(entry):
                return
            self.forget(entry)
            if entry.is_needed:
                self.start(entry)

    def forget(self, entry: Entry) -> None:
        """A load that waits for room is not wanted."""
        self._deferred.pop(entry.ref.sha256, None)

    def forget_failure(self, entry: Entry) -> None:
        entry.failure = None
        self._failed.pop(entry.ref.sha256, None)

    def close(self, entries: Iterable[Entry]) -> None:
        """Begin nothing more, and end what waits for a load of `entries`."""
        self.is_closed = True
        for entry in entries:
            if entry.loading is not None:
                finish(entry.loading, Overloaded("The engine is closing.", retry_after_s=1))
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, entry: Entry, done: "Future[None]") -> None:
        with self._lock:
            if not (entry.is_needed or entry.is_urgent):
                # Whoever asked has gone while the load waited for its thread.
                self._end(entry)
                return
        started = time.monotonic()
        host, failure = None, None
        try:
            host = self._read(entry.ref)
        except TuneloomError as error:
            failure = error
        except Exception:
            logger.exception("adapter load failed: %s", entry.ref.sha256)
            message = "The adapter could not be read. Retry in a moment."
            failure = Overloaded(message, retry_after_s=_PASSING_FAILURE_S)
        with self._lock:
            self._counters.loads += 1
            self._counters.load_s += time.monotonic() - started
            self._end(entry, host, failure)
        finish(done, failure)
        self._wake()

    def _end(self, entry: Entry, host: HostAdapter | None = None, failure: TuneloomError | None = None) -> None:
        entry.loading, entry.is_urgent = None, False
        if failure is not None:
            entry.failure, entry.failed_at = failure, self._clock()
            self._failed[entry.ref.sha256] = entry
            self._counters.load_failures += 1
        self._ended(entry, None if self.is_closed else host)
        self._forget_old_failures()

    def _remembers(self, entry: Entry) -> bool:
        assert entry.failure is not None
        is_lasting = entry.failure.status < 500
        memory_s = self._failure_s if is_lasting else min(self._failure_s, _PASSING_FAILURE_S)
        return self._clock() - entry.failed_at < memory_s

    def _forget_old_failures(self) -> None:
        oldest = self._clock() - self._failure_s
        old = []
        for entry in self._failed.values():
            if entry.failed_at > oldest:
                break
            if not entry.is_needed:
                old.append(entry)
        for entry in old:
            self.forget_failure(entry)
            self._ended(entry, None)
