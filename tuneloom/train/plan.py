"""What a run will do, decided before its first step: every `auto` resolved from the data and the base, with reasons.

No torch: whoever estimates a run makes the same plan as the trainer.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from tuneloom.bases import Base
from tuneloom.domain import Hyperparameters, JobSpec, Setting, check_settings_agree
from tuneloom.errors import InvalidRequest
from tuneloom.train.data import Tokens, length_limit
from tuneloom.train.start import Start

DEFAULT_RANK = 16
DEFAULT_BETA = 0.1
# Tokens of one forward pass. More rows at once gain little on a CPU and cost memory everywhere.
MICRO_BATCH_TOKENS = 4096
SMALL_BASE_BYTES = 1 << 30

Precision = Literal["bf16", "fp32"]
Quantization = Literal["none", "nf4", "int8"]


@dataclass(frozen=True)
class Preset:
    """What a preset gives where nothing else is said."""

    n_epochs: int
    learning_rate: float
    rank: int
    alpha: float


PRESETS = {"quick": Preset(3, 5e-5, 8, 16.0), "balanced": Preset(5, 2e-5, 16, 32.0)}


@dataclass(frozen=True)
class Plan:
    """All settings of a run. `batch_size` rows make a step, forwarded `micro_size` rows at a time.

    `evaluate_every_steps` None: at the end of each epoch. `early_stopping_patience` None: never.
    `checkpoint_every_s` None: as the installation has it. `start` None: from a fresh adapter. `settings` tells all of
    it to people.
    """

    method: Literal["supervised", "dpo"]
    hyperparameters: Hyperparameters
    n_epochs: int
    batch_size: int
    micro_size: int
    steps_per_epoch: int
    learning_rate: float
    scheduler: Literal["linear", "cosine", "constant"]
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    beta: float | None
    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...] | None
    rslora: bool
    start: Start | None
    max_length: int
    packing: bool
    precision: Precision
    quantization: Quantization
    gradient_checkpointing: bool
    evaluate_every_steps: int | None
    early_stopping_patience: int | None
    early_stopping_min_delta: float
    checkpoint_every_steps: int | None
    checkpoint_every_s: float | None
    seed: int
    settings: tuple[Setting, ...]

    @property
    def total_steps(self) -> int:
        return self.n_epochs * self.steps_per_epoch

    @property
    def accumulation_steps(self) -> int:
        """Forward passes that make a step."""
        return self.batch_size // self.micro_size


def make_plan(spec: JobSpec, tokens: Tokens, base: Base, *, has_bf16: bool, start: Start | None = None) -> Plan:
    """Resolve a job's settings. Of `tokens` only the lengths of the rows are read.

    `has_bf16`: the device multiplies bf16 matrices faster than fp32. `start` is the adapter of `warm_start`.

    Raises:
        InvalidRequest: settings contradict each other, the data or the adapter to start from.
    """
    check_settings_agree(spec)
    return _Resolver(spec, tokens, base, has_bf16, start).plan()


class _Resolver:
    """Resolves one setting a method, and notes each with its reason in the order of `plan`."""

    def __init__(self, spec: JobSpec, tokens: Tokens, base: Base, has_bf16: bool, start: Start | None) -> None:
        self._spec = spec
        self._asked = spec.hyperparameters
        self._options = spec.options
        self._lengths = tokens.lengths
        self._rows = tokens.num_rows
        self._base = base
        self._has_bf16 = has_bf16
        self._start = start
        self._preset = PRESETS.get(spec.options.preset or "")
        self._settings: list[Setting] = []

    def plan(self) -> Plan:
        options = self._options
        epochs = self._note("n_epochs", *self._epochs())
        batch = self._note("batch_size", *self._batch_size())
        steps = math.ceil(self._rows / batch)
        accumulation = self._note("accumulation_steps", *self._accumulation(batch))
        multiplier = 1.0 if self._asked.learning_rate_multiplier == "auto" else self._asked.learning_rate_multiplier
        rate = self._note("learning_rate", *self._learning_rate(multiplier))
        scheduler = self._plain("scheduler")
        warmup = self._note("warmup_steps", *self._warmup(epochs * steps))
        decay, norm = self._plain("weight_decay"), self._plain("max_grad_norm")
        beta = self._note("beta", *self._beta()) if self._spec.method == "dpo" else None
        rank = self._note("rank", *self._rank())
        alpha = self._note("alpha", *self._alpha(rank))
        dropout = self._plain("dropout")
        targets = self._targets()
        rslora = self._note("rslora", *self._rslora())
        length = self._note("max_length", *self._max_length())
        packing = self._note("packing", *self._packing())
        precision = self._note("precision", *self._precision())
        quantization = self._note("quantization", *self._quantization())
        self._plain("loss_on")
        evaluate = self._evaluation()
        self._note("seed", self._spec.seed, "of the job")
        minutes = options.checkpoint_every_minutes
        return Plan(
            method=self._spec.method,
            hyperparameters=Hyperparameters(
                n_epochs=epochs, batch_size=batch, learning_rate_multiplier=multiplier, beta=beta
            ),
            n_epochs=epochs,
            batch_size=batch,
            micro_size=batch // accumulation,
            steps_per_epoch=steps,
            learning_rate=rate,
            scheduler=scheduler,
            warmup_steps=warmup,
            weight_decay=decay,
            max_grad_norm=norm,
            beta=beta,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            target_modules=targets,
            rslora=rslora,
            start=self._start,
            max_length=length,
            packing=packing,
            precision=precision,
            quantization=quantization,
            gradient_checkpointing=False,
            evaluate_every_steps=evaluate,
            early_stopping_patience=options.early_stopping_patience,
            early_stopping_min_delta=options.early_stopping_min_delta,
            checkpoint_every_steps=options.checkpoint_every_steps,
            checkpoint_every_s=None if minutes is None else minutes * 60,
            seed=self._spec.seed,
            settings=tuple(self._settings),
        )

    def _note(self, name: str, value: Any, reason: str) -> Any:
        self._settings.append(Setting(name=name, value=value, reason=reason))
        return value

    def _plain(self, name: str) -> Any:
        """Note an option that nothing has to be worked out for."""
        value = getattr(self._options, name)
        return self._note(name, value, "as asked" if name in self._options.model_fields_set else "the default")

    def _by_preset(self) -> str:
        return f"preset {self._options.preset}"

    def _epochs(self) -> tuple[int, str]:
        """Three, more for few rows (to see 100 in all, at most 25 times), fewer for many (25,000 in all)."""
        rows = self._rows
        if self._asked.n_epochs != "auto":
            return self._asked.n_epochs, "as asked"
        if self._preset:
            return self._preset.n_epochs, self._by_preset()
        if rows * 3 < 100:
            return min(25, math.ceil(100 / rows)), f"{rows} rows are few"
        if rows * 3 > 25_000:
            return max(1, 25_000 // rows), f"{rows:,} rows are many"
        return 3, "the default"

    def _batch_size(self) -> tuple[int, str]:
        """A multiple of the forward passes that are asked for, within the rows that there are."""
        rows, asked, passes = self._rows, self._asked.batch_size, self._options.accumulation_steps or 1
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

    def _accumulation(self, batch: int) -> tuple[int, str]:
        """As asked, or the fewest passes whose rows fit into one at their longest."""
        asked = self._options.accumulation_steps
        if asked is not None:
            return asked, f"as asked: {batch // asked} of the {batch} rows of a step at a time"
        longest = int(self._lengths.max())
        room = max(1, MICRO_BATCH_TOKENS // longest)
        micro = max(size for size in range(1, batch + 1) if batch % size == 0 and size <= room)
        return batch // micro, f"{micro} of the {batch} rows of a step at a time; the longest has {longest:,} tokens"

    def _learning_rate(self, multiplier: float) -> tuple[float, str]:
        asked = self._options.learning_rate
        times = "" if multiplier == 1 else f", times {multiplier:g}"
        if asked is not None:
            return asked * multiplier, f"as asked{times}"
        if self._preset:
            return self._preset.learning_rate * multiplier, self._by_preset() + times
        is_small = self._base.size_bytes < SMALL_BASE_BYTES
        start = 5e-4 if is_small else 2e-4
        reason = f"{start:g} for a base {'under 1 GiB' if is_small else 'of 1 GiB or more'}"
        if self._spec.method == "dpo":
            start, reason = start / 10, f"{reason}, a tenth of it for preferences"
        return start * multiplier, reason + times

    def _warmup(self, steps: int) -> tuple[int, str]:
        asked = self._options.warmup_steps
        if asked is None:
            # The first step of a warm-up learns nothing, so a short run has none.
            return min(100, int(0.03 * steps)), f"3 % of {steps:,} steps, at most 100"
        if asked and asked >= steps:
            raise InvalidRequest(
                f"`warmup_steps` is {asked:,}, and the run has {steps:,} steps. Use fewer.",
                param="tuneloom.warmup_steps",
            )
        return asked, "as asked"

    def _beta(self) -> tuple[float, str]:
        if self._asked.beta in (None, "auto"):
            return DEFAULT_BETA, "the default"
        return self._asked.beta, "as asked"  # type: ignore[return-value]

    def _rank(self) -> tuple[int, str]:
        if self._start:
            return self._of_start("rank", self._options.rank, self._start.rank)
        if self._options.rank is not None:
            return self._options.rank, "as asked"
        return (self._preset.rank, self._by_preset()) if self._preset else (DEFAULT_RANK, "the default")

    def _alpha(self, rank: int) -> tuple[float, str]:
        if self._start:
            return self._of_start("alpha", self._options.alpha, self._start.alpha)
        if self._options.alpha is not None:
            return self._options.alpha, "as asked"
        return (self._preset.alpha, self._by_preset()) if self._preset else (2.0 * rank, "twice the rank")

    def _targets(self) -> tuple[str, ...] | None:
        asked = self._options.target_modules
        if self._start:
            asked = tuple(sorted(asked)) if asked else None
            return self._note("target_modules", *self._of_start("target_modules", asked, self._start.target_modules))
        self._note("target_modules", asked or "all linear layers", "as asked" if asked else "the default")
        return asked

    def _rslora(self) -> tuple[bool, str]:
        is_asked = "rslora" in self._options.model_fields_set
        if self._start:
            asked = self._options.rslora if is_asked else None
            return self._of_start("rslora", asked, self._start.rslora)
        return self._options.rslora, "as asked" if is_asked else "the default"

    def _of_start(self, name: str, asked: Any, value: Any) -> tuple[Any, str]:
        """What the adapter to start from has; it cannot be another."""
        if asked is not None and asked != value:
            raise InvalidRequest(
                f"`{name}` is {_shown(asked)}, and the adapter of `warm_start` has {_shown(value)}. "
                "Leave it out: it comes from there.",
                param=f"tuneloom.{name}",
            )
        return value, f"that of {self._options.warm_start}"

    def _max_length(self) -> tuple[int, str]:
        limit, asked = length_limit(self._spec, self._base), self._options.max_length
        return limit, "as asked" if asked == limit else "the base's context"

    def _packing(self) -> tuple[bool, str]:
        if self._options.packing != "auto":
            return self._options.packing, "as asked"
        return False, "the default"

    def _precision(self) -> tuple[Precision, str]:
        if self._options.precision != "auto":
            return self._options.precision, "as asked"
        if self._has_bf16:
            return "bf16", "this machine multiplies it faster"
        return "fp32", "this machine has no fast bf16"

    def _quantization(self) -> tuple[Quantization, str]:
        if self._options.quantization != "auto":
            return self._options.quantization, "as asked"
        return "none", "the base fits as it is"

    def _evaluation(self) -> int | None:
        """Note when the run is validated and ended early; returns the steps between evaluations."""
        options, every = self._options, self._options.evaluate_every_steps
        if self._spec.validation_file is None and options.validation_share is None:
            return None
        self._note("evaluate_every_steps", every or "each epoch", "as asked" if every else "the default")
        if options.early_stopping_patience is not None:
            self._plain("early_stopping_patience")
            self._plain("early_stopping_min_delta")
        return every


def settings_text(settings: tuple[Setting, ...]) -> str:
    """The settings in one sentence: those that were worked out, with why; what is only the default is left out."""
    told = [item for item in settings if item.reason != "the default" or item.name == "n_epochs"]
    return "; ".join(f"{item.name} {_shown(item.value)}: {item.reason}" for item in told)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(value) if isinstance(value, tuple | list) else str(value)
