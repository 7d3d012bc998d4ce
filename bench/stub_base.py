"""A base that answers at once and computes nothing, as a Serve application: what is left is the way there and back."""

import itertools
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from tuneloom.engine.base import EngineStats
from tuneloom.generation import Delta, Finished, Frame, GenerationRequest, Started, Usage

if TYPE_CHECKING:
    from ray.serve import Application


class StubBase:
    """Has the calls of `serve.replica.Base` that a gateway makes for a generation and for readiness."""

    def __init__(self, settings: Mapping[str, Any], base_id: str) -> None:
        self._numbers = itertools.count()

    async def generate(self, request: GenerationRequest, caller: str = "") -> AsyncGenerator[Frame, None]:
        yield Started(8)
        yield [Delta(0, "It is so.", finish_reason="stop")]
        yield Finished(Usage(8, 4))

    async def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 1, next(self._numbers), 0.0, 0, 0, 0)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {}


def base(args: dict[str, Any]) -> "Application":
    from ray import serve

    from tuneloom.serve.door import Door

    bound = serve.deployment(name="Base")(StubBase).bind(args["settings"], args["base"])
    behind_haproxy = args["settings"]["gateway"]["mode"] == "haproxy"
    return serve.deployment(name="Door")(Door).bind(bound) if behind_haproxy else bound
