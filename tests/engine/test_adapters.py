import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.conftest import OpenCore, ref_of, request
from tuneloom.domain import AdapterRef
from tuneloom.engine.adapters import AdapterCache
from tuneloom.engine.lora import HostAdapter
from tuneloom.errors import AdapterRejected, Conflict, NotFound, Overloaded

SIZE = 100


def ref(name: str) -> AdapterRef:
    return AdapterRef(sha256=name, uri=name, rank=4, size_bytes=SIZE)


class Tiers:
    """An adapter cache over a fake disk, with a clock by hand."""

    def __init__(self, num_slots: int = 2, host_bytes: int = 10 * SIZE, **options: Any) -> None:
        self.now = 100.0
        self.reads: list[str] = []
        self.slots: dict[int, HostAdapter] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.slow: set[str] = set()
        self.failure: Exception | None = None
        self.write_failure: Exception | None = None
        self.cache = AdapterCache(
            num_slots,
            host_bytes,
            self.load,
            self.write,
            lambda: None,
            lambda: self.now,
            slot_bytes=lambda: 7,
            **options,
        )

    def write(self, slot: int, adapter: HostAdapter) -> None:
        if self.write_failure:
            raise self.write_failure
        self.slots[slot] = adapter

    def load(self, asked: AdapterRef) -> HostAdapter:
        if not self.slow or asked.sha256 in self.slow:
            assert self.gate.wait(10)
        self.reads.append(asked.sha256)
        if self.failure:
            raise self.failure
        return HostAdapter(4, SIZE, {asked.sha256: (torch.zeros(1), torch.zeros(1))})

    def take(self, name: str) -> int:
        """Expect and acquire, waiting for the load."""
        self.cache.expect(ref(name))
        return until(lambda: self.cache.acquire(ref(name)))

    def holds(self, slot: int) -> str:
        return next(iter(self.slots[slot].factors))

    def tiers(self) -> dict[str, str]:
        return {state.sha256: state.tier for state in self.cache.states()}


def until(find: Callable[[], object], timeout_s: float = 10):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = find()
        if found:
            return found
        time.sleep(0.001)
    raise AssertionError("it did not happen in time")


@pytest.fixture
def tiers() -> Iterator[Tiers]:
    made = Tiers()
    yield made
    made.gate.set()
    made.cache.close()


def test_requests_for_one_adapter_share_a_load_and_a_slot(tiers: Tiers):
    tiers.gate.clear()
    for _ in range(5):
        tiers.cache.expect(ref("a"))
    assert tiers.cache.acquire(ref("a")) is None
    tiers.gate.set()
    slots = {until(lambda: tiers.cache.acquire(ref("a"))) for _ in range(5)}
    assert len(slots) == 1 and tiers.reads == ["a"]


def test_an_adapter_in_use_is_never_evicted(tiers: Tiers):
    one, two = tiers.take("a"), tiers.take("b")
    tiers.cache.expect(ref("c"))
    until(lambda: tiers.cache.is_loaded(ref("c")))
    assert tiers.cache.acquire(ref("c")) is None
    tiers.cache.release(ref("a"))
    assert tiers.cache.acquire(ref("c")) == one
    assert (tiers.holds(one), tiers.holds(two)) == ("c", "b")
    assert tiers.tiers() == {"a": "host", "b": "slot", "c": "slot"}


def test_the_slot_that_was_used_longest_ago_goes_first(tiers: Tiers):
    for name in ("a", "b", "a"):
        tiers.take(name)
        tiers.cache.release(ref(name))
    tiers.take("c")
    assert tiers.tiers() == {"a": "slot", "b": "host", "c": "slot"}


def test_a_pinned_adapter_keeps_its_slot(tiers: Tiers):
    tiers.take("a")
    tiers.cache.pin(ref("a"), True)
    tiers.cache.release(ref("a"))
    for name in ("b", "c", "d"):
        tiers.take(name)
        tiers.cache.release(ref(name))
    assert tiers.tiers()["a"] == "slot"
    with pytest.raises(Conflict, match="one of 2 slots stays free"):
        tiers.cache.pin(ref("d"), True)


def test_host_memory_is_bounded_and_an_evicted_adapter_is_read_again():
    tiers = Tiers(num_slots=1, host_bytes=2 * SIZE)
    for name in ("a", "b", "c", "d"):
        tiers.take(name)
        tiers.cache.release(ref(name))
    assert tiers.cache.host_bytes_used() <= 2 * SIZE
    tiers.take("a")
    assert tiers.reads == ["a", "b", "c", "d", "a"]
    tiers.cache.close()


