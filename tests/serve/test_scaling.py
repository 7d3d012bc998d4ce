"""How many replicas a load calls for."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.conftest import STATS
from tuneloom.serve.scaling import RUNNING, WAITING, WAITING_TOKENS, WaitingTokensPolicy, desired_replicas, load_of


def desired(
    current: int, *, waiting_tokens: float = 0, running: float = 0, waiting: float = 0, unsent: float = 0
) -> int:
    return desired_replicas(
        current,
        waiting_tokens=waiting_tokens,
        running=running,
        waiting=waiting,
        unsent=unsent,
        target_waiting_tokens=1000,
        max_sequences=32,
    )


@pytest.mark.parametrize(
    ("current", "load", "number"),
    [
        (1, {}, 0),
        (1, {"running": 0.1}, 1),
        (1, {"unsent": 0.2}, 1),
        (1, {"waiting": 1, "waiting_tokens": 40}, 1),
        (1, {"running": 32}, 1),
        (1, {"running": 32, "waiting": 9, "waiting_tokens": 1000}, 1),
        (1, {"running": 32, "waiting": 9, "waiting_tokens": 1001}, 2),
        (2, {"running": 64, "waiting": 80, "waiting_tokens": 7500}, 8),
        (4, {"running": 128}, 4),
        (4, {"running": 40}, 2),
        (4, {"running": 3}, 1),
    ],
)
def test_queues_add_replicas_and_what_runs_keeps_them(current: int, load: dict[str, float], number: int) -> None:
    assert desired(current, **load) == number


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.floats(0, 1e5), st.floats(0, 700))
def test_without_a_long_queue_there_are_never_more_and_a_settled_number_stays(
    current: int, waiting_tokens: float, running: float
) -> None:
    number = desired(current, waiting_tokens=waiting_tokens, running=running)
    assert number <= current or waiting_tokens > 1000 * current
    if number:
        assert desired(number, waiting_tokens=waiting_tokens, running=running) == number


def context(current: int, target: int, unsent: float = 0.0, **metrics: dict[str, float]) -> Any:
    return SimpleNamespace(
        current_num_replicas=current,
        target_num_replicas=target,
        total_queued_requests=unsent,
        aggregated_metrics=metrics,
    )


def test_the_policy_sums_what_replicas_report() -> None:
    policy = WaitingTokensPolicy(1000, 32)
    metrics = {WAITING_TOKENS: {"a": 900.0, "b": 1500.0}, RUNNING: {"a": 32.0, "b": 32.0}, WAITING: {"a": 3.0}}
    assert policy(context(2, 2, **metrics)) == (3, {})
    assert policy(context(2, 2)) == (0, {})
    assert policy(context(1, 1, unsent=0.5)) == (1, {})


def test_while_the_first_replica_starts_the_policy_leaves_it_alone() -> None:
    assert WaitingTokensPolicy(1000, 32)(context(0, 1)) == (1, {})


def test_a_replica_reports_numbers_by_the_names_that_the_policy_reads() -> None:
    assert set(load_of(STATS)) == {WAITING_TOKENS, RUNNING, WAITING}
