"""The body that creates a job: OpenAI's fields within OpenAI's bounds, and our own under `tuneloom`."""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from tuneloom.control.body import Body, auto_or
from tuneloom.control.integrations import Integrations
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


class DpoHyperparametersBody(HyperparametersBody):
    """The three, and how far the answers may move from those of the base: less for a larger `beta`."""

    beta: Annotated[float | Literal["auto"], auto_or(float, 1e-6, 2, "a number above 0, at most 2")] = "auto"


class SupervisedBody(Body):
    hyperparameters: HyperparametersBody | None = None


class DpoBody(Body):
    hyperparameters: DpoHyperparametersBody | None = None


class MethodBody(Body):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedBody | None = None
    dpo: DpoBody | None = None
    reinforcement: dict[str, Any] | None = None


class OwnOptions(TrainOptions):
    """How it trains, and what else the create does."""

    first_key: bool = False

    @property
    def of_training(self) -> TrainOptions:
        return TrainOptions.model_validate(self.model_dump(exclude={"first_key"}))


class CreateJob(Body):
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = None
    integrations: Integrations | None = None
    metadata: dict[Key, Text] | None = Field(None, max_length=16)
    tuneloom: OwnOptions | None = None


def check_supported(body: CreateJob) -> None:
    """Refuse by name what the API knows and we cannot do."""
    method = body.method
    if method is not None and method.type == "reinforcement":
        raise UnsupportedParameter(
            "The method `reinforcement` is not supported. Use `supervised` or `dpo`.", param="method.type"
        )
    for other in ("supervised", "dpo", "reinforcement"):
        if method is not None and other != method.type and getattr(method, other) is not None:
            raise InvalidRequest(
                f"`method.{other}` does not go with the type `{method.type}`.", param=f"method.{other}"
            )


def method_of(body: CreateJob) -> Literal["supervised", "dpo"]:
    """The method of a body that `check_supported` has let through."""
    return "dpo" if body.method is not None and body.method.type == "dpo" else "supervised"


def hyperparameters_of(body: CreateJob) -> Hyperparameters:
    """From the object of the method, or the older field; both may come if they agree on the three of it."""
    name = method_of(body)
    own: DpoBody | SupervisedBody | None = getattr(body.method, name) if body.method else None
    method, older = own.hyperparameters if own else None, body.hyperparameters
    if method is not None and older is not None and method.model_dump(exclude={"beta"}) != older.model_dump():
        raise InvalidRequest(
            f"`hyperparameters` and `method.{name}.hyperparameters` differ. Give one of them.",
            param="hyperparameters",
        )
    chosen = (method or older or HyperparametersBody()).model_dump()
    return Hyperparameters.model_validate({"beta": "auto", **chosen} if name == "dpo" else chosen)