def test_without_host_memory_every_adapter_is_still_served():
    tiers = Tiers(num_slots=1, host_bytes=0)
    for name in ("a", "b"):
        tiers.take(name)
        tiers.cache.release(ref(name))
    assert tiers.cache.host_bytes_used() == 0 and tiers.tiers() == {"b": "slot"}
    tiers.cache.close()


def test_where_slots_use_the_copy_in_host_memory_it_stays_with_the_slot():
    tiers = Tiers(num_slots=2, host_bytes=SIZE, slots_use_host=True)
    for name in ("a", "b"):
        tiers.take(name)
    assert tiers.cache.host_bytes_used() == 2 * SIZE
    tiers.cache.release(ref("a"))
    assert tiers.cache.host_bytes_used() == SIZE and tiers.tiers() == {"b": "slot"}
    tiers.cache.close()


def test_an_empty_slot_holds_on_to_no_copy_in_host_memory():
    tiers = Tiers(num_slots=2, slots_use_host=True)
    slot = tiers.take("a")
    tiers.cache.release(ref("a"))
    tiers.cache.evict("a")
    tiers.cache.expire()
    assert tiers.slots[slot].factors == {} and tiers.cache.host_bytes_used() == 0
    assert tiers.holds(tiers.take("b")) == "b"
    tiers.cache.expire()
    assert [tiers.holds(slot) for slot in tiers.slots if tiers.slots[slot].factors] == ["b"]
    tiers.cache.close()


def test_a_failed_load_is_told_to_all_who_wait_and_remembered_for_a_while(tiers: Tiers):
    tiers.failure = AdapterRejected("Rank 128 is above this engine's limit: 64.")
    for _ in range(2):
        tiers.cache.expect(ref("a"))
        until(lambda: tiers.reads)
        with pytest.raises(AdapterRejected, match="Rank 128"):
            until(lambda: tiers.cache.acquire(ref("a")))
        tiers.cache.forget(ref("a"))
    assert tiers.reads == ["a"]
    tiers.failure = None
    tiers.now += 60
    assert tiers.take("a")
    assert tiers.reads == ["a", "a"] and tiers.cache.counters.load_failures == 1


def test_evicting_an_adapter_in_use_waits_until_it_is_free(tiers: Tiers):
    tiers.take("a")
    tiers.cache.evict("a")
    assert tiers.tiers() == {"a": "slot"}
    tiers.cache.release(ref("a"))
    assert tiers.tiers() == {}


def test_prefetching_says_how_it_went(tiers: Tiers):
    tiers.cache.prefetch(ref("a")).result(10)
    assert tiers.tiers() == {"a": "host"}
    tiers.failure = RuntimeError("disk")
    with pytest.raises(Exception, match="could not be read"):
        tiers.cache.prefetch(ref("b")).result(10)
    with pytest.raises(Exception, match="could not be read"):
        tiers.cache.prefetch(ref("b")).result(10)


def test_an_idle_adapter_leaves_slot_and_host_memory_unless_it_is_used_or_pinned():
    tiers = Tiers(num_slots=3, idle_s=50)
    for name in ("idle", "used", "pinned"):
        tiers.take(name)
    tiers.cache.release(ref("idle"))
    tiers.cache.release(ref("pinned"))
    tiers.cache.pin(ref("pinned"), True)
    tiers.now += 49
    tiers.cache.expire()
    assert set(tiers.tiers()) == {"idle", "used", "pinned"}
    tiers.now += 2
    tiers.cache.expire()
    assert set(tiers.tiers()) == {"used", "pinned"} and tiers.cache.counters.slot_evictions == 1
    tiers.cache.close()


def test_several_adapters_are_read_at_once_and_one_slow_read_holds_no_other():
    tiers = Tiers()
    tiers.slow.add("slow")
    tiers.gate.clear()
    tiers.cache.expect(ref("slow"))
    assert tiers.take("quick") and tiers.cache.acquire(ref("slow")) is None
    tiers.gate.set()
    assert until(lambda: tiers.cache.acquire(ref("slow")))
    tiers.cache.close()


