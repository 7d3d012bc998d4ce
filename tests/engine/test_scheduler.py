"""The scheduler against a small engine of integers, in which a step takes as long as a formula says."""

import heapq
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.conftest import request
from tuneloom.domain import AdapterRef
from tuneloom.engine.sampler import SamplingState
from tuneloom.engine.scheduler import LEAST_PREFILL, Scheduler
from tuneloom.engine.sequence import Sequence
from tuneloom.engine.work import Limits, Outcome, Work
from tuneloom.generation import SamplingParams


def adapter(name: str, size_bytes: int = 1) -> AdapterRef:
    return AdapterRef(sha256=name, uri=name, rank=4, size_bytes=size_bytes)


def sequence(id: str, prompt: int, output: int = 4, **more) -> Sequence:
    asked = request(id, [5] * prompt, **more)
    return Sequence(asked, SamplingState(SamplingParams(), ()), 0.0, output)


@dataclass
class Machine:
    """Cache slots, a budget of tokens, adapter slots, and a clock: what scheduling depends on.

    Tokens of answers count up, so that a lost, repeated or foreign one shows.
    """

    limits: Limits
    adapter_slots: int = 4
    ready: set[str] | None = None
    step_ms: float = 10.0
    row_ms: float = 0.0
    prompt_ms: float = 0.0
    now: float = 0.0
    reserved: dict[Sequence, int] = field(default_factory=dict)
    holders: dict[str, set[Sequence]] = field(default_factory=dict)
    works: list[Work] = field(default_factory=list)
    ended: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.limits.max_running))
        self.scheduler = Scheduler(self.limits, self)

    @property
    def free_tokens(self) -> int:
        return self.limits.cache_tokens - sum(self.reserved.values())

    def admit(self, sequence: Sequence) -> Outcome:
        assert sequence not in self.reserved
        need = min(sequence.num_tokens + 16, sequence.most_tokens)
        key = sequence.adapter_key
        if not self.free or need > self.free_tokens:
            return Outcome.NO_ROOM if self.is_ready(sequence) else Outcome.LOADING
        if key is not None:
            if self.ready is not None and key not in self.ready:
                return Outcome.LOADING
            if key not in self.holders and len(self.holders) >= self.adapter_slots:
                return Outcome.NO_SLOT
            if key not in self.holders:
                sequence.load_bytes = sequence.adapter.size_bytes
            self.holders.setdefault(key, set()).add(sequence)
        self.reserved[sequence] = need
        sequence.cache_slot = heapq.heappop(self.free)
        return Outcome.ADMITTED

    def is_ready(self, sequence: Sequence) -> bool:
        key = sequence.adapter_key
        is_loaded = key is None or self.ready is None or key in self.ready
        return is_loaded and (key is None or key in self.holders or len(self.holders) < self.adapter_slots)

    def extend(self, sequence: Sequence) -> bool:
        more = max(0, sequence.num_tokens - self.reserved[sequence])
        if more > self.free_tokens:
            return False
        self.reserved[sequence] += more
        return True

    def goes_on(self, sequence: Sequence) -> bool:
        return True

    def take_back(self, sequence: Sequence) -> None:
        del self.reserved[sequence]
        heapq.heappush(self.free, sequence.cache_slot)
        sequence.cache_slot, sequence.num_computed = None, 0
        if sequence.adapter_key is not None:
            self.holders[sequence.adapter_key].remove(sequence)
            if not self.holders[sequence.adapter_key]:
                del self.holders[sequence.adapter_key]

    def add(self, *sequences: Sequence) -> None:
        for each in sequences:
            self.scheduler.add(each)

    def remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        if sequence in self.reserved:
            self.take_back(sequence)

    def step(self) -> Work:
        work = self.scheduler.plan(self.now)
        self.works.append(work)
        if not work.sequences:
            self.now += 0.05
            return work
        ms = self.step_ms + self.row_ms * len(work.decoding) + self.prompt_ms * work.num_prefill
        self.now += ms / 1000
        for each, count in [*((s, 1) for s in work.decoding), *work.prefilling]:
            each.num_computed += count
            assert each.num_computed <= self.reserved[each], "it writes only what it reserved"
        self.scheduler.done(work, ms)
        for each in work.sequences:
            if not each.num_pending:
                each.output_ids.append(len(each.output_ids))
            if len(each.output_ids) >= each.max_tokens:
                self.remove(each)
                self.ended[each.id] = self.now
        return work

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.running and not self.scheduler.num_waiting:
                return
            self.step()
        raise AssertionError("some sequence never ended")


