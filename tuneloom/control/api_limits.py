"""`/v1/tuneloom/limits/{owner}` on the wire, for admins. How one's own limits stand is told by the gateway."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control import audit, owner_limits
from tuneloom.control.body import parse, read_json
from tuneloom.control.context import ApiContext, caller, in_thread
from tuneloom.domain import Allowance, OwnerLimits


class LimitsApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._records = context.store.records
        self._max_body_bytes = context.settings.gateway.max_body_bytes

    def routes(self) -> list[Route]:
        path = "/v1/tuneloom/limits/{owner}"
        return [
            Route(path, self.retrieve, methods=["GET"]),
            Route(path, self.put, methods=["PUT", "POST"]),
            Route(path, self.clear, methods=["DELETE"]),
        ]

    async def retrieve(self, request: Request) -> Response:
        caller(request, "admin")
        owner = request.path_params["owner"]
        return JSONResponse(_show(owner, await in_thread(owner_limits.find, self._records, owner)))

    async def put(self, request: Request) -> Response:
        """All limits of the owner, so that the same call again changes nothing."""
        caller(request, "admin")
        owner, raw = request.path_params["owner"], await read_json(request, self._max_body_bytes)
        allowance, actor = parse(Allowance, raw), audit.actor_of(request)
        return JSONResponse(_show(owner, await in_thread(owner_limits.put, self._records, owner, allowance, actor)))

    async def clear(self, request: Request) -> Response:
        caller(request, "admin")
        owner = request.path_params["owner"]
        await in_thread(owner_limits.clear, self._records, owner, audit.actor_of(request))
        return JSONResponse({"object": "tuneloom.limits", "owner": owner, "deleted": True})


def _show(owner: str, limits: OwnerLimits | None) -> dict[str, Any]:
    allowance = limits.allowance if limits else Allowance()
    return {
        "object": "tuneloom.limits",
        "owner": owner,
        "limits": allowance.model_dump(mode="json"),
        "updated_at": int(limits.updated_at) if limits else None,
    }