def test_loads_beyond_host_memory_wait_until_those_before_have_a_slot():
    tiers = Tiers(num_slots=2, host_bytes=SIZE)
    for name in ("a", "b"):
        tiers.cache.expect(ref(name))
    until(lambda: tiers.cache.is_loaded(ref("a")))
    assert tiers.tiers() == {"a": "host", "b": "none"}
    assert tiers.cache.acquire(ref("a"))
    until(lambda: tiers.cache.is_loaded(ref("b")))
    assert tiers.cache.host_bytes_used() == SIZE
    tiers.cache.close()


def test_a_load_that_nobody_waits_for_any_more_is_not_begun():
    tiers = Tiers(num_loaders=1)
    tiers.gate.clear()
    tiers.slow.update("ab")
    for name in ("a", "b"):
        tiers.cache.expect(ref(name))
    tiers.cache.forget(ref("b"))
    tiers.gate.set()
    assert until(lambda: tiers.cache.acquire(ref("a")))
    until(lambda: "b" not in tiers.tiers())
    assert tiers.reads == ["a"]
    tiers.cache.close()


def test_a_missing_adapter_stays_missing_for_a_while_and_a_passing_failure_less_long(tiers: Tiers):
    tiers.failure = NotFound("There is no such adapter.")
    with pytest.raises(NotFound):
        tiers.cache.prefetch(ref("a")).result(10)
    tiers.failure = Overloaded("The store does not answer.", retry_after_s=3.0)
    with pytest.raises(Overloaded) as caught:
        tiers.cache.prefetch(ref("b")).result(10)
    assert caught.value.retry_after_s == 3.0
    tiers.failure = None
    tiers.now += 2
    with pytest.raises(NotFound, match="no such adapter"):
        tiers.cache.prefetch(ref("a")).result(10)
    tiers.cache.prefetch(ref("b")).result(10)
    tiers.now += 10
    tiers.cache.prefetch(ref("a")).result(10)
    assert tiers.reads == ["a", "b", "b", "a"]


def test_an_operator_who_unloads_a_broken_adapter_makes_it_be_read_again(tiers: Tiers):
    tiers.failure = AdapterRejected("It is broken.")
    with pytest.raises(AdapterRejected):
        tiers.cache.prefetch(ref("a")).result(10)
    tiers.failure = None
    tiers.cache.evict("a")
    tiers.cache.prefetch(ref("a")).result(10)


def test_a_copy_that_fails_leaves_slot_and_request_as_they_were(tiers: Tiers):
    tiers.write_failure = RuntimeError("out of memory")
    tiers.cache.expect(ref("a"))
    until(lambda: tiers.cache.is_loaded(ref("a")))
    with pytest.raises(RuntimeError):
        tiers.cache.acquire(ref("a"))
    tiers.write_failure = None
    assert tiers.tiers() == {"a": "host"} and tiers.cache.acquire(ref("a"))
    assert tiers.take("b")


def test_each_tier_tells_what_it_holds_and_what_happened(tiers: Tiers):
    for name in ("a", "a", "b", "c", "a"):
        tiers.take(name)
        tiers.cache.release(ref(name))
    slot, host = tiers.cache.tiers()["slot"], tiers.cache.tiers()["host"]
    assert (slot.hits, slot.misses, slot.fills, slot.evictions, slot.count) == (1, 4, 4, 2, 2)
    assert (host.hits, host.misses, host.fills, host.evictions, host.count) == (1, 3, 3, 0, 3)
    assert (slot.size_bytes, slot.limit_bytes) == (14, 14)
    assert (host.size_bytes, host.limit_bytes) == (3 * SIZE, 10 * SIZE)


def test_closing_ends_the_wait_for_loads_that_have_not_begun():
    tiers = Tiers(num_loaders=1)
    tiers.gate.clear()
    tiers.slow.add("a")
    loads = [tiers.cache.prefetch(ref(name)) for name in ("a", "b")]
    tiers.cache.close()
    tiers.gate.set()
    for load in loads:
        with pytest.raises(Overloaded, match="closing"):
            load.result(10)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=40), st.integers(1, 3), st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_whatever_is_asked_slots_hold_what_their_users_expect(steps, num_slots: int, host_adapters: int):
    tiers = Tiers(num_slots, host_adapters * SIZE)
    users: list[tuple[str, int]] = []
    for name, gives_back in steps:
        if users and (gives_back or len({user for user, _ in users} | {name}) > num_slots):
            given, _ = users.pop(0)
            tiers.cache.release(ref(given))
        if len({user for user, _ in users} | {name}) <= num_slots:
            users.append((name, tiers.take(name)))
        assert all(tiers.holds(slot) == user for user, slot in users)
    for name, _ in users:
        tiers.cache.release(ref(name))
    assert all(state.in_use == 0 for state in tiers.cache.states())
    assert tiers.cache.host_bytes_used() <= host_adapters * SIZE
    tiers.cache.close()


