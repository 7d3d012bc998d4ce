from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.conftest import GREEDY, request
from tuneloom.domain import AdapterRef
from tuneloom.engine.sampler import SamplingState
from tuneloom.engine.scheduler import Scheduler, Work
from tuneloom.engine.sequence import Sequence

ADAPTER = AdapterRef(sha256="a", uri="a", rank=4, size_bytes=1)


def sequence(id: str, prompt: int, output: int = 4, adapter: AdapterRef | None = None) -> Sequence:
    return Sequence(request(id, [5] * prompt, adapter=adapter), SamplingState(GREEDY, ()), 0.0, output)


class Rooms:
    """Cache slots, and whether adapters are ready: what admission depends on."""

    def __init__(self, slots: int) -> None:
        self.free = list(range(slots))
        self.has_adapters = True

    def admit(self, sequence: Sequence) -> bool:
        if not self.free or (sequence.adapter and not self.has_adapters):
            return False
        sequence.cache_slot = self.free.pop()
        return True


def scheduler(max_running: int = 4, max_step_tokens: int = 32) -> tuple[Scheduler, Rooms]:
    rooms = Rooms(max_running)
    return Scheduler(max_running, max_step_tokens, rooms.admit, lambda s: False), rooms


def carry_out(work: Work, made: Scheduler, rooms: Rooms) -> None:
    """What the engine does with a plan, with one token for each sequence that samples."""
    for each, count in [*((s, 1) for s in work.decoding), *work.prefilling]:
        each.num_computed += count
        if not each.num_pending:
            each.output_ids.append(9)
        if len(each.output_ids) >= each.max_tokens:
            made.remove(each)
            rooms.free.append(each.cache_slot)


@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 6)), min_size=1, max_size=20),
    st.integers(1, 6),
    st.integers(16, 64),
)
@settings(max_examples=60, deadline=None)
def test_every_sequence_ends_and_no_step_is_larger_than_allowed(sizes, max_running: int, max_step_tokens: int):
    made, rooms = scheduler(max_running, max_step_tokens)
    for i, (prompt, output) in enumerate(sizes):
        made.add(sequence(str(i), prompt, output))
    for _ in range(sum(prompt + output for prompt, output in sizes)):
        was_decoding = [s for s in made.running if s.is_decoding]
        work = made.plan(0.0)
        assert work.decoding == sorted(was_decoding, key=lambda s: s.cache_slot)
        prefill = sum(count for _, count in work.prefilling)
        assert prefill <= max(max_step_tokens - len(work.decoding), 16)
        assert len(made.running) <= max_running
        carry_out(work, made, rooms)
        if not made.running and not made.waiting:
            return
    raise AssertionError("some sequence never ended")


def test_prompts_are_served_in_order_of_arrival_and_cut_into_chunks():
    made, rooms = scheduler(max_step_tokens=20)
    for id, prompt in (("a", 30), ("b", 5), ("c", 40)):
        made.add(sequence(id, prompt))
    plans = []
    for _ in range(3):
        work = made.plan(0.0)
        plans.append(([s.id for s in work.decoding], [(s.id, count) for s, count in work.prefilling]))
        carry_out(work, made, rooms)
    assert plans == [
        ([], [("a", 20)]),
        ([], [("a", 10), ("b", 5), ("c", 5)]),
        (["b", "a"], [("c", 18)]),
    ]


def test_one_whose_adapter_is_not_ready_lets_others_pass_and_comes_first_later():
    made, rooms = scheduler(max_running=2)
    rooms.has_adapters = False
    made.add(sequence("waits", 5, adapter=ADAPTER))
    made.add(sequence("passes", 5, output=1))
    assert [s.id for s, _ in made.plan(0.0).prefilling] == ["passes"]
    rooms.has_adapters = True
    made.add(sequence("later", 5))
    assert "waits" in [s.id for s, _ in made.plan(0.0).prefilling]


def test_a_step_full_of_decoding_still_goes_on_with_prompts():
    made, rooms = scheduler(max_running=30, max_step_tokens=16)
    for i in range(20):
        made.add(sequence(str(i), 1, output=50))
    for _ in range(5):
        carry_out(made.plan(0.0), made, rooms)
    made.add(sequence("new", 40))
    work = made.plan(0.0)
    assert len(work.decoding) == 20
    assert [(s.id, count) for s, count in work.prefilling] == [("new", 16)]
