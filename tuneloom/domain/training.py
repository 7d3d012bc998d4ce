"""What is asked of a training run and what it tells of itself: settings, estimate, usage, fidelity, error."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WrapValidator, field_validator
from pydantic_core import PydanticCustomError

from tuneloom.domain.values import AdapterRef
from tuneloom.errors import InvalidRequest


def _auto_or_bool(value: Any, read: Any) -> Any:
    """One error for both, which names the field alone."""
    try:
        return read(value)
    except ValueError as error:
        raise PydanticCustomError("choice", "Input should be 'auto', true or false") from error


def _all_or_named(value: Any, read: Any) -> Any:
    """None stands for all linear layers, and so do the word of other settings and that of PEFT."""
    try:
        named = read(tuple(value) if isinstance(value, list) else value)
    except ValueError as error:
        raise PydanticCustomError("choice", "Input should be a list of names, 'auto' or 'all-linear'") from error
    return None if isinstance(named, str) else named


class Hyperparameters(BaseModel):
    """OpenAI's; `auto` until resolved from the data and the base before the run starts. `beta` is that of DPO."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    n_epochs: int | Literal["auto"] = "auto"
    batch_size: int | Literal["auto"] = "auto"
    learning_rate_multiplier: float | Literal["auto"] = "auto"
    beta: float | Literal["auto"] | None = None


class TrainOptions(BaseModel):
    """Our own settings, the request object `tuneloom`. None and `auto` mean: resolved when the job starts.

    A `preset` gives defaults to what is not set here or in the hyperparameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    preset: Literal["quick", "balanced"] | None = None
    rank: int | None = Field(None, ge=1, le=128)
    alpha: float | None = Field(None, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Annotated[tuple[str, ...] | Literal["auto", "all-linear"] | None, WrapValidator(_all_or_named)] = (
        Field(None, description="linear layers that get an adapter; None: all but the head")
    )
    modules_to_save: tuple[str, ...] | None = Field(
        None, description="layers to train whole beside the adapter: none, as no engine serves them"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    learning_rate: float | None = Field(None, gt=0, le=1)
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int | None = Field(None, ge=0, description="None: 3 % of the steps, at most 100")
    weight_decay: float = Field(0.0, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)
    accumulation_steps: int | None = Field(None, ge=1, le=256, description="forward passes that make a step")
    max_length: int | None = Field(None, ge=8)
    long_rows: Literal["refuse", "cut"] = Field("refuse", description="rows above `max_length`; cut: at their end")
    packing: Annotated[Literal["auto"] | bool, WrapValidator(_auto_or_bool)] = Field(
        "auto", description="rows end to end without padding, each on its own"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    quantization: Literal["auto", "none", "nf4", "int8"] = Field(
        "auto", description="the base's frozen weights in 4 or 8 bits; auto: nf4 where the base does not fit otherwise"
    )
    loss_on: Literal["answers", "all"] = "answers"
    evaluate_every_steps: int | None = Field(None, ge=1, description="None: at the end of each epoch")
    early_stopping_patience: int | None = Field(
        None, ge=1, le=100, description="evaluations in a row without a better validation loss; None: never"
    )
    early_stopping_min_delta: float = Field(0.0, ge=0)
    validation_share: float | None = Field(
        None, gt=0, le=0.5, description="part of the training rows held out for validation"
    )
    checkpoint_every_steps: int | None = Field(None, ge=1)
    checkpoint_every_minutes: float | None = Field(None, gt=0)
    warm_start: str | None = Field(
        None, min_length=1, description="name of a Version or checkpoint whose adapter is trained on"
    )

    @field_validator(
        "rank", "alpha", "learning_rate", "warmup_steps", "accumulation_steps", "max_length", mode="before"
    )
    @classmethod
    def _auto_is_null(cls, value: Any) -> Any:
        """What is resolved may be asked for as `auto`, as with OpenAI's settings."""
        return None if value == "auto" else value


