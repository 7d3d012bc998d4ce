"""`/v1/models`, and our own `/v1/tuneloom/models`: versions and their activation."""

from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.bases import catalogue
from tuneloom.control import audit, deletion, exports, models, repeat
from tuneloom.control.body import Body, digest, identify, parse, read_json
from tuneloom.control.context import ApiContext, caller, check_may_use, in_thread
from tuneloom.control.together import Together
from tuneloom.domain import Actor, AdapterRef, Model, Principal, Scope, Version, version_id
from tuneloom.errors import ModelNotFound, PermissionDenied
from tuneloom.store.base import Write
from tuneloom.store.names import Named, find_named
from tuneloom.store.records import Records

# An owner who lists more often than this shares a read of the store with whoever asks meanwhile.
LISTS_APART_S = 0.01


class Activate(Body):
    version: int = Field(ge=1)


class ModelsApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._store = context.store
        self._records = context.store.records
        self._lists: Together[bytes] = Together(LISTS_APART_S)

    def routes(self) -> list[Route]:
        ours = "/v1/tuneloom/models"
        return [
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.retrieve, methods=["GET"]),
            Route("/v1/models/{name:path}", self.delete, methods=["DELETE"]),
            Route(ours, self.list_versions, methods=["GET"]),
            Route(ours + "/{name}/activate", self.activate, methods=["POST"]),
            Route(ours + "/{name}/rollback", self.rollback, methods=["POST"]),
            Route(ours + "/{name}", self.retrieve_versions, methods=["GET"]),
        ]

    async def list_models(self, request: Request) -> Response:
        who = caller(request)
        body = await self._lists.get((who.owner, who.models), lambda: in_thread(self._list, who))
        return Response(body, media_type="application/json")

    def _list(self, who: Principal) -> bytes:
        data = [base for base in self._bases() if who.may_use(base["root"])]
        found = models.list_versions(self._records, who.owner)
        versions = {version.id: version for version in found if who.may_use(version.model)}
        for model in models.list_models(self._records, who.owner):
            active = versions.get(version_id(who.owner, model.name, model.active or 0))
            if active is not None:
                data.append(show_version(active, model.name))
        for version in versions.values():
            data += [show_version(version, version.pinned_name), show_version(version, version.ft_name)]
        return bytes(JSONResponse({"object": "list", "data": data}).body)

    def _bases(self) -> list[dict[str, Any]]:
        """The bases that are served, and the aliases of those."""
        known = catalogue(self._context.bases_dir)
        served = {base.id: known.get(base.id) for base in self._context.settings.bases}
        names = [(id, id) for id in served]
        names += [(alias, id) for alias, id in self._context.settings.base_aliases.items() if id in served]
        return [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "tuneloom",
                "root": id,
                "parent": None,
                "max_model_len": entry.context_length if (entry := served[id]) else None,
            }
            for name, id in names
        ]

    async def retrieve(self, request: Request) -> Response:
        return JSONResponse(await in_thread(self._retrieve, caller(request), request.path_params["name"]))

    def _retrieve(self, who: Principal, name: str) -> dict[str, Any]:
        for base in self._bases():
            if base["id"] == name:
                check_may_use(who, base["root"], name)
                return base
        found = find_for(self._records, who, name)
        if found.checkpoint is not None:
            checkpoint = found.checkpoint.value
            return _show(name, who.owner, checkpoint.base, checkpoint.created_at, checkpoint.adapter)
        if found.version is None:
            raise ModelNotFound.named(name)
        return show_version(found.version.value, name)

    async def delete(self, request: Request) -> Response:
        who, name = caller(request, "training"), request.path_params["name"]
        if (base := self._context.find_base_id(name)) is not None:
            check_may_use(who, base, name)
            raise PermissionDenied(
                f"`{name}` is a base model and cannot be deleted through the API. "
                "The bases are set in the configuration of the installation.",
                param="model",
            )
        await in_thread(self._delete, who, name, audit.actor_of(request))
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    def _delete(self, who: Principal, name: str, actor: Actor) -> None:
        find_for(self._records, who, name)
        deletion.delete(self._store, who.owner, name, actor)

    async def list_versions(self, request: Request) -> Response:
        who = caller(request)

        def read() -> list[dict[str, Any]]:
            versions = models.list_versions(self._records, who.owner)
            return [
                show_model(model, [version for version in versions if version.model == model.name])
                for model in models.list_models(self._records, who.owner)
                if who.may_use(model.name)
            ]

        return JSONResponse({"object": "list", "data": await in_thread(read)})

    async def retrieve_versions(self, request: Request) -> Response:
        owner, name = _bare(request)
        return JSONResponse(await in_thread(self._show, owner, name))

    async def activate(self, request: Request) -> Response:
        owner, name = _bare(request, "training")
        body = parse(Activate, await read_json(request, self._context.settings.gateway.max_body_bytes))
        await in_thread(models.activate, self._records, owner, name, body.version, audit.actor_of(request))
        return JSONResponse(await in_thread(self._show, owner, name))

    async def rollback(self, request: Request) -> Response:
        owner, name = _bare(request, "training")
        await in_thread(self._rollback, request, owner, name)
        return JSONResponse(await in_thread(self._show, owner, name))

    def _rollback(self, request: Request, owner: str, name: str) -> None:
        """Not a create, but as unsafe to repeat as one: a retry must not go back twice."""

        def make() -> tuple[str, None, list[Write]]:
            model, writes = models.draft_rollback(self._records, owner, name, audit.actor_of(request))
            return model.id, None, writes

        repeat.create_once(self._records, identify(request, owner, digest(name)), make, lambda _: None)

    def _show(self, owner: str, name: str) -> dict[str, Any]:
        model = models.get_model(self._records, owner, name).value
        versions = models.list_versions(self._records, owner, name)
        shown = show_model(model, versions)
        lineages = exports.have_lineages(self._store.blobs, (version.adapter for version in versions))
        for row, has_lineage in zip(shown["versions"], lineages, strict=True):
            row["lineage"] = has_lineage
        return shown