def machine(max_running: int = 4, max_step_tokens: int = 32, cache_tokens: int = 10_000, **more) -> Machine:
    known = {key: more.pop(key) for key in ("max_step_ms", "decode_weight", "adapter_bytes_per_token") if key in more}
    return Machine(Limits(max_running, max_step_tokens, cache_tokens, **known), **more)


def ids(work: Work) -> tuple[list[str], list[tuple[str, int]]]:
    return [s.id for s in work.decoding], [(s.id, count) for s, count in work.prefilling]


def test_prompts_are_served_in_order_of_arrival_and_cut_into_chunks():
    engine = machine(max_step_tokens=20)
    engine.add(sequence("a", 30), sequence("b", 5), sequence("c", 40))
    assert [ids(engine.step()) for _ in range(3)] == [
        ([], [("a", 20)]),
        ([], [("a", 10), ("b", 5), ("c", 5)]),
        (["a", "b"], [("c", 18)]),
    ]


def test_one_whose_adapter_is_not_ready_lets_others_pass_and_comes_first_later():
    engine = machine(max_running=2, ready=set())
    engine.add(sequence("waits", 5, adapter=adapter("a")), sequence("passes", 5, output=1))
    assert ids(engine.step())[1] == [("passes", 5)]
    engine.ready = {"a"}
    engine.add(sequence("later", 5))
    assert ("waits", 5) in ids(engine.step())[1]


def test_a_step_full_of_decoding_still_goes_on_with_prompts():
    engine = machine(max_running=30, max_step_tokens=16)
    engine.add(*(sequence(str(i), 1, output=50) for i in range(20)))
    for _ in range(5):
        engine.step()
    engine.add(sequence("new", 40))
    decoding, prefilling = ids(engine.step())
    assert len(decoding) == 20
    assert prefilling == [("new", LEAST_PREFILL)]


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[int, Sequence, int | None]]:
    """Sequences with the step in which they come, and the one in which they are aborted, if they are."""
    found = []
    for i in range(draw(st.integers(1, 24))):
        name = draw(st.sampled_from([None, None, "a", "b", "c", "d"]))
        each = sequence(
            str(i),
            draw(st.integers(1, 50)),
            draw(st.integers(1, 30)),
            owner=draw(st.sampled_from("xyz")),
            priority=draw(st.integers(-1, 1)),
            adapter=adapter(name) if name else None,
        )
        came = draw(st.integers(0, 25))
        found.append((came, each, draw(st.one_of(st.none(), st.none(), st.integers(came, 60)))))
    return found


@given(arrivals(), st.data())
@settings(max_examples=120, deadline=None)
def test_whatever_comes_limits_hold_all_ends_and_nothing_stays_behind(comings, data: st.DataObject):
    engine = machine(
        max_running=data.draw(st.integers(1, 6)),
        max_step_tokens=data.draw(st.integers(16, 64)),
        # The largest sequence has 80 tokens; at 80 nearly each is preempted at some time.
        cache_tokens=data.draw(st.integers(80, 260)),
        adapter_slots=data.draw(st.integers(1, 4)),
        ready=set(),
        row_ms=data.draw(st.sampled_from([0.0, 5.0])),
        prompt_ms=data.draw(st.sampled_from([0.0, 1.0])),
        max_step_ms=data.draw(st.sampled_from([20.0, 200.0])),
    )
    becomes_ready = {name: data.draw(st.integers(0, 40)) for name in "abcd"}
    aborted = set()
    rested = dict.fromkeys("xyz", 0)
    for step in range(3000):
        for came, each, ends in comings:
            if came == step:
                engine.add(each)
            if ends == step and each.id not in engine.ended:
                engine.remove(each)
                aborted.add(each.id)
        for name, at in becomes_ready.items():
            if at == step:
                engine.ready.add(name)
                engine.scheduler.news()
        before = {account.owner: account.served for account in engine.scheduler.accounts if account.is_active}
        rested = (
            {owner: count + 1 if owner in work.resting else 0 for owner, count in rested.items()}
            if (work := check_step(engine))
            else rested
        )
        assert max(rested.values()) < 40, "nobody sits out for long"
        after = {account.owner: account.served for account in engine.scheduler.accounts}
        assert all(after.get(owner, served) >= served for owner, served in before.items())
        if step > 60 and not engine.scheduler.running and not engine.scheduler.num_waiting:
            break
    assert set(engine.ended) | aborted == {each.id for _, each, _ in comings}
    assert all(each.output_ids == list(range(each.max_tokens)) for _, each, _ in comings if each.id in engine.ended)
    assert engine.free_tokens == engine.limits.cache_tokens
    assert sorted(engine.free) == list(range(engine.limits.max_running))
    assert not engine.holders and not engine.scheduler.waiting_tokens and not engine.scheduler.accounts.num_active


