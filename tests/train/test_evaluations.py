import pytest

from tuneloom.train.evaluations import Evaluation, Evaluations


def after(losses: list[float], patience: int | None = 2, min_delta: float = 0.0) -> Evaluations:
    evaluations = Evaluations(patience, min_delta)
    for step, loss in enumerate(losses, 1):
        evaluations.add(Evaluation(step, loss, 0.5))
    return evaluations


@pytest.mark.parametrize(
    ("losses", "min_delta", "is_over"),
    [
        ([3, 2, 1], 0, False),
        ([3, 3.1, 2.9, 3.0], 0, False),
        ([3, 3.1, 3.2], 0, True),
        ([3, 3, 3], 0, True),
        ([3, 2.95, 2.9], 0.1, True),
        ([3, 2.5, 2.45], 0.1, False),
        ([3, float("nan"), float("nan")], 0, True),
    ],
)
def test_a_run_is_over_after_evaluations_in_a_row_without_gain(
    losses: list[float], min_delta: float, is_over: bool
) -> None:
    assert after(losses, min_delta=min_delta).is_over == is_over


def test_without_patience_it_is_never_over() -> None:
    assert not after([1, 2, 3, 4, 5], patience=None).is_over


def test_the_best_is_the_first_of_the_least_losses() -> None:
    best = after([3, 2, float("nan"), 2]).best
    assert best is not None and best.step == 2
    assert after([]).best is None


def test_a_restored_history_goes_on_as_it_was() -> None:
    before = after([3, 3.5])
    again = Evaluations(2, 0.0)
    again.restore(before.facts())
    assert not again.is_over
    again.add(Evaluation(3, 3.2, 0.5))
    assert again.is_over
