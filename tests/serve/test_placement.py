"""Where requests go, by properties and by simulation of a fleet."""

import hashlib
import math
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloom.domain import AdapterRef
from tuneloom.generation import ChatPrompt, GenerationRequest, Prompt, SamplingParams, TextPrompt, TokenPrompt
from tuneloom.serve.placement import Placement, Rates, RoutingKey, rendezvous

names = st.lists(st.text("abcdefgh0123456789", min_size=4, max_size=8), min_size=1, max_size=12, unique=True)
keys = st.text(min_size=1, max_size=12)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def placement(clock: Callable[[], float] | None = None, **options: Any) -> Placement:
    return Placement(clock=clock or Clock(), **options)


@settings(max_examples=60, deadline=None)
@given(keys, names, st.data())
def test_a_replica_that_goes_moves_only_its_own_keys(key: str, replicas: list[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(replicas))
    left = [name for name in replicas if name != gone]
    assert rendezvous(key, left) == [name for name in rendezvous(key, replicas) if name != gone]


def test_a_new_replica_takes_its_share_of_the_keys_and_no_more() -> None:
    replicas = [f"r{i}" for i in range(9)]
    before = {key: rendezvous(key, replicas[:8])[0] for key in map(str, range(4000))}
    after = {key: rendezvous(key, replicas)[0] for key in before}
    moved = [key for key in before if before[key] != after[key]]
    assert all(after[key] == "r8" for key in moved)
    assert 4000 / 9 * 0.8 < len(moved) < 4000 / 9 * 1.2
    assert max(Counter(after.values()).values()) < 4000 / 9 * 1.25


def test_the_order_is_the_same_in_every_process() -> None:
    assert rendezvous("adapter", ["a", "b", "c", "d", "e"]) == ["e", "c", "b", "a", "d"]


@settings(max_examples=80, deadline=None)
@given(
    st.builds(RoutingKey, st.sampled_from(["", "x", "y"]), st.sampled_from(["", "p", "q"])),
    st.dictionaries(st.sampled_from([f"r{i}" for i in range(8)]), st.integers(0, 50), max_size=8),
    st.integers(0, 200),
)
def test_every_replica_is_in_the_order_once_and_none_over_the_bound_before_one_below(
    key: RoutingKey, loads: dict[str, int], calls: int
) -> None:
    place = placement()
    for _ in range(calls):
        place.count(key)
    order = place.order(key, loads)
    assert sorted(order) == sorted(loads)
    if key.main and loads:
        is_over = [loads[name] >= place.bound(loads) for name in order]
        assert is_over == sorted(is_over) and not is_over[0]
    else:
        assert [loads[name] for name in order] == sorted(loads.values())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=50, max_size=200), st.integers(2, 8))
def test_no_replica_is_ever_far_over_the_mean(key_numbers: list[int], num_replicas: int) -> None:
    place = placement(load_factor=1.25, slack=2)
    loads = {f"r{i}": 0 for i in range(num_replicas)}
    for number in key_numbers:
        loads[place.order(RoutingKey(f"k{number}"), loads)[0]] += 1
        assert max(loads.values()) <= math.ceil(1.25 * sum(loads.values()) / num_replicas) + 2


def test_the_spread_of_a_key_grows_with_its_rate_and_decays() -> None:
    clock = Clock()
    place = placement(clock, rate_per_replica=4.0, window_s=10.0)
    key = RoutingKey("hot")

    def spread_at(rate: float) -> int:
        for _ in range(int(60 * rate)):
            clock.now += 1 / rate
            place.count(key)
        return place.spread(key)

    assert [spread_at(rate) for rate in (1, 6, 14, 30)] == [1, 2, 4, 8]
    clock.now += 60
    assert place.spread(key) == 1
    assert place.spread(RoutingKey("other")) == 1


def test_a_busy_adapter_uses_its_share_of_replicas_evenly_and_a_quiet_one_only_one() -> None:
    place = placement()
    loads = {f"r{i}": 0 for i in range(8)}
    for _ in range(60):
        place.count(RoutingKey("hot"))
    assert place.spread(RoutingKey("hot")) == 2
    used = Counter()
    for _ in range(100):
        name = place.order(RoutingKey("hot"), {**loads, **{r: used[r] for r in used}})[0]
        used[name] += 1
    assert set(rendezvous("hot", loads)[:2]) <= set(used)
    assert len({place.order(RoutingKey("quiet"), loads)[0] for _ in range(20)}) == 1


def test_conversations_of_a_busy_adapter_each_keep_to_one_replica() -> None:
    place = placement(rate_per_replica=0.1)
    loads = {f"r{i}": 0 for i in range(8)}
    for _ in range(8):
        place.count(RoutingKey("hot"))
    firsts = {f"p{i}": place.order(RoutingKey("hot", f"p{i}"), loads)[0] for i in range(40)}
    assert firsts == {prefix: place.order(RoutingKey("hot", prefix), loads)[0] for prefix in firsts}
    assert set(firsts.values()) == set(loads)


