"""`/v1/tuneloom/me` on the wire: who the caller is to us, whatever proved it, and how a person leaves."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control import audit, departures
from tuneloom.control.body import Body, parse, read_json
from tuneloom.control.context import ApiContext, caller, in_thread
from tuneloom.domain import Departure, Principal
from tuneloom.errors import InvalidRequest, PermissionDenied


class DeleteMe(Body):
    """`confirm` is the owner id, so that nobody leaves by a wrong click."""

    confirm: str


class MeApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._records = context.store.records

    def routes(self) -> list[Route]:
        path = "/v1/tuneloom/me"
        return [Route(path, self.show, methods=["GET"]), Route(path, self.delete, methods=["DELETE"])]

    async def show(self, request: Request) -> Response:
        return JSONResponse(await in_thread(self._show, caller(request)))

    def _show(self, principal: Principal) -> dict[str, Any]:
        key = self._records.keys.find(principal.key_id) if principal.kind == "key" else None
        leaves = self._records.departures.find(principal.owner)
        return show_me(principal, key.value.name if key else None, leaves.value if leaves else None)

    async def delete(self, request: Request) -> Response:
        principal = caller(request)
        if principal.kind == "key":
            raise PermissionDenied("Only a person who has signed in can delete their account, not a key.")
        body = parse(DeleteMe, await read_json(request, self._context.settings.gateway.max_body_bytes))
        if body.confirm != principal.owner:
            raise InvalidRequest(
                "Everything of yours would be removed for good. To go on, send your owner id "
                f"(`{principal.owner}`) as `confirm`.",
                param="confirm",
            )
        departure = await in_thread(departures.ask, self._records, principal.owner, audit.actor_of(request))
        for id in await in_thread(departures.end_keys, self._context.store, principal.owner):
            self._context.forget_key(id)
        self._context.poke()
        return JSONResponse(
            {
                "object": "tuneloom.me.deletion",
                "owner": departure.owner,
                "requested_at": int(departure.requested_at),
                "deleted": False,
            },
            202,
        )


def show_me(principal: Principal, key_name: str | None, leaves: Departure | None) -> dict[str, Any]:
    """`email` is a person's, `key` the one that was used, if one was; empty `models` are all of the owner's.

    `deletion_requested_at` is set while everything of the owner is being removed.
    """
    return {
        "object": "tuneloom.me",
        "owner": principal.owner,
        "kind": principal.kind,
        "scopes": list(principal.scopes),
        "email": principal.email,
        "key": {"id": principal.key_id, "name": key_name} if principal.kind == "key" else None,
        "models": list(principal.models),
        "deletion_requested_at": int(leaves.requested_at) if leaves else None,
    }
