"""`/v1/uploads` on the wire: files that arrive in parts."""

import time
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control import audit, files, owner_limits, repeat
from tuneloom.control.api_files import show_file
from tuneloom.control.body import Body, Part, digest, identify, parse, read_form, read_json, retry_count, size_text
from tuneloom.control.context import FileRoutes, caller, in_thread
from tuneloom.control.retry import retry
from tuneloom.domain import Actor, File, Upload, UploadPart, new_id
from tuneloom.errors import InvalidRequest, TooLarge
from tuneloom.store.base import BlobNotFound, StoreConflict, Write

MAX_PARTS = 10_000


class ExpiresAfterBody(Body):
    anchor: str
    seconds: int


class CreateUpload(Body):
    filename: str
    purpose: str
    bytes: int = Field(ge=1)
    mime_type: str = Field(max_length=255)
    expires_after: ExpiresAfterBody | None = None


class CompleteUpload(Body):
    part_ids: list[str] = Field(min_length=1, max_length=MAX_PARTS)
    md5: str | None = None


class UploadsApi(FileRoutes):
    """Each method is one endpoint."""

    def routes(self) -> list[Route]:
        return [
            Route("/v1/uploads", self.create_upload, methods=["POST"]),
            Route("/v1/uploads/{id}/parts", self.add_part, methods=["POST"]),
            Route("/v1/uploads/{id}/complete", self.complete_upload, methods=["POST"]),
            Route("/v1/uploads/{id}/cancel", self.cancel_upload, methods=["POST"]),
        ]

    async def create_upload(self, request: Request) -> Response:
        owner = caller(request, "training").owner
        raw = await read_json(request, self._limits.max_body_bytes)
        return JSONResponse(await in_thread(self._create_upload, request, owner, raw))

    def _create_upload(self, request: Request, owner: str, raw: bytes) -> dict[str, Any]:
        body = parse(CreateUpload, raw)
        if body.bytes > self._limits.max_upload_bytes:
            raise TooLarge(f"An upload may have {size_text(self._limits.max_upload_bytes)}.", param="bytes")
        filename = files.clean_filename(body.filename)
        purpose = files.check_purpose(body.purpose, filename)
        after = body.expires_after
        now = time.time()
        upload = Upload(
            id=new_id("upload_"),
            owner=owner,
            filename=filename,
            purpose=purpose,
            size_bytes=body.bytes,
            mime_type=body.mime_type,
            created_at=now,
            expires_at=now + files.UPLOAD_LIFE_S,
            file_expires_after_s=None if after is None else files.check_expiry(after.anchor, after.seconds),
        )

        def make() -> tuple[str, Upload, list[Write]]:
            owner_limits.check_room(self._settings, self._records, caller(request), upload.size_bytes)
            return upload.id, upload, [self._records.uploads.create(upload)]

        kept = repeat.create_once(
            self._records,
            identify(request, owner, digest(raw)),
            make,
            lambda found: files.get_upload(self._records, owner, found).value,
        )
        return self._show_upload(kept)

    async def add_part(self, request: Request) -> Response:
        owner, id = caller(request, "training").owner, request.path_params["id"]
        await in_thread(files.get_pending, self._records, owner, id)
        async with read_form(request, self._limits.max_part_bytes) as form:
            form.check_known("data")
            part = await in_thread(self._add_part, request, owner, id, form.part("data"))
        return JSONResponse(
            {"id": part.id, "object": "upload.part", "created_at": int(part.created_at), "upload_id": id}
        )

    def _add_part(self, request: Request, owner: str, upload_id: str, data: Part) -> UploadPart:
        upload = files.get_pending(self._records, owner, upload_id).value
        files.check_part(self._records, upload, data.size_bytes, max_parts=MAX_PARTS)
        sha256 = data.sha256()
        id = new_id("part_")
        part = UploadPart(
            id=id,
            owner=owner,
            upload_id=upload_id,
            created_at=time.time(),
            size_bytes=data.size_bytes,
            blob=f"uploads/{upload_id}/{id}",
        )
        self._store.blobs.write(part.blob, data.chunks(), sha256=sha256)

        def make() -> tuple[str, UploadPart, list[Write]]:
            # A part that slips in while its upload ends harms nothing: it is in no list of parts, and is swept.
            files.get_pending(self._records, owner, upload_id)
            return id, part, [self._records.upload_parts.create(part)]

        with files.dropped_if_refused(self._store, part.blob):
            kept = repeat.create_once(
                self._records,
                identify(request, owner, sha256),
                make,
                lambda found: self._records.upload_parts.get(found).value,
            )
        if kept.id != id:
            self._store.blobs.delete(part.blob)
        return kept

    async def complete_upload(self, request: Request) -> Response:
        owner, id = caller(request, "training").owner, request.path_params["id"]
        raw = await read_json(request, self._limits.max_body_bytes)
        again = retry_count(request) > 0
        body, actor = parse(CompleteUpload, raw), audit.actor_of(request)
        return JSONResponse(await in_thread(self._complete_upload, owner, id, body, again, actor))

    def _complete_upload(self, owner: str, id: str, body: CompleteUpload, again: bool, actor: Actor) -> dict[str, Any]:
        known = files.get_upload(self._records, owner, id).value
        if again and known.status == "completed":
            return self._show_upload(known)
        stored = files.get_pending(self._records, owner, id)
        try:
            file = self._join(stored.value, body)
        except (BlobNotFound, InvalidRequest):
            # The parts go when the upload ends: if somebody has ended it meanwhile, that is what there is to say.
            if files.get_upload(self._records, owner, id).value.status == "pending":
                raise
            return self._complete_upload(owner, id, body, True, actor)
        done = stored.value.model_copy(update={"status": "completed", "file_id": file.id})
        try:
            told = files.told(actor, "created", file, sha256=file.sha256, upload=id)
            self._records.commit(self._records.uploads.replace(stored, done), self._records.files.create(file), told)
        except StoreConflict:
            # Completed, cancelled or given a part meanwhile: the caller hears how it stands.
            self._store.blobs.delete(file.blob)
            return self._complete_upload(owner, id, body, True, actor)
        files.drop_parts(self._store, id)
        return self._show_upload(done)

    def _join(self, upload: Upload, body: CompleteUpload) -> File:
        return files.join_parts(
            self._store,
            upload,
            files.parts_in_order(self._records, upload, body.part_ids),
            body.md5,
            new_id("file-"),
            max_bytes=self._limits.max_upload_bytes,
            timeout_s=self._timeout_s,
        )

    async def cancel_upload(self, request: Request) -> Response:
        owner, id = caller(request, "training").owner, request.path_params["id"]
        return JSONResponse(await in_thread(self._cancel_upload, owner, id, retry_count(request) > 0))

    def _cancel_upload(self, owner: str, id: str, again: bool) -> dict[str, Any]:
        def once() -> Upload:
            known = files.get_upload(self._records, owner, id).value
            if again and known.status == "cancelled":
                return known
            stored = files.get_pending(self._records, owner, id)
            cancelled = stored.value.model_copy(update={"status": "cancelled"})
            self._records.commit(self._records.uploads.replace(stored, cancelled))
            return cancelled

        cancelled = retry(once)
        files.drop_parts(self._store, id)
        return self._show_upload(cancelled)

    def _show_upload(self, upload: Upload) -> dict[str, Any]:
        file = None if upload.file_id is None else self._records.files.find(upload.file_id)
        return {
            "id": upload.id,
            "object": "upload",
            "bytes": upload.size_bytes,
            "created_at": int(upload.created_at),
            "expires_at": int(upload.expires_at),
            "filename": upload.filename,
            "purpose": upload.purpose,
            "status": files.status_of(upload, time.time()),
            "file": None if file is None else show_file(file.value),
        }
