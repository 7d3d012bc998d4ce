"""The field `integrations` of a job: where its metrics go besides its events. The package `wandb` is never imported."""

import importlib.util
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from tuneloom.control.body import Body
from tuneloom.domain import WandbIntegration
from tuneloom.errors import UnsupportedParameter

Label = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class WandbBody(Body):
    """The key is the operator's, from the environment: a request has no field for one."""

    project: Label
    name: Label | None = None
    entity: Label | None = None
    tags: list[Tag] | None = Field(None, max_length=50)


class IntegrationBody(Body):
    type: Literal["wandb"]
    wandb: WandbBody


Integrations = Annotated[list[IntegrationBody], Field(max_length=5)]


def wandb_of(integrations: Integrations | None) -> tuple[WandbIntegration, ...]:
    """What the trainer is asked to log to.

    Raises:
        UnsupportedParameter: it could not, for want of the package.
    """
    if integrations and not _has_wandb():
        raise UnsupportedParameter(
            "`integrations` of the type `wandb` are not supported here: the package `wandb` is not installed. Install "
            "it where jobs train, with WANDB_API_KEY in the environment of `tuneloom up`, or leave the field out; "
            "metrics are in the job's events and result file.",
            param="integrations",
        )
    return tuple(
        WandbIntegration(project=one.project, name=one.name, entity=one.entity, tags=tuple(one.tags or ()))
        for one in (each.wandb for each in integrations or ())
    )


def _has_wandb() -> bool:
    # The package leaves folders of its own name behind, which are found as packages without a file.
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None


def show_integrations(wandb: tuple[WandbIntegration, ...]) -> list[dict[str, Any]]:
    """As OpenAI shows them in a job."""
    return [{"type": "wandb", "wandb": {**each.model_dump(), "tags": list(each.tags)}} for each in wandb]
