"""`/v1/models`, and our own `/v1/tuneloom/models`: versions, activation, adapters in and out."""

import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tuneloom.bases import catalogue, get_base
from tuneloom.control import audit, deletion, exports, models, repeat
from tuneloom.control.body import Body, Form, digest, identify, parse, read_form, read_json
from tuneloom.control.context import ApiContext, caller, check_may_use, in_thread
from tuneloom.control.together import Together
from tuneloom.domain import Actor, AdapterRef, Model, Principal, Scope, Version, check_model_name, version_id
from tuneloom.errors import InvalidRequest, MissingParameter, ModelNotFound, PermissionDenied, UnknownParameter
from tuneloom.store.artifacts import ADAPTER_FILES
from tuneloom.store.base import BlobNotFound, Write
from tuneloom.store.names import Named, find_named

CHUNK_BYTES = 1 << 20
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
            Route(ours + "/import", self.import_adapter, methods=["POST"]),
            Route(ours + "/{name}/activate", self.activate, methods=["POST"]),
            Route(ours + "/{name}/rollback", self.rollback, methods=["POST"]),
            Route(ours + "/{name:path}/adapter", self.download, methods=["GET"]),
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
        found = self._find(who, name)
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
        self._find(who, name)
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

    async def import_adapter(self, request: Request) -> Response:
        who = caller(request, "training")
        limit = self._context.settings.gateway.max_file_bytes
        async with read_form(request, limit, max_files=len(ADAPTER_FILES)) as form:
            version = await in_thread(self._import, request, who, form)
        return JSONResponse({**show_version(version, version.pinned_name), "version": version.number})

    def _import(self, request: Request, who: Principal, form: Form) -> Version:
        owner, name = who.owner, check_model_name(form.field("name"), param="name")
        check_may_use(who, name, name, param="name")
        self._context.check_free_name(name, param="name")
        for field in form.fields:
            if field not in ("name", "base"):
                raise UnknownParameter(f"Unknown parameter: `{field[:100]}`.", param=field[:100])
        with tempfile.TemporaryDirectory(prefix="tuneloom-import-") as folder:
            hashes = _unpack(form, Path(folder))
            settings = self._context.get_base(form.fields.get("base") or _base_named_in(Path(folder)), param="base")
            base = get_base(self._context.bases_dir, settings.id)
            rank, actor = settings.engine.max_rank, audit.actor_of(request)
            add = models.draft_import(self._store, owner, base, name, Path(folder), max_rank=rank, actor=actor)

        def make() -> tuple[str, Version, tuple[Write, ...]]:
            addition = add()
            return addition.version.id, addition.version, addition.writes

        asked = identify(request, owner, digest(name, base.id, *hashes))
        return repeat.create_once(self._records, asked, make, lambda id: self._records.versions.get(id).value)

    async def download(self, request: Request) -> Response:
        """The adapter as a zip of a plain PEFT folder."""
        who, name = caller(request), request.path_params["name"]
        archive = await in_thread(self._pack, who, name, audit.actor_of(request))
        size = archive.stat().st_size

        async def chunks() -> AsyncIterator[bytes]:
            try:
                with archive.open("rb") as source:
                    while chunk := await in_thread(source.read, CHUNK_BYTES):
                        yield chunk
            finally:
                shutil.rmtree(archive.parent, ignore_errors=True)

        filename = "".join(char if (char.isalnum() and char.isascii()) or char in "-._" else "-" for char in name)
        headers = {"content-length": str(size), "content-disposition": f'attachment; filename="{filename}.zip"'}
        return StreamingResponse(chunks(), media_type="application/zip", headers=headers)

    def _pack(self, who: Principal, name: str, actor: Actor) -> Path:
        found = self._find(who, name)
        holder = found.version or found.checkpoint
        if holder is None:
            raise ModelNotFound.named(name)
        work = Path(tempfile.mkdtemp(prefix="tuneloom-adapter-"))
        try:
            folder = work / "adapter"
            folder.mkdir()
            exports.write_adapter(self._store.blobs, holder.value.adapter, folder, name=name, base=holder.value.base)
            archive = exports.write_archive(work / "adapter.zip", folder)
            self._records.commit(models.download_entry(actor, holder.value))
            return archive
        except BlobNotFound as error:
            shutil.rmtree(work, ignore_errors=True)
            raise ModelNotFound.named(name) from error
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise

    def _find(self, who: Principal, name: str) -> Named:
        """What a name stands for, if it is the caller's and for their key."""
        found = find_named(self._records, who.owner, name)
        if found is None:
            raise ModelNotFound.named(name)
        check_may_use(who, found.model_name, name)
        return found

    def _show(self, owner: str, name: str) -> dict[str, Any]:
        model = models.get_model(self._records, owner, name).value
        versions = models.list_versions(self._records, owner, name)
        shown = show_model(model, versions)
        lineages = exports.have_lineages(self._store.blobs, (version.adapter for version in versions))
        for row, has_lineage in zip(shown["versions"], lineages, strict=True):
            row["lineage"] = has_lineage
        return shown


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


def _unpack(form: Form, folder: Path) -> list[str]:
    """Write the two files of an adapter to `folder`; they are known by their file names. Returns their hashes."""
    by_name = {part.filename: part for part in form.parts.values()}
    for name in by_name:
        if name not in ADAPTER_FILES:
            raise InvalidRequest(
                f"Unexpected file {name[:80]!r}. Send `{'` and `'.join(ADAPTER_FILES)}`.", param="file"
            )
    hashes = []
    for name in ADAPTER_FILES:
        if name not in by_name:
            raise MissingParameter(f"The file `{name}` is missing.", param="file")
        with (folder / name).open("wb") as target:
            for chunk in by_name[name].chunks():
                target.write(chunk)
        hashes.append(by_name[name].sha256())
    return hashes


def _base_named_in(folder: Path) -> str:
    """The base that an adapter's config names."""
    try:
        base = json.loads((folder / ADAPTER_FILES[0]).read_bytes())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise MissingParameter("Say which `base` the adapter is for; its config does not name one.", param="base")
    return base
