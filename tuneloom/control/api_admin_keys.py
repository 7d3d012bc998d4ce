"""`/v1/organization/admin_api_keys`: the keys with the scope `admin`, in OpenAI's form, for admins."""

from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control import audit, keys, repeat
from tuneloom.control.body import Body, digest, identify, parse, read_json
from tuneloom.control.context import ApiContext, caller, in_thread, query_choice, query_int
from tuneloom.control.keys import Minted
from tuneloom.domain import ApiKey
from tuneloom.errors import NotFound
from tuneloom.store.base import Write

OBJECT = "organization.admin_api_key"


class CreateAdminKey(Body):
    name: str
    expires_in_seconds: int | None = Field(None, ge=1)


class AdminKeysApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._records = context.store.records

    def routes(self) -> list[Route]:
        path = "/v1/organization/admin_api_keys"
        return [
            Route(path, self.create, methods=["POST"]),
            Route(path, self.list_keys, methods=["GET"]),
            Route(path + "/{id}", self.retrieve, methods=["GET"]),
            Route(path + "/{id}", self.revoke, methods=["DELETE"]),
        ]

    async def create(self, request: Request) -> Response:
        caller(request, "admin")
        raw = await read_json(request, self._context.settings.gateway.max_body_bytes)
        minted = await in_thread(self._create, request, raw)
        body = {**show_admin_key(minted.key), "value": minted.secret}
        return JSONResponse(body, headers={"cache-control": "no-store"})

    def _create(self, request: Request, raw: bytes) -> Minted:
        body, owner, actor = parse(CreateAdminKey, raw), caller(request).owner, audit.actor_of(request)
        life = body.expires_in_seconds
        minted = keys.draft(self._context.pepper, owner=owner, name=body.name, scopes=["admin"], expires_in=life)

        def make() -> tuple[str, Minted, list[Write]]:
            return minted.key.id, minted, keys.creation(self._records, minted.key, actor)

        def again(id: str) -> Minted:
            return keys.reissue(self._records, self._context.pepper, id, actor)

        return repeat.create_once(self._records, identify(request, owner, digest(raw)), make, again)

    async def list_keys(self, request: Request) -> Response:
        caller(request, "admin")
        return JSONResponse(await in_thread(self._list, request))

    def _list(self, request: Request) -> dict[str, Any]:
        limit = query_int(request, "limit", 20, 1, 100)
        found = [key for key in keys.list_keys(self._records) if _is_admin(key)]
        if query_choice(request, "order", "asc", ("asc", "desc")) == "asc":
            found.reverse()
        if after := request.query_params.get("after"):
            ids = [key.id for key in found]
            if after not in ids:
                raise NotFound(f"There is no admin key `{after[:80]}` to go on after.", param="after")
            found = found[ids.index(after) + 1 :]
        data = [show_admin_key(key) for key in found[:limit]]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > limit,
        }

    async def retrieve(self, request: Request) -> Response:
        caller(request, "admin")
        return JSONResponse(show_admin_key(await in_thread(self._get, request.path_params["id"])))

    async def revoke(self, request: Request) -> Response:
        caller(request, "admin")
        id, actor = request.path_params["id"], audit.actor_of(request)
        await in_thread(self._get, id)
        await in_thread(keys.revoke, self._records, id, actor)
        self._context.forget_key(id)
        return JSONResponse({"id": id, "object": f"{OBJECT}.deleted", "deleted": True})

    def _get(self, id: str) -> ApiKey:
        key = keys.find_key(self._records, id).value
        if not _is_admin(key):
            raise NotFound(f"No such key: `{id[:200]}`.", param="id")
        return key


def show_admin_key(key: ApiKey) -> dict[str, Any]:
    return {
        "object": OBJECT,
        "id": key.id,
        "name": key.name,
        "redacted_value": key.redacted,
        "created_at": int(key.created_at),
        "expires_at": None if key.expires_at is None else int(key.expires_at),
        "last_used_at": None if key.last_used_at is None else int(key.last_used_at),
        "owner": {
            "object": "organization.user",
            "type": "user",
            "id": key.owner,
            "name": key.owner,
            "role": "owner",
            "created_at": int(key.created_at),
        },
    }


def _is_admin(key: ApiKey) -> bool:
    return "admin" in key.scopes and key.revoked_at is None