class WandbIntegration(BaseModel):
    """Where the metrics of a job go besides its events."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    project: str
    name: str | None = None
    entity: str | None = None
    tags: tuple[str, ...] = ()


class JobSpec(BaseModel):
    """What was asked of a job. Frozen: a rerun of the job trains exactly this.

    `warm_start` is the adapter that `options.warm_start` named when the job was created. `micro_size` is set where a
    run is repeated, to the rows of a forward pass that it had.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int
    method: Literal["supervised", "dpo"] = "supervised"
    hyperparameters: Hyperparameters = Hyperparameters()
    options: TrainOptions = TrainOptions()
    warm_start: AdapterRef | None = None
    micro_size: int | None = None
    wandb: tuple[WandbIntegration, ...] = ()
    metadata: dict[str, str] | None = None


def check_settings_agree(spec: JobSpec) -> None:
    """Refuse settings of which one contradicts another, or has no effect without it.

    Raises:
        InvalidRequest: the message names both.
    """
    options, batch = spec.options, spec.hyperparameters.batch_size
    passes = options.accumulation_steps
    if passes and batch != "auto" and batch % passes:
        divisors = ", ".join(str(number) for number in range(1, batch + 1) if batch % number == 0)
        _refuse("accumulation_steps", f"{passes} does not divide `batch_size` {batch}. Use one of {divisors}.")
    if options.target_modules == ():
        _refuse("target_modules", "is empty, which leaves nothing to learn. Leave it out for all linear layers.")
    if options.modules_to_save:
        _refuse(
            "modules_to_save",
            f"is {', '.join(options.modules_to_save)}, and adapters with whole layers cannot be served: many adapters "
            "share one copy of the base, and only low-rank ones fit beside it. Leave it out; for more to learn, raise "
            "`tuneloom.rank` or name more layers in `tuneloom.target_modules`.",
        )
    if options.loss_on != "answers" and spec.method == "dpo":
        _refuse("loss_on", "does not go with the method `dpo`, which compares two answers. Leave it out.")
    if options.validation_share is not None and spec.validation_file is not None:
        _refuse("validation_share", "does not go with `validation_file`. Give one of them.")
    if spec.validation_file is None and options.validation_share is None:
        for name in ("early_stopping_patience", "evaluate_every_steps"):
            if getattr(options, name) is not None:
                _refuse(name, "needs rows to validate on. Give a `validation_file` or a `validation_share`.")
    if options.early_stopping_min_delta and options.early_stopping_patience is None:
        _refuse("early_stopping_min_delta", "has no effect without `early_stopping_patience`. Give both.")


def _refuse(name: str, reason: str) -> None:
    raise InvalidRequest(f"`tuneloom.{name}` {reason}", param=f"tuneloom.{name}")


class Setting(BaseModel):
    """One resolved setting of a run and why it has this value."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    value: Any
    reason: str


class Estimate(BaseModel):
    """What a run will take, before it starts. Each `_low` and `_high` bound nine of ten runs like it.

    `evaluated_tokens` are those of the validation rows, all evaluations together; `reference_tokens` those that DPO
    scores once, before the first step. `based_on` says what the speed was taken from. `cost` is None without a price in
    the settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    tokens: int
    evaluated_tokens: int = 0
    reference_tokens: int = 0
    steps: int
    seconds: float
    seconds_low: float
    seconds_high: float
    memory_bytes: int
    cost: float | None = None
    cost_low: float | None = None
    cost_high: float | None = None
    based_on: str


class Usage(BaseModel):
    """What a run has taken, all its attempts together. `seconds` are those of its processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tokens: int
    steps: int
    seconds: float
    memory_bytes: int
    cost: float | None = None


class Fidelity(BaseModel):
    """How closely the engine agrees with the trainer on a run's adapter: differences of log-probabilities of learned
    tokens, over `rows` rows. `tolerance` is that of `precision`, which the largest did not exceed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rows: int
    tokens: int
    mean_difference: float
    max_difference: float
    tolerance: float
    precision: str


class JobError(BaseModel):
    """Why a job failed: one true sentence for people, one code for programs."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    code: str
    message: str
    param: str | None = None