SIZES = {name: SIZE * factor for name, factor in zip("abcd", (1, 1, 2, 5), strict=True)}
OPERATIONS = (
    "use",
    "use",
    "expect",
    "forget",
    "acquire",
    "release",
    "release",
    "prefetch",
    "pin",
    "unpin",
    "evict",
    "wait",
)
OUTCOMES = ("finish", "miss", "break")


class Usage:
    """An adapter cache whose loads end when and how the test says, beside what its users may rely on."""

    def __init__(self, num_slots: int, host_bytes: int, idle_s: float | None, slots_use_host: bool) -> None:
        self.now, self.idle_s = 0.0, idle_s
        self.reading: dict[str, Future[None]] = {}
        self.slots: dict[int, str] = {}
        self.waiting, self.running = Counter[str](), Counter[str]()
        self.pinned: set[str] = set()
        self.slot_of: dict[str, int] = {}
        self.cache = AdapterCache(
            num_slots,
            host_bytes,
            self.load,
            lambda slot, host: self.slots.__setitem__(slot, next(iter(host.factors), "")),
            lambda: None,
            lambda: self.now,
            num_loaders=len(SIZES),
            idle_s=idle_s,
            slots_use_host=slots_use_host,
        )

    def ref(self, name: str) -> AdapterRef:
        return AdapterRef(sha256=name, uri=name, rank=4, size_bytes=SIZES[name])

    def load(self, asked: AdapterRef) -> HostAdapter:
        assert asked.sha256 not in self.reading, "two loads of one adapter"
        end = self.reading[asked.sha256] = Future()
        try:
            end.result(20)
        finally:
            del self.reading[asked.sha256]
        return HostAdapter(4, SIZES[asked.sha256], {asked.sha256: (torch.zeros(1), torch.zeros(1))})

    def tiers(self) -> dict[str, str]:
        return {state.sha256: state.tier for state in self.cache.states()}

    def needs(self) -> set[str]:
        return {*+self.waiting, *+self.running, *self.pinned}

    def do(self, operation: str, name: str) -> None:
        ref = self.ref(name)
        match operation:
            case "use":
                for part in ("expect", "finish", "acquire"):
                    self.do(part, name)
            case "expect":
                self.cache.expect(ref)
                self.waiting[name] += 1
            case "forget" if self.waiting[name]:
                self.cache.forget(ref)
                self.waiting[name] -= 1
            case "acquire" if self.waiting[name]:
                self.acquire(name)
            case "release" if self.running.total():
                name = name if self.running[name] else next(iter(+self.running))
                self.cache.release(self.ref(name))
                self.running[name] -= 1
            case "prefetch":
                self.cache.prefetch(ref)
            case "pin":
                try:
                    self.cache.pin(ref, True)
                    self.pinned.add(name)
                except Conflict:
                    assert len(self.pinned) >= self.cache.num_slots - 1
            case "unpin":
                self.cache.pin(ref, False)
                self.pinned.discard(name)
            case "evict":
                self.pinned.discard(name)
                self.cache.evict(name)
            case "wait":
                self.now += 3
                self.cache.expire()
            case "finish" | "miss" | "break":
                self.end_load(name, operation)
        # Threads of loads that have begun come to where the test ends them.
        until(lambda: all(name in self.reading for name, tier in self.tiers().items() if tier == "loading"))

    def acquire(self, name: str) -> None:
        try:
            slot = self.cache.acquire(self.ref(name))
        except (NotFound, Overloaded):
            assert self.tiers()[name] in ("failed", "loading")
            return
        if slot is None:
            in_use = {name for name, tier in self.tiers().items() if tier == "slot" and name in self.keeps_slot()}
            assert self.tiers()[name] in ("loading", "none") or len(in_use) == self.cache.num_slots
            return
        self.slot_of[name] = slot
        self.waiting[name] -= 1
        self.running[name] += 1

    def keeps_slot(self) -> set[str]:
        return {*+self.running, *self.pinned}

    def end_load(self, name: str, outcome: str) -> None:
        end = self.reading.get(name)
        if end is None:
            return
        if outcome == "finish":
            end.set_result(None)
        else:
            end.set_exception(NotFound("It is gone.") if outcome == "miss" else RuntimeError("the disk"))
        until(lambda: self.reading.get(name) is not end and self.tiers().get(name) != "loading")

    def check(self) -> None:
        tiers = self.tiers()
        for name in +self.running:
            assert tiers[name] == "slot" and self.slots[self.slot_of[name]] == name
        states = {state.sha256: state for state in self.cache.states()}
        assert {name: state.in_use for name, state in states.items() if state.in_use} == dict(+self.running)
        assert {name for name, state in states.items() if state.is_pinned} == self.pinned
        assert self.needs() <= states.keys()
        slot, host = self.cache.tiers()["slot"], self.cache.tiers()["host"]
        assert slot.count == sum(tier == "slot" for tier in tiers.values()) <= self.cache.num_slots
        assert slot.fills - slot.evictions == slot.count
        assert host.fills - host.evictions == host.count
        assert not self.cache.slots_use_host or host.count >= slot.count
        if host.size_bytes > host.limit_bytes:
            kept = ("host", "slot") if self.cache.slots_use_host else ("host",)
            held = {name for name, tier in tiers.items() if tier in kept and name in self.needs()}
            assert host.size_bytes == sum(SIZES[name] for name in held)

    def loaded(self) -> dict[str, str]:
        return {name: tier for name, tier in self.tiers().items() if tier in ("slot", "host") and name in self.needs()}

    def finish(self) -> None:
        """Everybody goes; nothing stays behind."""
        for name in SIZES:
            for _ in range(self.running[name]):
                self.cache.release(self.ref(name))
            for _ in range(self.waiting[name]):
                self.cache.forget(self.ref(name))
            self.cache.evict(name)
        for name in SIZES:
            self.end_load(name, "finish")
        until(lambda: not self.tiers())
        slot, host = self.cache.tiers()["slot"], self.cache.tiers()["host"]
        assert (slot.count, host.count, host.size_bytes) == (0, 0, 0)
        for name in list(SIZES)[: self.cache.num_slots]:
            self.cache.expect(self.ref(name))
            until(lambda name=name: name in self.reading)
            self.end_load(name, "finish")
            assert self.cache.acquire(self.ref(name))
        self.cache.close()


