"""Adapters in tiers: slots on the device over host memory over whatever `load` reads. No tensors of the model.

Loads run in threads of their own, one per adapter at a time. Slots are taken and given back by the step thread only;
everything else may be called from any thread. Nothing that a sequence uses or that is pinned is evicted, and what a
sequence waits for goes last.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from tuneloom.domain import AdapterRef
from tuneloom.engine.base import AdapterState
from tuneloom.engine.lora import HostAdapter
from tuneloom.errors import NotFound, Overloaded, TuneloomError

logger = logging.getLogger(__name__)

# How long a failed load is remembered, so that a broken adapter is not read for each request.
_FAILURE_MEMORY_S = 5.0


@dataclass
class Counters:
    slot_hits: int = 0
    slot_fills: int = 0
    slot_evictions: int = 0
    host_evictions: int = 0
    loads: int = 0
    load_failures: int = 0
    load_s: float = 0.0


@dataclass
class _Entry:
    ref: AdapterRef
    host: HostAdapter | None = None
    slot: int | None = None
    loading: Future[None] | None = None
    failure: TuneloomError | None = None
    failed_at: float = 0.0
    num_waiting: int = 0
    num_running: int = 0
    is_pinned: bool = False
    evict_when_free: bool = False
    last_used_at: float = 0.0

    @property
    def is_needed(self) -> bool:
        return bool(self.num_waiting or self.num_running or self.is_pinned)

    @property
    def tier(self) -> str:
        if self.slot is not None:
            return "slot"
        if self.host is not None:
            return "host"
        return "loading" if self.loading is not None else "none"


@dataclass
class AdapterCache:
    """The adapters of one engine.

    `load` reads an adapter into host memory and may block; `write` copies one into a slot; `wake` is called from a
    loading thread when a load has ended.
    """

    num_slots: int
    host_bytes: int
    load: Callable[[AdapterRef], HostAdapter]
    write: Callable[[int, HostAdapter], None]
    wake: Callable[[], None]
    clock: Callable[[], float]
    num_loaders: int = 2
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        # Least recently used first.
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._free_slots = list(range(self.num_slots, 0, -1))
        self._pool = ThreadPoolExecutor(self.num_loaders, thread_name_prefix="adapter-load")
        self._is_closed = False

    def expect(self, ref: AdapterRef) -> None:
        """A sequence waits for `ref`: load it, and keep it. Pair with `forget` or `acquire`."""
        with self._lock:
            entry = self._entry(ref)
            entry.num_waiting += 1
            self._start_load(entry)

    def forget(self, ref: AdapterRef) -> None:
        """A sequence that waited for `ref` has gone."""
        with self._lock:
            entry = self._entries[ref.sha256]
            entry.num_waiting -= 1
            self._settle(entry)

    def is_loaded(self, ref: AdapterRef) -> bool:
        with self._lock:
            entry = self._entries[ref.sha256]
            return entry.slot is not None or entry.host is not None

    def acquire(self, ref: AdapterRef) -> int | None:
        """The slot of an expected adapter, filled and held until `release`; None while it loads or no slot is free.

        Raises:
            TuneloomError: its load failed.
        """
        with self._lock:
            entry = self._entries[ref.sha256]
            if entry.failure is not None and entry.host is None:
                raise _copy_of(entry.failure)
            if entry.slot is None:
                if entry.host is None:
                    self._start_load(entry)
                    return None
                slot = self._take_slot()
                if slot is None:
                    return None
                self.write(slot, entry.host)
                entry.slot = slot
                self.counters.slot_fills += 1
            else:
                self.counters.slot_hits += 1
            entry.num_waiting -= 1
            entry.num_running += 1
            self._touch(entry)
            self._shrink_host()
            return entry.slot

    def release(self, ref: AdapterRef) -> None:
        with self._lock:
            entry = self._entries[ref.sha256]
            entry.num_running -= 1
            self._touch(entry)
            self._settle(entry)

    def prefetch(self, ref: AdapterRef) -> "Future[None]":
        """Load into host memory; the future has the outcome."""
        with self._lock:
            if self._is_closed:
                raise Overloaded("The engine is closing.", retry_after_s=1)
            entry = self._entry(ref)
            if entry.host is None and entry.slot is None:
                self._start_load(entry, is_urgent=True)
            if entry.loading is not None:
                return entry.loading
            done: Future[None] = Future()
            if entry.failure is not None:
                done.set_exception(_copy_of(entry.failure))
            else:
                done.set_result(None)
            return done

    def evict(self, sha256: str) -> None:
        """Drop an adapter from all tiers, now or as soon as nothing uses it. Absent is fine."""
        with self._lock:
            entry = self._entries.get(sha256)
            if entry is not None:
                entry.is_pinned, entry.evict_when_free = False, True
                self._settle(entry)

    def pin(self, sha256: str, is_pinned: bool) -> None:
        with self._lock:
            entry = self._entries.get(sha256)
            if entry is None:
                raise NotFound(f"The adapter `{sha256[:12]}` is not loaded here. Load it first.")
            entry.is_pinned = is_pinned
            self._settle(entry)

    def states(self) -> list[AdapterState]:
        with self._lock:
            return [
                AdapterState(
                    sha256=entry.ref.sha256,
                    tier=entry.tier,
                    rank=entry.ref.rank,
                    size_bytes=entry.host.size_bytes if entry.host else entry.ref.size_bytes,
                    in_use=entry.num_running,
                    is_pinned=entry.is_pinned,
                    last_used_at=entry.last_used_at,
                )
                for entry in self._entries.values()
            ]

    def host_bytes_used(self) -> int:
        with self._lock:
            return sum(entry.host.size_bytes for entry in self._entries.values() if entry.host)

    def close(self) -> None:
        """Stop loading; a load that is under way ends on its own and is dropped."""
        with self._lock:
            self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _entry(self, ref: AdapterRef) -> _Entry:
        entry = self._entries.get(ref.sha256)
        if entry is None:
            entry = self._entries[ref.sha256] = _Entry(ref)
        entry.evict_when_free = False
        self._touch(entry)
        return entry

    def _touch(self, entry: _Entry) -> None:
        entry.last_used_at = self.clock()
        self._entries.move_to_end(entry.ref.sha256)

    def _start_load(self, entry: _Entry, *, is_urgent: bool = False) -> None:
        """Begin a load unless it runs, failed a moment ago, or would overfill the host tier with needed adapters."""
        if entry.host is not None or entry.loading is not None or self._is_closed:
            return
        if entry.failure is not None:
            if self.clock() - entry.failed_at < _FAILURE_MEMORY_S:
                return
            entry.failure = None
        needed = [e for e in self._entries.values() if e.loading or (e.host and e.num_waiting)]
        size = sum(e.host.size_bytes if e.host else e.ref.size_bytes for e in needed)
        if needed and not is_urgent and size + entry.ref.size_bytes > self.host_bytes:
            return
        entry.loading = Future()
        self._pool.submit(self._load, entry, entry.loading)

    def _load(self, entry: _Entry, done: "Future[None]") -> None:
        started = self.clock()
        host, failure = None, None
        try:
            host = self.load(entry.ref)
        except TuneloomError as error:
            failure = error
        except Exception:
            logger.exception("adapter load failed: %s", entry.ref.sha256)
            failure = Overloaded("The adapter could not be read. Retry in a moment.", retry_after_s=_FAILURE_MEMORY_S)
        with self._lock:
            entry.host, entry.failure, entry.loading = host, failure, None
            self.counters.loads += 1
            self.counters.load_s += self.clock() - started
            if failure is not None:
                entry.failed_at = self.clock()
                self.counters.load_failures += 1
            self._settle(entry)
            self._shrink_host(keep=entry)
            self._forget_failures()
        if failure is not None:
            done.set_exception(_copy_of(failure))
        else:
            done.set_result(None)
        self.wake()

    def _forget_failures(self) -> None:
        oldest = self.clock() - _FAILURE_MEMORY_S
        for entry in list(self._entries.values()):
            if entry.failure is not None and entry.failed_at < oldest and not entry.is_needed and not entry.loading:
                del self._entries[entry.ref.sha256]

    def _take_slot(self) -> int | None:
        if self._free_slots:
            return self._free_slots.pop()
        idle = [e for e in self._entries.values() if e.slot is not None and not e.num_running and not e.is_pinned]
        victim = min(idle, key=lambda e: bool(e.num_waiting), default=None)
        if victim is None:
            return None
        slot, victim.slot = victim.slot, None
        self.counters.slot_evictions += 1
        self._settle(victim)
        return slot

    def _settle(self, entry: _Entry) -> None:
        """Carry out what had to wait until nothing needs the entry."""
        if entry.is_needed or entry.loading is not None:
            return
        if entry.evict_when_free:
            if entry.slot is not None:
                self._free_slots.append(entry.slot)
                self.counters.slot_evictions += 1
            entry.slot = entry.host = None
        if entry.host is None and entry.slot is None and entry.failure is None:
            self._entries.pop(entry.ref.sha256, None)
        self._shrink_host()

    def _shrink_host(self, keep: _Entry | None = None) -> None:
        """Drop the least recently used host copies beyond the limit; not those that wait for a slot."""
        used = sum(entry.host.size_bytes for entry in self._entries.values() if entry.host)
        for entry in list(self._entries.values()):
            if used <= self.host_bytes:
                return
            is_free = entry.slot is not None or not entry.is_needed
            if entry.host is not None and is_free and entry is not keep:
                used -= entry.host.size_bytes
                entry.host = None
                self.counters.host_evictions += 1
                if entry.slot is None:
                    del self._entries[entry.ref.sha256]


def _copy_of(error: TuneloomError) -> TuneloomError:
    """The same error for another request; one exception object must not be raised twice."""
    copied = type(error)(error.message, param=error.param, code=error.code, retry_after_s=error.retry_after_s)
    copied.__cause__ = error
    return copied