def check_step(engine: Machine) -> Work:
    """A step, and what holds in each."""
    scheduler = engine.scheduler
    work = engine.step()
    planned = {each.id for each in work.sequences}
    assert len(planned) == len(work.sequences)
    assert work.num_prefill <= max(engine.limits.max_step_tokens - len(work.decoding), LEAST_PREFILL)
    assert engine.free_tokens >= 0 and len(scheduler.running) <= engine.limits.max_running
    waiting = [each for account in scheduler.accounts for each in account.waiting]
    assert len(waiting) == scheduler.num_waiting
    assert sum(each.num_pending for each in waiting) == scheduler.waiting_tokens
    for each in scheduler.running:
        if each.id not in planned and each.owner not in work.resting:
            assert not each.is_decoding, "who decodes has a token in each step"
    if len({each.owner for each in [*scheduler.running, *waiting]}) < 2 and not engine.ended:
        assert not work.resting, "nobody makes way for himself"
    if not work.sequences:
        assert all(each.adapter_key and each.adapter_key not in engine.ready for each in waiting), "work is done"
    return work


def test_a_full_cache_preempts_the_lowest_priority_and_then_the_latest():
    engine = machine(max_running=3, max_step_tokens=64, cache_tokens=90)
    asked = {id: sequence(id, 10, 40, priority=priority) for id, priority in (("a", 0), ("low", -1), ("b", 0))}
    engine.add(asked["a"], asked["b"], asked["low"])
    while not engine.scheduler.num_preemptions:
        engine.step()
    assert [each.id for each in engine.scheduler.running] == ["a", "b"]
    while engine.scheduler.num_preemptions < 2:
        engine.step()
    assert [each.id for each in engine.scheduler.running] == ["a"]
    engine.run()
    assert all(each.output_ids == list(range(40)) for each in asked.values())
    assert list(engine.ended) == ["a", "b", "low"]


def test_the_owner_that_holds_most_of_a_full_cache_gives_way():
    engine = machine(max_running=4, max_step_tokens=64, cache_tokens=100)
    engine.add(sequence("first", 20, 60, owner="many"), *(sequence(f"m{i}", 10, 60, owner="many") for i in range(2)))
    engine.step()
    engine.add(sequence("lone", 10, 60, owner="lone"))
    while not engine.scheduler.num_preemptions:
        engine.step()
    assert {each.id for each in engine.scheduler.running} >= {"first", "lone"}
    engine.run()


def test_a_large_sequence_is_not_passed_by_small_ones_for_ever():
    engine = machine(max_running=8, max_step_tokens=64, cache_tokens=100)
    engine.add(*(sequence(f"small{i}", 10, 10) for i in range(4)), sequence("large", 80, 4))
    for i in range(60):
        engine.add(sequence(f"later{i}", 10, 10))
        engine.step()
    assert "large" in engine.ended
    engine.run()


def test_priority_counts_within_an_owner_and_not_between_owners():
    engine = machine(max_running=1, max_step_tokens=64)
    engine.add(sequence("now", 5, 2, owner="a"))
    engine.step()
    engine.add(sequence("a-low", 5, 2, owner="a"), sequence("a-high", 5, 2, owner="a", priority=9))
    engine.add(sequence("b-low", 5, 2, owner="b", priority=-9))
    engine.run()
    assert list(engine.ended) == ["now", "b-low", "a-high", "a-low"]


def test_an_early_deadline_does_not_jump_the_queue():
    engine = machine(max_running=1)
    engine.add(sequence("first", 5, 2, deadline_s=900), sequence("hurry", 5, 2, deadline_s=3))
    engine.run()
    assert list(engine.ended) == ["first", "hurry"]


def test_owners_with_work_get_the_same_service_whatever_they_send():
    engine = machine(max_running=16, max_step_tokens=256, row_ms=2.4, prompt_ms=1.3)
    flood(engine, 1200, a=(64, 64, 64), b=(20, 200, 20), c=(40, 20, 150))
    served = [account.served for account in engine.scheduler.accounts]
    assert len(served) == 3
    assert sum(served) ** 2 / (3 * sum(value**2 for value in served)) > 0.99


@pytest.mark.parametrize(("step_ms", "row_ms", "prompt_ms"), [(27, 2.4, 1.3), (10, 2.0, 0.5), (20, 0.05, 0.02)])
def test_one_stream_beside_64_keeps_nearly_half_its_speed(step_ms: float, row_ms: float, prompt_ms: float):
    """Costs of a CPU, which computes rows one after another, and of a GPU, for which they are nearly free."""
    took = {}
    for others in (0, 64):
        engine = machine(max_running=32, max_step_tokens=256, step_ms=step_ms, row_ms=row_ms, prompt_ms=prompt_ms)
        flood(engine, 150 if others else 0, flood=(others, 64, 64))
        times = []
        for i in range(6):
            begun = engine.now
            engine.add(sequence(f"lone{i}", 64, 64, owner="lone"))
            while f"lone{i}" not in engine.ended:
                flood(engine, 1, flood=(others, 64, 64))
            times.append(engine.now - begun)
        took[others] = sorted(times)[3]
    assert took[64] <= 2.2 * took[0]
    assert len(engine.ended) > 60, "and the others go on"


