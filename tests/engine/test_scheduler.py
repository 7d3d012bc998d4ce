"""The scheduler against a small engine of integers, in which a step takes as long as a formula says."""

import heapq
from dataclasses import dataclass, field

from tests.engine.conftest import request
from tuneloom.domain import AdapterRef
from tuneloom.engine.sampler import SamplingState
from tuneloom.engine.scheduler import LEAST_PREFILL, Limits, Outcome, Scheduler, Work
from tuneloom.engine.sequence import Sequence
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
            return Outcome.NO_ROOM
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
