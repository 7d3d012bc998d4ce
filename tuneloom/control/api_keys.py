"""`/v1/tuneloom/keys` on the wire, and the keys of one model. A secret is in the answer to its creation or rotation
and nowhere else.

For the scopes `account`, within an owner, and `admin`; see `key_rights`.
"""

import dataclasses
import time
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control import audit, key_fields, keys, repeat
from tuneloom.control.body import Body, digest, identify, parse, read_json
from tuneloom.control.context import ApiContext, caller, check_may_use, in_thread
from tuneloom.control.key_rights import check_covers, inherit_end, may_see, owner_of
from tuneloom.control.keys import Minted
from tuneloom.domain import ApiKey, Principal, Rates, model_id
from tuneloom.errors import Conflict, MissingParameter, ModelNotFound
from tuneloom.store.base import Write
from tuneloom.store.records import Stored


class CreateKey(Body):
    name: str = ""
    owner: str | None = None
    scopes: list[str] = Field(default_factory=lambda: list(keys.DEFAULT_SCOPES))
    expires_in: str | int | None = None
    models: list[str] = Field(default_factory=list)
    rates: Rates = Rates()


class CreateModelKey(Body):
    """The body may be left out: the key is then named after the model, calls it, and never ends."""

    name: str | None = None
    owner: str | None = None
    scopes: list[str] = Field(default_factory=lambda: list(keys.MODEL_SCOPES))
    expires_in: str | int | None = None
    rates: Rates = Rates()


class UpdateKey(Body):
    """What is not named stays; `expires_in` counts from now, null takes the end away."""

    name: str = ""
    expires_in: str | int | None = None
    models: list[str] = Field(default_factory=list)
    rates: Rates = Rates()


class RotateKey(Body):
    overlap: str | int | None = None


class KeysApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._records = context.store.records

    def routes(self) -> list[Route]:
        path, of_model = "/v1/tuneloom/keys", "/v1/tuneloom/models/{name:path}/keys"
        return [
            Route(of_model, self.create_for_model, methods=["POST"]),
            Route(of_model, self.list_of_model, methods=["GET"]),
            Route(path, self.create, methods=["POST"]),
            Route(path, self.list_keys, methods=["GET"]),
            Route(path + "/{id}", self.retrieve, methods=["GET"]),
            Route(path + "/{id}", self.update, methods=["POST"]),
            Route(path + "/{id}", self.revoke, methods=["DELETE"]),
            Route(path + "/{id}/revoke", self.revoke, methods=["POST"]),
            Route(path + "/{id}/rotate", self.rotate, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Response:
        owner_of(caller(request), None)
        raw = await self._read(request)
        return _show_secret(await in_thread(self._create, request, raw))

    async def create_for_model(self, request: Request) -> Response:
        owner_of(caller(request), None)
        raw = await self._read(request)
        return _show_secret(await in_thread(self._create_for_model, request, raw))

    def _create_for_model(self, request: Request, raw: bytes) -> Minted:
        body, principal = parse(CreateModelKey, raw), caller(request)
        model = self._find_model(principal, owner_of(principal, body.owner), request.path_params["name"])
        given = {**body.model_dump(), "name": model if body.name is None else body.name, "models": [model]}
        return self._make(request, CreateKey.model_validate(given), raw)

    async def list_of_model(self, request: Request) -> Response:
        owner = owner_of(caller(request), request.query_params.get("owner"))
        return JSONResponse(await in_thread(self._list_of_model, request, owner))

    def _list_of_model(self, request: Request, owner: str | None) -> dict[str, Any]:
        principal = caller(request)
        model = self._find_model(principal, owner, request.path_params["name"])
        found = keys.list_keys(self._records, owner or principal.owner)
        return _show_list([key for key in found if model in key.models and may_see(principal, key)])

    def _find_model(self, principal: Principal, owner: str | None, name: str) -> str:
        """The Model of that bare name, or the id of the base; what is not for the caller's key is not there."""
        owner = owner or principal.owner
        base = self._context.find_base_id(name)
        if base is None and self._records.models.find(model_id(owner, name)) is None:
            raise ModelNotFound.named(name[:200])
        check_may_use(principal, base or name, name)
        return base or name

    def _create(self, request: Request, raw: bytes) -> Minted:
        return self._make(request, parse(CreateKey, raw), raw)

    def _make(self, request: Request, body: CreateKey, raw: bytes) -> Minted:
        principal = caller(request)
        owner = key_fields.check_owner(owner_of(principal, body.owner) or principal.owner)
        minted = keys.draft(
            self._context.pepper,
            owner=owner,
            name=body.name,
            scopes=body.scopes,
            expires_in=body.expires_in,
            models=self._models(principal, owner, body.models),
            rates=body.rates,
        )
        minted = dataclasses.replace(minted, key=inherit_end(principal, minted.key))
        check_covers(principal, minted.key)
        actor = audit.actor_of(request)

        def make() -> tuple[str, Minted, list[Write]]:
            return minted.key.id, minted, keys.creation(self._records, minted.key, actor)

        def again(id: str) -> Minted:
            if self._find(principal, id).value.last_used_at is not None:
                raise Conflict(
                    f"This request has made the key `{id}`, whose secret is in use. Rotate the key for a new secret.",
                    code="key_in_use",
                )
            return self._reissue(request, id)

        return repeat.create_once(self._records, identify(request, principal.owner, digest(raw)), make, again)

    async def list_keys(self, request: Request) -> Response:
        principal = caller(request)
        owner = owner_of(principal, request.query_params.get("owner"))
        found = await in_thread(keys.list_keys, self._records, owner)
        return JSONResponse(_show_list([key for key in found if may_see(principal, key)]))

    async def retrieve(self, request: Request) -> Response:
        stored = await in_thread(self._find, caller(request), request.path_params["id"])
        return JSONResponse(show_key(stored.value))

    def _find(self, principal: Principal, id: str) -> Stored[ApiKey]:
        stored = keys.find_key(self._records, id, owner_of(principal, None))
        if not may_see(principal, stored.value):
            raise keys.no_such_key(id)
        return stored

    async def update(self, request: Request) -> Response:
        owner_of(caller(request), None)
        raw = await self._read(request)
        return JSONResponse(show_key(await in_thread(self._update, request, raw)))

    def _update(self, request: Request, raw: bytes) -> ApiKey:
        id, principal = request.path_params["id"], caller(request)
        self._find(principal, id)
        body = parse(UpdateKey, raw)
        if not body.model_fields_set:
            raise MissingParameter("Name what to change: `name`, `models`, `rates` or `expires_in`.")

        def change(key: ApiKey) -> ApiKey:
            check_covers(principal, key)
            after = key.model_copy(update=self._changed(principal, key, body))
            check_covers(principal, after)
            return after

        return self._forgotten(keys.update(self._records, id, change, audit.actor_of(request)))

    def _changed(self, principal: Principal, key: ApiKey, body: UpdateKey) -> dict[str, Any]:
        named, changed = body.model_fields_set, {}
        if "name" in named:
            changed["name"] = key_fields.check_name(body.name)
        if "rates" in named:
            changed["rates"] = body.rates
        if "expires_in" in named:
            changed["expires_at"] = key_fields.expiry(body.expires_in, time.time())
        if "models" in named:
            changed["models"] = key_fields.check_reach(self._models(principal, key.owner, body.models), key.scopes)
        return changed

    async def revoke(self, request: Request) -> Response:
        return JSONResponse({**show_key(await in_thread(self._revoke, request)), "deleted": True})

    def _revoke(self, request: Request) -> ApiKey:
        id, principal = request.path_params["id"], caller(request)
        self._find(principal, id)
        actor = audit.actor_of(request)
        return self._forgotten(keys.revoke(self._records, id, actor, lambda key: check_covers(principal, key)))

    async def rotate(self, request: Request) -> Response:
        owner_of(caller(request), None)
        raw = await self._read(request)
        return _show_secret(await in_thread(self._rotate, request, raw))

    def _rotate(self, request: Request, raw: bytes) -> Minted:
        id, principal, actor = request.path_params["id"], caller(request), audit.actor_of(request)
        self._find(principal, id)
        overlap = parse(RotateKey, raw).overlap

        def make() -> tuple[str, Minted, list[Write]]:
            stored = self._find(principal, id)
            check_covers(principal, stored.value)
            minted, writes = keys.draft_rotation(self._records, self._context.pepper, stored, overlap, actor)
            return id, minted, writes

        asked = identify(request, principal.owner, digest(raw))
        minted = repeat.create_once(self._records, asked, make, lambda id: self._reissue(request, id))
        self._forgotten(minted.key)
        return minted

    def _reissue(self, request: Request, id: str) -> Minted:
        """What a repetition is answered with: the same key, and a secret in the place of the one that nobody saw."""
        stored = self._find(caller(request), id)
        check_covers(caller(request), stored.value)
        return keys.reissue(self._records, self._context.pepper, id, audit.actor_of(request))

    def _forgotten(self, key: ApiKey) -> ApiKey:
        """This process, at least, does not go on with what it knew of the key."""
        self._context.forget_key(key.id)
        return key

    def _models(self, principal: Principal, owner: str, names: list[str]) -> tuple[str, ...]:
        find_base, may_use = self._context.find_base_id, principal.may_use
        return key_fields.check_models(self._records, owner, names, find_base, may_use)

    async def _read(self, request: Request) -> bytes:
        return await read_json(request, self._context.settings.gateway.max_body_bytes) or b"{}"


def show_key(key: ApiKey) -> dict[str, Any]:
    previous = key.previous.ends_at if key.previous else None
    return {
        "object": "tuneloom.key",
        "id": key.id,
        "name": key.name,
        "owner": key.owner,
        "redacted_value": key.redacted,
        "scopes": list(key.scopes),
        "models": list(key.models),
        "rates": key.rates.model_dump(),
        "created_at": int(key.created_at),
        "expires_at": _seconds(key.expires_at),
        "last_used_at": _seconds(key.last_used_at),
        "revoked_at": _seconds(key.revoked_at),
        "previous_secret_ends_at": _seconds(previous) if previous and previous > time.time() else None,
    }


def _show_list(found: list[ApiKey]) -> dict[str, Any]:
    return {"object": "list", "data": [show_key(key) for key in found], "has_more": False}


def show_made(made: Minted | ApiKey) -> dict[str, Any]:
    """A key with its secret, if there is one to show."""
    return {**show_key(made.key), "secret": made.secret} if isinstance(made, Minted) else show_key(made)


def _show_secret(minted: Minted) -> JSONResponse:
    return JSONResponse(show_made(minted), headers={"cache-control": "no-store"})


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