@given(
    st.lists(st.tuples(st.sampled_from(OPERATIONS + OUTCOMES), st.sampled_from("abcd")), max_size=60),
    st.integers(1, 3),
    st.integers(0, 6),
    st.sampled_from([None, 5.0]),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_in_any_order_of_events_nothing_that_is_needed_is_lost_and_nothing_leaks(
    events, num_slots: int, host_adapters: int, idle_s: float | None, slots_use_host: bool
):
    usage = Usage(num_slots, host_adapters * SIZE, idle_s, slots_use_host)
    for operation, name in events:
        before = usage.loaded()
        usage.do(operation, name)
        usage.check()
        after = usage.loaded()
        for kept in before.keys() & usage.needs():
            if before[kept] == "host":
                assert kept in after, "the copy that somebody waits for was dropped"
            elif kept in usage.keeps_slot():
                assert after.get(kept) == "slot", "a slot in use was taken"
    usage.finish()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_that_was_unloaded_answers_alike_when_it_is_asked_again(
    open_core: OpenCore, tiny_adapters: list[Path], tiny_prompts: list[list[int]], dtype: str
):
    engine = open_core(dtype=dtype, adapter_slots=2)
    one, two = (ref_of(folder) for folder in tiny_adapters[:2])
    for id, adapter in (("first", one), ("other", two)):
        engine.core.add(request(id, tiny_prompts[3], adapter=adapter))
        engine.run()
    engine.core.adapters.evict(one.sha256)
    engine.core.add(request("base", tiny_prompts[3]))
    engine.run()
    for id, adapter in (("again", one), ("other again", two)):
        engine.core.add(request(id, tiny_prompts[3], adapter=adapter))
        engine.run()
    assert engine.tokens("first") == engine.tokens("again") != engine.tokens("base")
    assert engine.tokens("other") == engine.tokens("other again")
    stats = engine.core.stats()
    assert stats.tiers["slot"].fills == 3 and stats.tiers["host"].size_bytes > 0
