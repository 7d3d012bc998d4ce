"""The body that creates a job: OpenAI's fields within OpenAI's bounds, and our own under `tuneloom`."""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from tuneloom.control.body import Body, auto_or
from tuneloom.domain import Hyperparameters, TrainOptions
from tuneloom.errors import InvalidRequest, UnsupportedParameter

Key = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Text = Annotated[str, StringConstraints(max_length=512)]


class HyperparametersBody(Body):
    """OpenAI's three settings within OpenAI's bounds."""

    n_epochs: Annotated[int | Literal["auto"], auto_or(int, 1, 50, "a whole number from 1 to 50")] = "auto"
    batch_size: Annotated[int | Literal["auto"], auto_or(int, 1, 256, "a whole number from 1 to 256")] = "auto"
    learning_rate_multiplier: Annotated[
        float | Literal["auto"], auto_or(float, 1e-6, 1e4, "a number above 0, at most 10000")
    ] = "auto"


class SupervisedBody(Body):
    hyperparameters: HyperparametersBody | None = None


class MethodBody(Body):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedBody | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class CreateJob(Body):
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = None
    integrations: list[Any] | None = None
    metadata: dict[Key, Text] | None = Field(None, max_length=16)
    tuneloom: TrainOptions | None = None


def check_supported(body: CreateJob) -> None:
    """Refuse by name what the API knows and we cannot do."""
    method = body.method
    if method is not None and method.type != "supervised":
        raise UnsupportedParameter(
            f"The method `{method.type}` is not supported. Use `supervised`.", param="method.type"
        )
    for other in ("dpo", "reinforcement"):
        if method is not None and getattr(method, other) is not None:
            raise InvalidRequest(f"`method.{other}` does not go with the type `supervised`.", param=f"method.{other}")
    if body.integrations:
        raise UnsupportedParameter(
            "`integrations` are not supported. Leave the field out; metrics are in the job's events and result file.",
            param="integrations",
        )


def hyperparameters_of(body: CreateJob) -> Hyperparameters:
    """From `method.supervised`, or the older field; both may come if they agree."""
    method = body.method.supervised.hyperparameters if body.method and body.method.supervised else None
    if method is not None and body.hyperparameters is not None and method != body.hyperparameters:
        raise InvalidRequest(
            "`hyperparameters` and `method.supervised.hyperparameters` differ. Give one of them.",
            param="hyperparameters",
        )
    chosen = method or body.hyperparameters or HyperparametersBody()
    return Hyperparameters.model_validate(chosen.model_dump())