def test_rates_of_many_keys_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloom.serve.placement.MAX_KEYS", 100)
    rates = Rates(10.0, Clock())
    for number in range(1000):
        rates.add("steady")
        rates.add(f"k{number}")
    assert len(rates._counters) <= 100
    assert rates.get("steady") == pytest.approx(100.0)


def make_request(prompt: Prompt, owner: str = "ada", adapter: str = "") -> GenerationRequest:
    ref = AdapterRef(sha256=adapter, uri="u", rank=4, size_bytes=1) if adapter else None
    return GenerationRequest("req", (prompt,), SamplingParams(), owner=owner, adapter=ref)


def chat(*contents: str) -> ChatPrompt:
    roles = ["system", *(["user", "assistant"] * len(contents))]
    return ChatPrompt(tuple({"role": role, "content": text} for role, text in zip(roles, contents, strict=False)))


SYSTEM = "You are a patient helper who answers in one word. " * 8


def test_later_turns_of_a_conversation_have_the_key_of_the_first() -> None:
    first = RoutingKey.of(make_request(chat(SYSTEM, "hello")))
    second = RoutingKey.of(make_request(chat(SYSTEM, "hello", "hi", "how are you?")))
    assert first == second and first.prefix
    assert first != RoutingKey.of(make_request(chat(SYSTEM, "good day")))


def test_keys_hold_neither_a_prompt_nor_meet_across_owners() -> None:
    ours = RoutingKey.of(make_request(chat(SYSTEM, "hello"), adapter="a" * 64))
    theirs = RoutingKey.of(make_request(chat(SYSTEM, "hello"), owner="eve", adapter="a" * 64))
    assert (ours.adapter, ours.prefix == theirs.prefix) == (theirs.adapter, False)
    assert len(str(ours)) == 64 + 1 + 32


@pytest.mark.parametrize("prompt", [chat("", "hello"), TextPrompt("short"), TokenPrompt((1, 2, 3)), TextPrompt("")])
def test_a_short_prompt_of_a_bare_base_goes_where_it_is_quiet(prompt: Prompt) -> None:
    assert str(RoutingKey.of(make_request(prompt))) == ""


@pytest.mark.parametrize("prompt", [TextPrompt("word \ud800" * 200), TokenPrompt(tuple(range(1000)))])
def test_long_texts_and_token_ids_have_a_key(prompt: Prompt) -> None:
    key = RoutingKey.of(make_request(prompt))
    assert key.main == key.prefix != ""
    assert RoutingKey.parse(str(key)) == key


# How often an adapter is found in a slot, in a simulated fleet.


class Fleet:
    """Replicas with slots for adapters, least recently used out, and a queue of requests in work at each."""

    def __init__(self, num_replicas: int, num_slots: int) -> None:
        self._num_slots = num_slots
        self._slots: dict[str, OrderedDict[str, None]] = {f"r{i}": OrderedDict() for i in range(num_replicas)}
        self._running: deque[str] = deque()
        self.loads = dict.fromkeys(self._slots, 0)
        self.hits = self.largest_load = 0

    def send(self, replica: str, adapter: str, num_running: int) -> None:
        slots = self._slots[replica]
        self.hits += adapter in slots
        slots[adapter] = None
        slots.move_to_end(adapter)
        if len(slots) > self._num_slots:
            slots.popitem(last=False)
        self.loads[replica] += 1
        self._running.append(replica)
        self.largest_load = max(self.largest_load, self.loads[replica])
        if len(self._running) > num_running:
            self.loads[self._running.popleft()] -= 1


def hit_rate(choose: Callable[[str, dict[str, int], Clock], str]) -> tuple[float, int]:
    """Zipf 1.0 over 1,000 adapters, 8 replicas of 16 slots, 64 requests in work, 20 requests a second."""
    source, clock, fleet = random.Random(1), Clock(), Fleet(8, 16)
    adapters = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(1000)]
    weights = [1 / (rank + 1) for rank in range(len(adapters))]
    calls = source.choices(adapters, weights, k=8000)
    for adapter in calls:
        clock.now += 0.05
        fleet.send(choose(adapter, fleet.loads, clock), adapter, 64)
    return fleet.hits / len(calls), fleet.largest_load


def test_by_affinity_adapters_are_found_in_slots_far_more_often_than_by_chance() -> None:
    source = random.Random(2)
    places: dict[int, Placement] = {}

    def by_affinity(adapter: str, loads: dict[str, int], clock: Clock) -> str:
        place = places.setdefault(0, placement(clock))
        place.count(RoutingKey(adapter))
        return place.order(RoutingKey(adapter), loads)[0]

    def by_chance(adapter: str, loads: dict[str, int], clock: Clock) -> str:
        return source.choice(list(loads))

    def better_of_two(adapter: str, loads: dict[str, int], clock: Clock) -> str:
        return min(source.sample(list(loads), 2), key=loads.__getitem__)

    ours, largest = hit_rate(by_affinity)
    chance, _ = hit_rate(by_chance)
    of_two, _ = hit_rate(better_of_two)
    print(f"hit rate: by affinity {ours:.3f}, by chance {chance:.3f}, better of two {of_two:.3f}")
    assert ours > 1.6 * max(chance, of_two)
    assert largest <= math.ceil(1.25 * 64 / 8) + 3
