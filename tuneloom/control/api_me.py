"""`/v1/tuneloom/me` on the wire: who the caller is to us, whatever proved it."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control.context import ApiContext, caller, in_thread
from tuneloom.domain import Principal


class MeApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._records = context.store.records

    def routes(self) -> list[Route]:
        return [Route("/v1/tuneloom/me", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        principal = caller(request)
        key = await in_thread(self._records.keys.find, principal.key_id) if principal.kind == "key" else None
        return JSONResponse(show_me(principal, key.value.name if key else None))


def show_me(principal: Principal, key_name: str | None) -> dict[str, Any]:
    """`email` is a person's, `key` the one that was used, if one was; empty `models` are all of the owner's."""
    return {
        "object": "tuneloom.me",
        "owner": principal.owner,
        "kind": principal.kind,
        "scopes": list(principal.scopes),
        "email": principal.email,
        "key": {"id": principal.key_id, "name": key_name} if principal.kind == "key" else None,
        "models": list(principal.models),
    }
