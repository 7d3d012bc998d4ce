"""Adapters in tiers: slots on the device over host memory over whatever `load` reads. No tensors of the model.

Slots are taken and given back by the step thread only; everything else may be called from any thread. Nothing that a
sequence uses or that is pinned is evicted, and what a sequence waits for goes last. No call but `states` takes longer
the more adapters are known.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from tuneloom.domain import AdapterRef
from tuneloom.engine.adapter_entry import Counters, Entry, copy_of, finish
from tuneloom.engine.adapter_loads import Loads
from tuneloom.engine.base import AdapterState, TierStats
from tuneloom.engine.lora import HostAdapter
from tuneloom.errors import Conflict, Overloaded

_NOTHING = HostAdapter(0, 0, {})


@dataclass
class AdapterCache:
    """The adapters of one engine.

    `load` reads an adapter into host memory and may block; `write` copies one into a slot; `wake` is called from a
    loading thread when a load has ended; `slot_bytes` tells what a slot holds on the device. With `slots_use_host` a
    slot works on the copy in host memory, which then stays as long as the slot is taken. Adapters unused for `idle_s`
    leave slots and host memory (None: only when room is needed); a failed load is answered from memory for `failure_s`.
    """

    num_slots: int
    host_bytes: int
    load: Callable[[AdapterRef], HostAdapter]
    write: Callable[[int, HostAdapter], None]
    wake: Callable[[], None]
    clock: Callable[[], float]
    num_loaders: int = 4
    failure_s: float = 5.0
    idle_s: float | None = None
    slot_bytes: Callable[[], int] = lambda: 0
    slots_use_host: bool = False
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        # All: least recently used first.
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._in_host: OrderedDict[str, Entry] = OrderedDict()
        self._in_slot: OrderedDict[str, Entry] = OrderedDict()
        self._num_pinned = 0
        self._host_used = self._host_waiting = self._host_coming = 0
        self._slot_bytes = self.slot_bytes()
        self._free_slots = list(range(self.num_slots, 0, -1))
        # Free ones that still hold on to a copy in host memory.
        self._left_slots = set[int]()
        self._loads = Loads(
            self._lock,
            self.counters,
            load=self.load,
            has_room=self._has_room,
            begun=self._recount,
            ended=self._loaded,
            wake=self.wake,
            clock=self.clock,
            num_loaders=self.num_loaders,
            failure_s=self.failure_s,
        )

    def expect(self, ref: AdapterRef) -> None:
        """A sequence waits for `ref`: load it, and keep it. Pair with `forget` or `acquire`."""
        with self._lock:
            entry = self._entry(ref)
            if entry.slot is None:
                if entry.host is not None:
                    self.counters.host_hits += 1
                else:
                    self.counters.host_misses += 1
            entry.num_waiting += 1
            self._recount(entry)
            self._loads.start(entry)

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

    def is_resident(self, ref: AdapterRef) -> bool:
        """Whether it is in a slot at this moment: a sequence that uses it can run without another's leaving."""
        with self._lock:
            return ref.sha256 in self._in_slot

    def is_at_hand(self, ref: AdapterRef) -> bool:
        """Whether `acquire` would give a slot at this moment."""
        with self._lock:
            entry = self._entries[ref.sha256]
            if entry.slot is not None or entry.host is None:
                return entry.slot is not None
            return bool(self._free_slots) or any(not e.num_running and not e.is_pinned for e in self._in_slot.values())

    def acquire(self, ref: AdapterRef) -> int | None:
        """The slot of an expected adapter, filled and held until `release`; None while it loads or no slot is free.

        Raises:
            TuneloomError: its load failed.
        """
        with self._lock:
            entry = self._entries[ref.sha256]
            if entry.slot is not None:
                self.counters.slot_hits += 1
                self._run(entry)
                return entry.slot
            host = entry.host
            if host is None:
                if entry.failure is not None:
                    raise copy_of(entry.failure)
                self._loads.start(entry)
                return None
            slot = self._take_slot()
            if slot is None:
                return None
            entry.slot = slot
            self._left_slots.discard(slot)
            self._in_slot[ref.sha256] = entry
            self._run(entry)
        self._fill(entry, slot, host)
        return slot

    def release(self, ref: AdapterRef) -> None:
        with self._lock:
            entry = self._entries[ref.sha256]
            entry.num_running -= 1
            self._touch(entry)
            self._settle(entry)

    def prefetch(self, ref: AdapterRef) -> "Future[None]":
        """Load into host memory; the future has the outcome."""
        with self._lock:
            if self._loads.is_closed:
                raise Overloaded("The engine is closing.", retry_after_s=1)
            entry = self._entry(ref)
            self._loads.start(entry, is_urgent=True)
            if entry.loading is not None:
                return entry.loading
            done: Future[None] = Future()
            finish(done, entry.failure)
            return done

    def evict(self, sha256: str) -> None:
        """Drop an adapter from all tiers, now or as soon as nothing uses it, pinned or not. Absent is fine."""
        with self._lock:
            entry = self._entries.get(sha256)
            if entry is not None:
                self._set_pinned(entry, False)
                entry.evict_when_free = True
                self._loads.forget_failure(entry)
                self._settle(entry)

    def pin(self, ref: AdapterRef, is_pinned: bool) -> None:
        """Load an adapter and keep it, and its slot once it has one; or let it go its way.

        Raises:
            Conflict: it would leave no slot for adapters that are not pinned.
        """
        with self._lock:
            if not is_pinned:
                entry = self._entries.get(ref.sha256)
                if entry is not None:
                    self._set_pinned(entry, False)
                    self._settle(entry)
                return
            entry = self._entry(ref)
            if not entry.is_pinned and self._num_pinned >= self.num_slots - 1:
                self._settle(entry)
                raise Conflict(
                    f"{self._num_pinned} adapters are pinned here, and one of {self.num_slots} slots stays free for "
                    "the rest. Unpin another, or raise `adapter_slots`."
                )
            self._set_pinned(entry, True)
            self._loads.start(entry)

    def expire(self) -> None:
        """Let adapters go that nobody used for `idle_s`. Cheap; the step thread calls it often."""
        with self._lock:
            if self.idle_s is not None:
                self._end_idle(self.clock() - self.idle_s)
            left, self._left_slots = self._left_slots, set()
        for slot in left:
            self.write(slot, _NOTHING)

    def states(self) -> list[AdapterState]:
        with self._lock:
            return [entry.state() for entry in self._entries.values()]

    def tiers(self) -> dict[str, TierStats]:
        """The numbers of `slot` and `host`."""
        with self._lock:
            counters, slot_bytes = self.counters, self._slot_bytes
            return {
                "slot": counters.slot_tier(len(self._in_slot), self.num_slots, slot_bytes),
                "host": counters.host_tier(len(self._in_host), self._host_used, self.host_bytes),
            }

    def host_bytes_used(self) -> int:
        return self._host_used

    def close(self) -> None:
        """Stop loading; a load that is under way ends on its own and is dropped."""
        with self._lock:
            self._loads.close(self._entries.values())

    def _end_idle(self, oldest: float) -> None:
        idle = []
        for entry in self._entries.values():
            if entry.last_used_at > oldest:
                break
            if not entry.is_needed and entry.loading is None:
                idle.append(entry)
        for entry in idle:
            entry.evict_when_free = True
            self._settle(entry)

    def _entry(self, ref: AdapterRef) -> Entry:
        entry = self._entries.get(ref.sha256)
        if entry is None:
            entry = self._entries[ref.sha256] = Entry(ref)
        entry.evict_when_free = False
        self._touch(entry)
        return entry

    def _touch(self, entry: Entry) -> None:
        entry.last_used_at = self.clock()
        for order in (self._entries, self._in_host, self._in_slot):
            if entry.ref.sha256 in order:
                order.move_to_end(entry.ref.sha256)

    def _run(self, entry: Entry) -> None:
        """A sequence that waited has its slot."""
        entry.num_waiting -= 1
        entry.num_running += 1
        self._touch(entry)
        self._settle(entry)

    def _fill(self, entry: Entry, slot: int, host: HostAdapter) -> None:
        """Copy outside the lock: only the step thread, which runs this, reads slots, and the entry is in use."""
        started = time.monotonic()
        try:
            self.write(slot, host)
        except BaseException:
            with self._lock:
                entry.num_running -= 1
                entry.num_waiting += 1
                self._leave_slot(entry)
            raise
        with self._lock:
            self.counters.slot_fills += 1
            self.counters.slot_fill_s += time.monotonic() - started
            self._slot_bytes = self.slot_bytes()

    def _set_pinned(self, entry: Entry, is_pinned: bool) -> None:
        self._num_pinned += is_pinned - entry.is_pinned
        entry.is_pinned = is_pinned

    def _recount(self, entry: Entry) -> None:
        """Bring the totals up to date with an entry that has changed."""
        used, waiting, coming = entry.count()
        old_used, old_waiting, old_coming = entry.counted
        self._host_used += used - old_used
        self._host_waiting += waiting - old_waiting
        self._host_coming += coming - old_coming
        entry.counted = (used, waiting, coming)

    def _has_room(self, entry: Entry) -> bool:
        busy = self._host_waiting + self._host_coming
        return not busy or busy + entry.ref.size_bytes <= self.host_bytes

    def _loaded(self, entry: Entry, host: HostAdapter | None) -> None:
        """A load has ended, without a result if it failed."""
        if host is not None:
            entry.host = host
            self._in_host[entry.ref.sha256] = entry
        self._touch(entry)
        self._settle(entry)

    def _take_slot(self) -> int | None:
        if self._free_slots:
            return self._free_slots.pop()
        idle = [e for e in self._in_slot.values() if not e.num_running and not e.is_pinned]
        victim = min(idle, key=lambda e: bool(e.num_waiting), default=None)
        if victim is None:
            return None
        self._leave_slot(victim)
        return self._free_slots.pop()

    def _leave_slot(self, entry: Entry) -> None:
        assert entry.slot is not None
        self._free_slots.append(entry.slot)
        if self.slots_use_host:
            self._left_slots.add(entry.slot)
        entry.slot = None
        del self._in_slot[entry.ref.sha256]
        self.counters.slot_evictions += 1
        self._settle(entry)

    def _leave_host(self, entry: Entry) -> None:
        entry.host = None
        del self._in_host[entry.ref.sha256]
        self.counters.host_evictions += 1
        self._recount(entry)
        self._drop_if_empty(entry)

    def _settle(self, entry: Entry) -> None:
        """Carry out what had to wait until nothing needs the entry."""
        self._recount(entry)
        if entry.evict_when_free and not entry.is_needed and entry.loading is None:
            if entry.slot is not None:
                self._leave_slot(entry)
            if entry.host is not None:
                self._leave_host(entry)
        self._drop_if_empty(entry)
        self._make_room()
        self._loads.start_deferred()

    def _drop_if_empty(self, entry: Entry) -> None:
        is_empty = entry.host is None and entry.slot is None and entry.loading is None and entry.failure is None
        if is_empty and not entry.is_needed:
            self._entries.pop(entry.ref.sha256, None)
            self._loads.forget(entry)

    def _make_room(self) -> None:
        """Drop the least recently used host copies beyond the limit; not those that somebody needs."""
        while self._host_used > self.host_bytes:
            victim = next((entry for entry in self._in_host.values() if not self._is_held(entry)), None)
            if victim is not None:
                self._leave_host(victim)
                continue
            idle = next((entry for entry in self._in_slot.values() if not entry.is_needed), None)
            if idle is None or not self.slots_use_host:
                return
            self._leave_slot(idle)

    def _is_held(self, entry: Entry) -> bool:
        """Whether its copy in host memory must stay."""
        return entry.is_needed if entry.slot is None else self.slots_use_host
