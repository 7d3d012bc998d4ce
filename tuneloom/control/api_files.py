"""`/v1/files` on the wire."""

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, BinaryIO

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tuneloom.control import audit, files, owner_limits, repeat
from tuneloom.control.body import Form, digest, identify, read_form
from tuneloom.control.context import FileRoutes, caller, in_thread, query_choice, query_int
from tuneloom.control.pages import read_page
from tuneloom.control.retry import retry
from tuneloom.domain import Actor, File, new_id
from tuneloom.errors import InvalidRequest, NotFound
from tuneloom.store.base import BlobNotFound, Write


class FilesApi(FileRoutes):
    """Each method is one endpoint."""

    def routes(self) -> list[Route]:
        return [
            Route("/v1/files", self.create, methods=["POST"]),
            Route("/v1/files", self.list_files, methods=["GET"]),
            Route("/v1/files/{id}", self.retrieve, methods=["GET"]),
            Route("/v1/files/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/files/{id}/content", self.content, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Response:
        owner = caller(request, "training").owner
        async with read_form(request, self._limits.max_file_bytes) as form:
            form.check_known("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
            file = await in_thread(self._create, request, owner, form)
        return JSONResponse(show_file(file))

    def _create(self, request: Request, owner: str, form: Form) -> File:
        part = form.part("file")
        filename = files.clean_filename(part.filename)
        purpose = files.check_purpose(form.field("purpose"), filename)
        life_s = _form_expiry(form)
        if part.size_bytes == 0:
            raise InvalidRequest("The file is empty.", param="file")
        sha256 = part.sha256()
        id = new_id("file-")
        now = time.time()
        file = File(
            id=id,
            owner=owner,
            filename=filename,
            purpose=purpose,
            size_bytes=part.size_bytes,
            sha256=sha256,
            blob=f"files/{id}",
            created_at=now,
            expires_at=files.expiry(purpose, life_s, now),
        )
        asked = identify(request, owner, digest(filename, purpose, sha256, str(life_s)))
        file = files.put_bytes(
            self._store, file, part.chunks(), max_bytes=self._limits.max_file_bytes, timeout_s=self._timeout_s
        )

        def make() -> tuple[str, File, list[Write]]:
            owner_limits.check_room(self._settings, self._records, caller(request), file.size_bytes)
            told = files.told(audit.actor_of(request), "created", file, sha256=file.sha256)
            return id, file, [self._records.files.create(file), told]

        with files.dropped_if_refused(self._store, file.blob):
            kept = repeat.create_once(
                self._records,
                asked,
                make,
                lambda found: files.get_file(self._records, owner, found).value,
            )
        if kept.id != id:
            self._store.blobs.delete(file.blob)
        return kept

    async def list_files(self, request: Request) -> Response:
        return JSONResponse(await in_thread(self._list, request, caller(request, "training").owner))

    def _list(self, request: Request, owner: str) -> dict[str, Any]:
        limit = query_int(request, "limit", 10_000, 1, 10_000)
        order = query_choice(request, "order", "desc", ("asc", "desc"))
        after = request.query_params.get("after")
        cursor = files.get_file(self._records, owner, after).value if after else None
        where: dict[str, Any] = {"owner": owner}
        if purpose := request.query_params.get("purpose"):
            where["purpose"] = purpose
        now = time.time()
        page = read_page(
            self._records.files,
            where,
            order_by="created_at",
            descending=order == "desc",
            limit=limit,
            after=cursor,
            keep=lambda file: not files.is_expired(file, now),
        )
        return page.body(show_file)

    async def retrieve(self, request: Request) -> Response:
        owner = caller(request, "training").owner
        stored = await in_thread(files.get_file, self._records, owner, request.path_params["id"])
        return JSONResponse(show_file(stored.value))

    async def delete(self, request: Request) -> Response:
        owner, id = caller(request, "training").owner, request.path_params["id"]
        actor = audit.actor_of(request)
        await in_thread(retry, lambda: files.delete_file(self._store, owner, id, actor))
        return JSONResponse({"id": id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        owner, id = caller(request, "training").owner, request.path_params["id"]
        file, source = await in_thread(self._open, owner, id, audit.actor_of(request))

        async def chunks() -> AsyncIterator[bytes]:
            with source:
                while chunk := await in_thread(source.read, files.CHUNK_BYTES):
                    yield chunk

        headers = {"content-length": str(file.size_bytes), "content-disposition": "attachment"}
        return StreamingResponse(chunks(), media_type="application/octet-stream", headers=headers)

    def _open(self, owner: str, id: str, actor: Actor) -> tuple[File, BinaryIO]:
        file = files.get_file(self._records, owner, id).value
        try:
            source = self._store.blobs.open(file.blob)
        except BlobNotFound as error:
            # Deleted between the two reads.
            raise NotFound(f"No such File object: {id[:200]}", param="id") from error
        try:
            self._records.commit(files.told(actor, "downloaded", file))
        except BaseException:
            source.close()
            raise
        return file, source


def show_file(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at),
        "expires_at": None if file.expires_at is None else int(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": file.status_details,
    }


def _form_expiry(form: Form) -> int | None:
    given = [name for name in ("expires_after[anchor]", "expires_after[seconds]") if name in form.fields]
    if not given:
        return None
    with contextlib.suppress(KeyError):
        return files.check_expiry(form.fields["expires_after[anchor]"], form.fields["expires_after[seconds]"])
    raise InvalidRequest("`expires_after` needs both `anchor` and `seconds`.", param="expires_after")