def find_for(records: Records, who: Principal, name: str) -> Named:
    """What a name stands for, if it is the caller's and for their key."""
    found = find_named(records, who.owner, name)
    if found is None:
        raise ModelNotFound.named(name)
    check_may_use(who, found.model_name, name)
    return found


def _bare(request: Request, *scopes: Scope) -> tuple[str, str]:
    """Owner and name of the Model in the path, if it is one that the caller's key is for."""
    who, name = caller(request, *scopes), request.path_params["name"]
    check_may_use(who, name, name)
    return who.owner, name


def show_version(version: Version, name: str) -> dict[str, Any]:
    """The model object of OpenAI for one of the names of a Version."""
    return _show(name, version.owner, version.base, version.created_at, version.adapter)


def show_model(model: Model, versions: list[Version]) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "tuneloom.model",
        "created": int(model.created_at),
        "base": model.base,
        "active": model.active,
        "versions": [
            {
                "version": version.number,
                "name": version.pinned_name,
                "fine_tuned_model": version.ft_name,
                "active": version.number == model.active,
                "created": int(version.created_at),
                "job_id": version.job_id,
                "rank": version.adapter.rank,
                "bytes": version.adapter.size_bytes,
                "sha256": version.adapter.sha256,
                "metrics": version.metrics,
                "fidelity": version.fidelity.model_dump() if version.fidelity else None,
                "fidelity_note": version.fidelity_note,
            }
            for version in versions
        ],
    }


def _show(name: str, owner: str, base: str, created_at: float, adapter: AdapterRef) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(created_at),
        "owned_by": owner,
        "root": base,
        "parent": base,
        "tuneloom": {"adapter_sha256": adapter.sha256, "rank": adapter.rank},
    }
