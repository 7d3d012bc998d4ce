"""What a run will do, decided before its first step: every `auto` resolved from the data and the base, with reasons."""

import math
from dataclasses import dataclass
from typing import Literal

from tuneloom.bases import Base
from tuneloom.domain import Hyperparameters, JobSpec
from tuneloom.train.data import Tokens

DEFAULT_RANK = 16
# Tokens of one forward pass. More rows at once gain little on a CPU and cost memory everywhere.
MICRO_BATCH_TOKENS = 4096
SMALL_BASE_BYTES = 1 << 30

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Plan:
    """All settings of a run. `batch_size` rows make a step, forwarded `micro_size` rows at a time."""

    hyperparameters: Hyperparameters
    n_epochs: int
    batch_size: int
    micro_size: int
    learning_rate: float
    warmup_steps: int
    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...] | None
    precision: Precision
    steps_per_epoch: int
    seed: int
    reasons: tuple[str, ...]

    @property
    def total_steps(self) -> int:
        return self.n_epochs * self.steps_per_epoch


def make_plan(spec: JobSpec, tokens: Tokens, base: Base, *, has_bf16: bool) -> Plan:
    """Resolve a job's settings. `has_bf16`: the device multiplies bf16 matrices faster than fp32."""
    asked, options = spec.hyperparameters, spec.options
    epochs, why_epochs = _epochs(asked.n_epochs, tokens.num_rows)
    batch, why_batch = _batch_size(asked.batch_size, tokens.num_rows)
    multiplier = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
    rate, why_rate = _learning_rate(options.learning_rate, multiplier, base)
    precision, why_precision = _precision(options.precision, has_bf16)
    rank = options.rank or DEFAULT_RANK
    steps = math.ceil(tokens.num_rows / batch)
    return Plan(
        hyperparameters=Hyperparameters(n_epochs=epochs, batch_size=batch, learning_rate_multiplier=multiplier),
        n_epochs=epochs,
        batch_size=batch,
        micro_size=_micro_size(batch, int(tokens.lengths.max())),
        learning_rate=rate,
        # The first of them learns nothing, so a short run has none.
        warmup_steps=min(100, int(0.03 * epochs * steps)),
        rank=rank,
        alpha=options.alpha or 2.0 * rank,
        dropout=options.dropout,
        target_modules=options.target_modules,
        precision=precision,
        steps_per_epoch=steps,
        seed=spec.seed,
        reasons=(why_epochs, why_batch, why_rate, why_precision),
    )


def _epochs(asked: int | Literal["auto"], rows: int) -> tuple[int, str]:
    """Three, more for few rows (to see 100 in all, at most 25 times), fewer for many (25,000 in all)."""
    if asked != "auto":
        return asked, f"n_epochs {asked}: as asked"
    if rows * 3 < 100:
        return min(25, math.ceil(100 / rows)), f"n_epochs {min(25, math.ceil(100 / rows))}: {rows} rows are few"
    if rows * 3 > 25_000:
        return max(1, 25_000 // rows), f"n_epochs {max(1, 25_000 // rows)}: {rows:,} rows are many"
    return 3, "n_epochs 3: the default"


def _batch_size(asked: int | Literal["auto"], rows: int) -> tuple[int, str]:
    if asked != "auto":
        return min(asked, rows), f"batch_size {min(asked, rows)}: as asked, at most the number of rows"
    size = min(rows, max(4, min(64, round(0.002 * rows))))
    return size, f"batch_size {size}: 0.2 % of {rows:,} rows, from 4 to 64"


def _learning_rate(asked: float | None, multiplier: float, base: Base) -> tuple[float, str]:
    if asked is not None:
        return asked * multiplier, f"learning_rate {asked * multiplier:g}: as asked, times {multiplier:g}"
    start = 5e-4 if base.size_bytes < SMALL_BASE_BYTES else 2e-4
    size = "a base under 1 GiB" if base.size_bytes < SMALL_BASE_BYTES else "a base of 1 GiB or more"
    return start * multiplier, f"learning_rate {start * multiplier:g}: {start:g} for {size}, times {multiplier:g}"


def _precision(asked: Literal["auto", "bf16", "fp32"], has_bf16: bool) -> tuple[Precision, str]:
    if asked != "auto":
        return asked, f"precision {asked}: as asked"
    if has_bf16:
        return "bf16", "precision bf16: this machine multiplies it faster"
    return "fp32", "precision fp32: this machine has no fast bf16"


def _micro_size(batch: int, longest: int) -> int:
    """The largest divisor of `batch` whose rows fit into one forward pass at their longest."""
    room = max(1, MICRO_BATCH_TOKENS // longest)
    return max(size for size in range(1, batch + 1) if batch % size == 0 and size <= room)
