"""`/v1/tuneloom/keys` on the wire; for admins. A secret is in the answer to its creation and nowhere else."""

from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control import keys, repeat
from tuneloom.control.body import Body, digest, identify, parse, read_json
from tuneloom.control.context import ApiContext, caller, in_thread
from tuneloom.control.keys import Minted
from tuneloom.domain import ApiKey
from tuneloom.store.base import Write


class CreateKey(Body):
    name: str = ""
    owner: str | None = None
    scopes: list[str] = Field(default_factory=lambda: list(keys.DEFAULT_SCOPES))
    expires_in: str | int | None = None


class KeysApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._records = context.store.records

    def routes(self) -> list[Route]:
        path = "/v1/tuneloom/keys"
        return [
            Route(path, self.create, methods=["POST"]),
            Route(path, self.list_keys, methods=["GET"]),
            Route(path + "/{id}", self.revoke, methods=["DELETE"]),
            Route(path + "/{id}/revoke", self.revoke, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Response:
        owner = caller(request, "admin").owner
        raw = await read_json(request, self._context.settings.gateway.max_body_bytes)
        minted = await in_thread(self._create, request, owner, raw)
        return JSONResponse({**show_key(minted.key), "secret": minted.secret})

    def _create(self, request: Request, owner: str, raw: bytes) -> Minted:
        body = parse(CreateKey, raw)
        minted = keys.draft(
            self._context.pepper,
            owner=body.owner or owner,
            name=body.name,
            scopes=body.scopes,
            expires_in=body.expires_in,
        )

        def make() -> tuple[str, Minted, list[Write]]:
            return minted.key.id, minted, [self._records.keys.create(minted.key)]

        def rotate(id: str) -> Minted:
            # The secret of the first answer is gone, and nobody has seen it: the same key gets a new one.
            return keys.rotate(self._records, self._context.pepper, id)

        return repeat.create_once(self._records, identify(request, owner, digest(raw)), make, rotate)

    async def list_keys(self, request: Request) -> Response:
        caller(request, "admin")
        found = await in_thread(keys.list_keys, self._records, request.query_params.get("owner"))
        return JSONResponse({"object": "list", "data": [show_key(key) for key in found], "has_more": False})

    async def revoke(self, request: Request) -> Response:
        caller(request, "admin")
        key = await in_thread(keys.revoke, self._records, request.path_params["id"])
        return JSONResponse({**show_key(key), "deleted": True})


def show_key(key: ApiKey) -> dict[str, Any]:
    return {
        "object": "tuneloom.key",
        "id": key.id,
        "name": key.name,
        "owner": key.owner,
        "redacted_value": key.redacted,
        "scopes": list(key.scopes),
        "created_at": int(key.created_at),
        "expires_at": None if key.expires_at is None else int(key.expires_at),
        "revoked_at": None if key.revoked_at is None else int(key.revoked_at),
    }
