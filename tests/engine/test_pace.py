import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloom.engine.pace import Load, Pace, StepCost


def learned(step_ms: float = 20.0, row_ms: float = 2.0, prompt_ms: float = 1.0) -> StepCost:
    cost = StepCost()
    for rows in (1, 2, 4, 8, 16, 32):
        cost.observe(rows, 0, step_ms + row_ms * rows)
    for tokens in (64, 128, 256):
        cost.observe(8, tokens, step_ms + 8 * row_ms + tokens * prompt_ms)
    return cost


def test_a_step_without_measurements_has_no_limit():
    assert StepCost().prompt_tokens_within(1.0, 4) == float("inf")
    assert StepCost().rows_ms(4) is None


def test_what_was_measured_is_what_is_expected():
    cost = learned()
    assert cost.rows_ms(1) == pytest.approx(22)
    assert cost.rows_ms(24) == pytest.approx(20 + 2 * 24)
    assert cost.rows_ms(64) == pytest.approx(168), "beyond what was seen, in proportion"
    assert cost.prompt_tokens_within(100, 8) == pytest.approx(64)


def test_a_pause_of_the_machine_does_not_count_as_cost():
    cost = learned()
    cost.observe(8, 0, 10_000)
    cost.observe(8, 100, 10_000)
    assert cost.rows_ms(8) < 70
    assert cost.prompt_token_ms < 2


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 256), st.floats(0.1, 1e5)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_estimates_stay_within_what_was_measured(steps: list[tuple[int, int, float]]):
    cost = StepCost()
    for rows, tokens, ms in steps:
        cost.observe(rows, tokens, ms)
        assert cost.prompt_token_ms >= 0
        assert cost.prompt_tokens_within(100.0, rows) >= 0
        estimate = cost.rows_ms(rows)
        assert estimate is None or 0 <= estimate < float("inf")


def test_one_owner_never_sits_out():
    assert Pace(learned()).resting({"a": Load(32, 0)}, 1) == frozenset()


def test_the_many_make_way_in_turns_for_the_one_that_falls_behind():
    cost = learned()
    pace, times = Pace(cost), 0.0
    loads = {"many": Load(31, 0), "one": Load(1, 0)}
    steps = []
    for _ in range(100):
        resting = pace.resting(loads, 2)
        present = {owner: load for owner, load in loads.items() if owner not in resting}
        ms = 20 + 2.0 * sum(load.rows for load in present.values())
        pace.observe(present, resting, 2, ms)
        steps.append(len(resting))
        times += ms
        assert "one" not in resting
    assert times / 100 <= 1.9 * 22
    assert 20 < steps.count(0) < 60


def test_nobody_makes_way_where_steps_take_the_same_time_whatever_is_in_them():
    pace = Pace(learned(row_ms=0.01))
    loads = {"many": Load(31, 0), "one": Load(1, 0)}
    for _ in range(50):
        assert pace.resting(loads, 2) == frozenset()
        pace.observe(loads, frozenset(), 2, 20.3)


def test_a_stall_is_not_made_up_for_at_the_cost_of_others():
    pace = Pace(learned())
    loads = {"many": Load(31, 0), "one": Load(1, 0)}
    pace.observe(loads, frozenset(), 2, 60_000)
    steps = 0
    while pace.resting(loads, 2):
        pace.observe({"one": Load(1, 0)}, frozenset({"many"}), 2, 22)
        steps += 1
    assert 0 < steps < 30


def test_an_unknown_time_alone_is_measured_by_a_step_alone():
    cost = StepCost()
    cost.observe(32, 0, 84)
    pace = Pace(cost)
    loads = {"many": Load(31, 0), "one": Load(1, 0)}
    assert pace.resting(loads, 2) == {"many"}
    cost.observe(1, 0, 22)
    assert pace.resting(loads, 2) == frozenset()
