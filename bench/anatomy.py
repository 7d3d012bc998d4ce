"""Where the time of a step goes: products of the base, adapters, attention, small loops, and the rest, which is Python.

Not a script: `work` uses it. What the engine calls is wrapped while it watches, so it takes a little longer.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from tuneloom.engine.attention import StepAttention
from tuneloom.engine.kernels import Kernels
from tuneloom.engine.linear import Product
from tuneloom.engine.runner import Runner
from tuneloom.engine.stacks import NativeStacks, TorchStacks
from tuneloom.engine.work import Work

PRODUCTS, ADAPTERS, ATTENTION, LOOPS = "products of the base", "adapters", "attention", "norms, angles, gates"
REST = "the rest: Python and small operators"
_PARTS: tuple[tuple[type, str, str], ...] = (
    (Product, "__call__", PRODUCTS),
    (NativeStacks, "add", ADAPTERS),
    (TorchStacks, "add", ADAPTERS),
    (StepAttention, "attend", ATTENTION),
    (Kernels, "rms_norm", LOOPS),
    (Kernels, "rotate", LOOPS),
    (Kernels, "silu_mul", LOOPS),
)


@dataclass(frozen=True)
class Step:
    """Seconds of one forward pass in all and of its parts; `rows` decode, `prompt` tokens are of prompts."""

    rows: int
    prompt: int
    total_s: float
    parts_s: dict[str, float]


@dataclass
class Anatomy:
    """The steps that were watched, by the clock `now`, which counts seconds of the step thread."""

    now: Callable[[], float]
    steps: list[Step] = field(default_factory=list)
    _parts_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, name, part in _PARTS:
                stack.enter_context(mock.patch.object(kind, name, self._timed(getattr(kind, name), part)))
            stack.enter_context(mock.patch.object(Runner, "forward", self._forward(Runner.forward)))
            yield

    def decode(self) -> dict[str, float]:
        """Milliseconds of each part in the median step of those that only decode, with the most rows."""
        decoding = [step for step in self.steps if not step.prompt]
        most = max(step.rows for step in decoding)
        chosen = sorted((step for step in decoding if step.rows == most), key=lambda step: step.total_s)
        # Part by part, so that what disturbed one step does not show; the rest is what remains of the median.
        total = statistics.median(step.total_s for step in chosen)
        names = [name for name in dict.fromkeys(part for _, _, part in _PARTS) if name in chosen[0].parts_s]
        parts = {name: statistics.median(step.parts_s[name] for step in chosen) for name in names}
        return {name: 1000 * s for name, s in [*parts.items(), (REST, max(0.0, total - sum(parts.values())))]}

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **more: Any) -> Any:
            started = self.now()
            try:
                return function(*arguments, **more)
            finally:
                self._parts_s[part] += self.now() - started

        return timed

    def _forward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(runner: Runner, work: Work) -> Any:
            self._parts_s.clear()
            started = self.now()
            result = function(runner, work)
            total_s = self.now() - started
            self.steps.append(Step(len(work.decoding), work.num_prefill, total_s, dict(self._parts_s)))
            return result

        return forward
