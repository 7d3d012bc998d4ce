"""How fast a run is: tokens per second and the time that is left, from its last steps. Pure; times are given."""

from collections import deque
from dataclasses import dataclass

# Steps over which the speed is averaged.
RECENT = 20


@dataclass(frozen=True)
class _Mark:
    at: float
    step: int
    tokens: int


class Pace:
    """Told of each step's end, in seconds and tokens since the run began."""

    def __init__(self) -> None:
        self._marks: deque[_Mark] = deque(maxlen=RECENT + 1)

    def start(self, at: float, step: int, tokens: int) -> None:
        """Where this process begins."""
        self._marks.clear()
        self.step(at, step, tokens)

    def step(self, at: float, step: int, tokens: int) -> None:
        self._marks.append(_Mark(at, step, tokens))

    @property
    def tokens_per_second(self) -> float:
        first, last = self._marks[0], self._marks[-1]
        return (last.tokens - first.tokens) / max(last.at - first.at, 1e-9)

    def finish_at(self, total_steps: int) -> float:
        """When the last step will end, if the rest is as fast."""
        first, last = self._marks[0], self._marks[-1]
        seconds = (last.at - first.at) / max(1, last.step - first.step)
        return last.at + seconds * (total_steps - last.step)
