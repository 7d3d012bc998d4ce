"""The validation losses of a run, which of them is best, and whether to go on. No model; plain values in and out."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """`loss` is the mean per learned token of the validation rows."""

    step: int
    loss: float
    accuracy: float


class Evaluations:
    """`patience` evaluations in a row without a loss lower by more than `min_delta` end the run; None: nothing does."""

    def __init__(self, patience: int | None, min_delta: float) -> None:
        self.patience = patience
        self.min_delta = min_delta
        self.history: list[Evaluation] = []

    def add(self, evaluation: Evaluation) -> bool:
        """Whether it is the best until now."""
        self.history.append(evaluation)
        return self.best == evaluation

    @property
    def best(self) -> Evaluation | None:
        """The one with the least loss; of equal ones the first. A loss that is no number is never best."""
        return min((each for each in self.history if each.loss == each.loss), key=lambda each: each.loss, default=None)

    @property
    def is_over(self) -> bool:
        return self.patience is not None and self.num_without_gain >= self.patience

    @property
    def num_without_gain(self) -> int:
        """Evaluations since the last whose loss was lower by more than `min_delta` than all before it."""
        least, count = float("inf"), 0
        for each in self.history:
            count = 0 if each.loss < least - self.min_delta else count + 1
            least = min(least, each.loss) if each.loss == each.loss else least
        return count

    def facts(self) -> list[dict[str, Any]]:
        return [asdict(each) for each in self.history]

    def restore(self, facts: list[dict[str, Any]]) -> None:
        self.history = [Evaluation(**each) for each in facts]
