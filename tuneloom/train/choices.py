"""What each setting of a run becomes, and why: what was asked for, else a preset, else by the data and the base."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from tuneloom.bases import Base
from tuneloom.domain import JobSpec, TrainOptions
from tuneloom.errors import InvalidRequest
from tuneloom.train.data import PreferenceTokens, Tokens, length_limit
from tuneloom.train.start import Start

DEFAULT_RANK = 16
DEFAULT_BETA = 0.1
# Tokens of one forward pass, about: more at once gain nothing on a CPU, and cost memory everywhere.
CPU_PASS_TOKENS = 512
GPU_PASS_TOKENS = 4096
SMALL_BASE_BYTES = 1 << 30

Precision = Literal["bf16", "fp16", "fp32"]
Quantization = Literal["none", "nf4", "int8"]


@dataclass(frozen=True)
class Preset:
    """What a preset gives where nothing else is said."""

    n_epochs: int
    learning_rate: float
    rank: int
    alpha: float


PRESETS = {"quick": Preset(3, 5e-5, 8, 16.0), "balanced": Preset(5, 2e-5, 16, 32.0)}


class Choices:
    """Chooses one setting a method, which returns its value and the reason. Of the tokens it reads the lengths."""

    def __init__(
        self,
        spec: JobSpec,
        tokens: Tokens | PreferenceTokens,
        base: Base,
        *,
        has_bf16: bool,
        use_gpu: bool,
        start: Start | None,
    ) -> None:
        self.spec = spec
        self.options = spec.options
        self.num_rows = tokens.num_rows
        self.longest_row = int(tokens.lengths.max())
        self._asked = spec.hyperparameters
        self._base = base
        self._has_bf16 = has_bf16
        self._pass_tokens = GPU_PASS_TOKENS if use_gpu else CPU_PASS_TOKENS
        self._start = start
        self._preset = PRESETS.get(spec.options.preset or "")

    def plain(self, name: str) -> tuple[Any, str]:
        """An option that nothing has to be worked out for."""
        value = getattr(self.options, name)
        return value, "the default" if value == TrainOptions.model_fields[name].default else "as asked"

    @property
    def has_validation(self) -> bool:
        return self.spec.validation_file is not None or self.options.validation_share is not None

    @property
    def multiplier(self) -> float:
        asked = self._asked.learning_rate_multiplier
        return 1.0 if asked == "auto" else asked

    def _by_preset(self) -> str:
        return f"preset {self.options.preset}"

    def epochs(self) -> tuple[int, str]:
        """Three, more for few rows (to see 100 in all, at most 25 times), fewer for many (25,000 in all)."""
        rows = self.num_rows
        if self._asked.n_epochs != "auto":
            return self._asked.n_epochs, "as asked"
        if self._preset:
            return self._preset.n_epochs, self._by_preset()
        if rows * 3 < 100:
            return min(25, math.ceil(100 / rows)), f"{rows} rows are few"
        if rows * 3 > 25_000:
            return max(1, 25_000 // rows), f"{rows:,} rows are many"
        return 3, "the default"

    def batch_size(self) -> tuple[int, str]:
        """A multiple of the forward passes that are asked for, within the rows that there are."""
        rows, asked, passes = self.num_rows, self._asked.batch_size, self.options.accumulation_steps or 1
        if rows < passes:
            raise InvalidRequest(
                f"`accumulation_steps` is {passes}, and there are {rows} rows: a forward pass takes one at least.",
                param="tuneloom.accumulation_steps",
            )
        if asked != "auto":
            size = min(asked, rows // passes * passes)
            return size, "as asked" if size == asked else f"{asked} as asked, within the {rows} rows"
        size = min(rows, max(4, min(64, round(0.002 * rows))))
        reason = f"0.2 % of {rows:,} rows, from 4 to 64"
        if size % passes:
            size = min(rows // passes, math.ceil(size / passes)) * passes
            reason += f", a multiple of {passes} forward passes"
        return size, reason

    def accumulation(self, batch: int) -> tuple[int, str]:
        """As asked, or the fewest passes whose rows fit into one at their longest."""
        asked = self.options.accumulation_steps
        if asked is not None:
            return asked, f"as asked: {batch // asked} of the {batch} rows of a step at a time"
        pair = 2 if self.spec.method == "dpo" else 1
        room = max(1, round(self._pass_tokens / (pair * self.longest_row)))
        passes = math.ceil(batch / room)
        rows = math.ceil(batch / passes)
        return passes, f"{rows} of the {batch} rows of a step at a time; the longest has {self.longest_row:,} tokens"

    def learning_rate(self) -> tuple[float, str]:
        asked = self.options.learning_rate
        multiplier = self.multiplier
        times = "" if multiplier == 1 else f", times {multiplier:g}"
        if asked is not None:
            return asked * multiplier, f"as asked{times}"
        if self._preset:
            return self._preset.learning_rate * multiplier, self._by_preset() + times
        is_small = self._base.size_bytes < SMALL_BASE_BYTES
        start = 5e-4 if is_small else 2e-4
        reason = f"{start:g} for a base {'under 1 GiB' if is_small else 'of 1 GiB or more'}"
        if self.spec.method == "dpo":
            start, reason = start / 10, f"{reason}, a tenth of it for preferences"
        return start * multiplier, reason + times

    def warmup(self, steps: int) -> tuple[int, str]:
        asked = self.options.warmup_steps
        if asked is None:
            # The first step of a warm-up learns nothing, so a short run has none.
            return min(100, int(0.03 * steps)), f"3 % of {steps:,} steps, at most 100"
        if asked and asked >= steps:
            raise InvalidRequest(
                f"`warmup_steps` is {asked:,}, and the run has {steps:,} steps. Use fewer.",
                param="tuneloom.warmup_steps",
            )
        return asked, "as asked"

    def beta(self) -> tuple[float, str]:
        if self._asked.beta in (None, "auto"):
            return DEFAULT_BETA, "the default"
        return self._asked.beta, "as asked"  # type: ignore[return-value]

    def rank(self) -> tuple[int, str]:
        if self._start:
            return self._of_start("rank", self.options.rank, self._start.rank)
        if self.options.rank is not None:
            return self.options.rank, "as asked"
        return (self._preset.rank, self._by_preset()) if self._preset else (DEFAULT_RANK, "the default")

    def alpha(self, rank: int) -> tuple[float, str]:
        if self._start:
            return self._of_start("alpha", self.options.alpha, self._start.alpha)
        if self.options.alpha is not None:
            return self.options.alpha, "as asked"
        return (self._preset.alpha, self._by_preset()) if self._preset else (2.0 * rank, "twice the rank")

    def targets(self) -> tuple[tuple[str, ...] | None, str]:
        """None: all linear layers."""
        asked = self.options.target_modules
        if self._start:
            return self._of_start("target_modules", tuple(sorted(asked)) if asked else None, self._start.target_modules)
        return asked, "as asked" if asked else "the default"

    def rslora(self) -> tuple[bool, str]:
        if self._start:
            return self._of_start("rslora", self.options.rslora or None, self._start.rslora)
        return self.plain("rslora")

    def _of_start(self, name: str, asked: Any, value: Any) -> tuple[Any, str]:
        """What the adapter to start from has; it cannot be another."""
        if asked is not None and asked != value:
            raise InvalidRequest(
                f"`{name}` is {shown(asked)}, and the adapter of `warm_start` has {shown(value)}. "
                "Leave it out: it comes from there.",
                param=f"tuneloom.{name}",
            )
        return value, f"that of {self.options.warm_start}"

    def max_length(self) -> tuple[int, str]:
        limit, asked = length_limit(self.spec, self._base), self.options.max_length
        return limit, "as asked" if asked == limit else "the base's context"

    def packing(self) -> tuple[bool, str]:
        if self.options.packing != "auto":
            return self.options.packing, "as asked"
        return True, "no padding is computed, and attention is faster"

    def precision(self) -> tuple[Precision, str]:
        if self.options.precision != "auto":
            return self.options.precision, "as asked"
        if self._has_bf16:
            return "bf16", "this machine multiplies it faster"
        return "fp32", "this machine has no fast bf16"

    def quantization(self) -> tuple[Quantization, str]:
        if self.options.quantization != "auto":
            return self.options.quantization, "as asked"
        return "none", "the default"


def shown(value: Any) -> str:
    """A value for people."""
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(value) if isinstance(value, tuple | list) else str(value)
