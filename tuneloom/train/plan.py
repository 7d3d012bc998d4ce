"""What a run will do, decided before its first step: every `auto` resolved from the data and the base, with reasons.

No torch: whoever estimates a run makes the same plan as the trainer.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from tuneloom.bases import Base
from tuneloom.domain import Hyperparameters, JobSpec, Setting, check_settings_agree
from tuneloom.train.choices import Choices, Precision, Quantization, shown
from tuneloom.train.data import PreferenceTokens, Tokens
from tuneloom.train.start import Start


@dataclass(frozen=True)
class Plan:
    """All settings of a run. `batch_size` rows make a step, forwarded `micro_size` rows at a time; `longest_row` is in
    tokens.

    `evaluate_every_steps` None: at the end of each epoch. `early_stopping_patience` None: never.
    `checkpoint_every_s` None: as the installation has it. `start` None: from a fresh adapter. `settings` tells all of
    it to people.
    """

    method: Literal["supervised", "dpo"]
    hyperparameters: Hyperparameters
    n_epochs: int
    batch_size: int
    micro_size: int
    longest_row: int
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
        """Forward passes that make a step of the longest rows."""
        return math.ceil(self.batch_size / self.micro_size)


def make_plan(
    spec: JobSpec,
    tokens: Tokens | PreferenceTokens,
    base: Base,
    *,
    has_bf16: bool,
    use_gpu: bool = False,
    start: Start | None = None,
) -> Plan:
    """Resolve a job's settings. Of `tokens` only the lengths of the rows are read.

    `has_bf16`: the device multiplies bf16 matrices faster than fp32. `start` is the adapter of `warm_start`. Whether
    the run fits a machine is the question of `fit_plan`.

    Raises:
        InvalidRequest: settings contradict each other, the data or the adapter to start from.
    """
    check_settings_agree(spec)
    options, notes = spec.options, _Notes()
    choices = Choices(spec, tokens, base, has_bf16=has_bf16, use_gpu=use_gpu, start=start)
    epochs = notes.add("n_epochs", choices.epochs())
    batch = notes.add("batch_size", choices.batch_size())
    passes = notes.add("accumulation_steps", choices.accumulation(batch))
    steps = math.ceil(choices.num_rows / batch)
    beta = notes.add("beta", choices.beta()) if spec.method == "dpo" else None
    rank = notes.add("rank", choices.rank())
    minutes = options.checkpoint_every_minutes
    plan = Plan(
        method=spec.method,
        hyperparameters=Hyperparameters(
            n_epochs=epochs, batch_size=batch, learning_rate_multiplier=choices.multiplier, beta=beta
        ),
        n_epochs=epochs,
        batch_size=batch,
        micro_size=math.ceil(batch / passes),
        longest_row=choices.longest_row,
        steps_per_epoch=steps,
        learning_rate=notes.add("learning_rate", choices.learning_rate()),
        scheduler=notes.add("scheduler", choices.plain("scheduler")),
        warmup_steps=notes.add("warmup_steps", choices.warmup(epochs * steps)),
        weight_decay=notes.add("weight_decay", choices.plain("weight_decay")),
        max_grad_norm=notes.add("max_grad_norm", choices.plain("max_grad_norm")),
        beta=beta,
        rank=rank,
        alpha=notes.add("alpha", choices.alpha(rank)),
        dropout=notes.add("dropout", choices.plain("dropout")),
        target_modules=notes.add("target_modules", choices.targets(), none="all linear layers"),
        rslora=notes.add("rslora", choices.rslora()),
        start=start,
        max_length=notes.add("max_length", choices.max_length()),
        packing=notes.add("packing", choices.packing()),
        precision=notes.add("precision", choices.precision()),
        quantization=notes.add("quantization", choices.quantization()),
        gradient_checkpointing=notes.add("gradient_checkpointing", (False, "the default")),
        evaluate_every_steps=options.evaluate_every_steps,
        early_stopping_patience=options.early_stopping_patience,
        early_stopping_min_delta=options.early_stopping_min_delta,
        checkpoint_every_steps=options.checkpoint_every_steps,
        checkpoint_every_s=None if minutes is None else minutes * 60,
        seed=notes.add("seed", (spec.seed, "of the job")),
        settings=(),
    )
    notes.add("loss_on", choices.plain("loss_on"))
    if choices.has_validation:
        notes.add("evaluate_every_steps", choices.plain("evaluate_every_steps"), none="each epoch")
        if options.early_stopping_patience is not None:
            notes.add("early_stopping_patience", choices.plain("early_stopping_patience"))
            notes.add("early_stopping_min_delta", choices.plain("early_stopping_min_delta"))
    return replace(plan, settings=tuple(notes.settings))


class _Notes:
    """Collects the settings as they are chosen."""

    def __init__(self) -> None:
        self.settings: list[Setting] = []

    def add(self, name: str, chosen: tuple[Any, str], *, none: str | None = None) -> Any:
        """Note a value with its reason and return it; `none` is what people read for None."""
        value, reason = chosen
        self.settings.append(Setting(name=name, value=none if value is None else value, reason=reason))
        return value


def change(plan: Plan, name: str, value: Any, reason: str) -> Plan:
    """`plan` with another value of a field, told with the reason."""
    return tell(replace(plan, **{name: value}), name, value, reason)


def tell(plan: Plan, name: str, value: Any, reason: str) -> Plan:
    """`plan` whose settings tell another value of `name`."""
    setting = Setting(name=name, value=value, reason=reason)
    return replace(plan, settings=tuple(setting if old.name == name else old for old in plan.settings))


def settings_text(settings: tuple[Setting, ...]) -> str:
    """The settings in one sentence: those that were worked out, with why; what is only the default is left out."""
    told = [item for item in settings if item.reason != "the default" or item.name == "n_epochs"]
    return "; ".join(f"{item.name} {shown(item.value)}: {item.reason}" for item in told)