def flood(engine: Machine, num_steps: int, **owners: tuple[int, int, int]) -> None:
    """Steps in which each owner has so many sequences open, of so many prompt and answer tokens."""
    for _ in range(num_steps):
        for owner, (count, prompt, output) in owners.items():
            found = [account for account in engine.scheduler.accounts if account.owner == owner]
            num_open = sum(len(account.running) + len(account.waiting) for account in found)
            for i in range(count - num_open):
                number = f"{owner}-{engine.now}-{i}"
                engine.add(sequence(number, prompt, output, owner=owner))
        check_step(engine)


def test_an_owner_of_which_nothing_runs_gets_a_place_at_once():
    engine = machine(max_running=4, max_step_tokens=64)
    engine.add(*(sequence(f"f{i}", 5, 500, owner="flood") for i in range(9)))
    for _ in range(20):
        engine.step()
    engine.add(sequence("new", 5, 5, owner="new"))
    engine.step()
    assert "new" in {each.id for each in engine.scheduler.running}
    assert engine.scheduler.num_preemptions == 1
    engine.add(sequence("new2", 5, 5, owner="new"))
    engine.step()
    assert engine.scheduler.num_preemptions == 1, "one place is enough for a second of the same owner to wait"
    engine.run()


def test_steps_with_answers_keep_to_their_time_and_prompts_still_go_on():
    engine = machine(max_running=8, max_step_tokens=256, max_step_ms=60.0, step_ms=20.0, row_ms=2.0, prompt_ms=0.5)
    engine.add(sequence("answers", 10, 300))
    for _ in range(3):
        engine.step()
    engine.add(sequence("long", 3000, 3))
    took = []
    while "long" not in engine.ended:
        before = engine.now
        work = engine.step()
        assert work.decoding
        took.append((engine.now - before) * 1000)
    assert max(took) <= 61
    assert sum(took) / len(took) > 50, "and the time is used"


def test_a_time_that_cannot_be_kept_does_not_starve_prompts():
    engine = machine(max_running=8, max_step_tokens=256, max_step_ms=5.0, step_ms=20.0, row_ms=2.0, prompt_ms=0.5)
    engine.add(sequence("answers", 10, 300))
    for _ in range(3):
        engine.step()
    engine.add(sequence("long", 200, 3))
    for _ in range(200 // LEAST_PREFILL + 4):
        engine.step()
    assert "long" in engine.ended


def test_prompts_are_read_in_the_largest_chunks_while_nobody_waits_for_an_answer():
    engine = machine(max_step_tokens=256, max_step_ms=20.0, step_ms=20.0, prompt_ms=1.0)
    engine.add(sequence("a", 600, 1), sequence("b", 100, 1))
    assert [engine.step().num_prefill for _ in range(2)] == [256, 256]


def test_many_adapters_that_are_not_ready_keep_none_that_is_from_its_turn():
    engine = machine(max_running=4, ready={"ready"})
    engine.add(*(sequence(f"s{i}", 5, adapter=adapter(f"a{i}"), owner=f"o{i}") for i in range(1000)))
    engine.add(sequence("good", 5, 2, adapter=adapter("ready"), owner="last"))
    for _ in range(8):
        engine.scheduler.news()
        engine.step()
    assert "good" in engine.ended


def test_an_adapter_that_finds_no_slot_gets_one_although_others_are_always_in_use():
    engine = machine(max_running=4, adapter_slots=2, step_ms=100.0)
    engine.add(*(sequence(f"x{i}", 5, 8, adapter=adapter("ab"[i % 2])) for i in range(4)))
    engine.step()
    engine.add(sequence("starved", 5, 8, adapter=adapter("c")))
    for i in range(100):
        engine.add(sequence(f"more{i}", 5, 8, adapter=adapter("ab"[i % 2])))
        engine.step()
        if "starved" in engine.ended:
            break
    assert "starved" in engine.ended
    engine.run()


def test_loading_an_adapter_counts_as_tokens_of_its_owner():
    engine = machine(adapter_bytes_per_token=1000)
    engine.add(sequence("a", 5, 1, owner="a", adapter=adapter("x", size_bytes=50_000)))
    engine.scheduler.plan(0.0)
    assert engine.scheduler.accounts.get("a").served == 55
