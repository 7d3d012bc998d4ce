import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloom.domain import AdapterRef
from tuneloom.engine.adapters import AdapterCache
from tuneloom.engine.lora import HostAdapter
from tuneloom.errors import AdapterRejected, Conflict

SIZE = 100


def ref(name: str) -> AdapterRef:
    return AdapterRef(sha256=name, uri=name, rank=4, size_bytes=SIZE)


class Tiers:
    """An adapter cache over a fake disk, with a clock by hand."""

    def __init__(self, num_slots: int = 2, host_bytes: int = 10 * SIZE) -> None:
        self.now = 100.0
        self.reads: list[str] = []
        self.slots: dict[int, HostAdapter] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.cache = AdapterCache(
            num_slots, host_bytes, self.load, self.slots.__setitem__, lambda: None, lambda: self.now
        )

    def load(self, asked: AdapterRef) -> HostAdapter:
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
