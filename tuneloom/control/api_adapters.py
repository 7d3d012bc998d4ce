"""`/v1/tuneloom/models`: adapters in and out, as the files that `peft` has."""

import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tuneloom.bases import get_base
from tuneloom.control import audit, exports, models, repeat
from tuneloom.control.api_models import find_for, show_version
from tuneloom.control.body import Form, digest, identify, read_form
from tuneloom.control.context import ApiContext, caller, check_may_use, in_thread
from tuneloom.domain import Actor, Principal, Version, check_model_name
from tuneloom.errors import InvalidRequest, MissingParameter, ModelNotFound, UnknownParameter
from tuneloom.store.artifacts import ADAPTER_FILES
from tuneloom.store.base import BlobNotFound, Write

CHUNK_BYTES = 1 << 20


class AdaptersApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._store = context.store
        self._records = context.store.records

    def routes(self) -> list[Route]:
        ours = "/v1/tuneloom/models"
        return [
            Route(ours + "/import", self.import_adapter, methods=["POST"]),
            Route(ours + "/{name:path}/adapter", self.download, methods=["GET"]),
        ]

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
        found = find_for(self._records, who, name)
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
