"""Calls of `files` and `uploads`."""

import hashlib
import tempfile
from pathlib import Path

import openai
from openai.types import FileDeleted, FileObject, Upload
from openai.types.uploads import UploadPart

from tests.conformance.session import Session, fails, holds, is_a, rows, same

ROWS = rows(24)
PART_BYTES = 1000


def files_create_bytes(session: Session) -> None:
    file = session.client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
    is_a(file, FileObject)
    holds("id", file.id.startswith("file-"), file.id)
    same("file", (file.object, file.filename, file.purpose), ("file", "train.jsonl", "fine-tune"))
    same("bytes", file.bytes, len(ROWS))
    same("status", file.status, "processed")
    holds("created_at in seconds", isinstance(file.created_at, int) and file.created_at > 1_700_000_000)
    same("expires_at", file.expires_at, None)
    session.made["file"] = file


def files_create_path(session: Session) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "valid.jsonl"
        path.write_bytes(rows(12))
        file = session.client.files.create(file=path, purpose="fine-tune")
    same("filename", file.filename, "valid.jsonl")
    same("bytes", file.bytes, len(rows(12)))
    session.made["validation"] = file


def files_create_expires_after(session: Session) -> None:
    file = session.client.files.create(
        file=("soon.txt", b"for an hour"),
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    same("expires_at", file.expires_at, file.created_at + 3600)
    session.made["other"] = file


def files_retrieve(session: Session) -> None:
    file = session.earlier("file")
    same("the file", session.client.files.retrieve(file.id), file)


def files_list(session: Session) -> None:
    page = session.client.files.list()
    is_a(page.data[0], FileObject)
    same("ids", [file.id for file in page.data], _ids(session, "other", "validation", "file"))
    same("has_more", page.has_more, False)


def files_list_paging(session: Session) -> None:
    page = session.client.files.list(limit=1)
    same("items of the first page", len(page.data), 1)
    same("has_more", page.has_more, True)
    same("ids over all pages", [file.id for file in page], _ids(session, "other", "validation", "file"))


def files_list_purpose(session: Session) -> None:
    files = list(session.client.files.list(purpose="fine-tune"))
    same("ids", [file.id for file in files], _ids(session, "validation", "file"))
    same("ids of a purpose without files", list(session.client.files.list(purpose="batch")), [])


def files_list_order(session: Session) -> None:
    oldest, *rest = _ids(session, "file", "validation", "other")
    same("ids", [file.id for file in session.client.files.list(order="asc")], [oldest, *rest])
    same("ids after the first", [file.id for file in session.client.files.list(order="asc", after=oldest)], rest)


def files_content(session: Session) -> None:
    content = session.client.files.content(session.earlier("file").id)
    same("bytes", content.read(), ROWS)
    same("text", content.text, ROWS.decode())


def files_wait_for_processing(session: Session) -> None:
    file = session.client.files.wait_for_processing(session.earlier("file").id, poll_interval=0.2, max_wait_seconds=30)
    is_a(file, FileObject)
    same("status", file.status, "processed")


def files_delete(session: Session) -> None:
    id = session.earlier("other").id
    deleted = session.client.files.delete(id)
    is_a(deleted, FileDeleted)
    same("answer", (deleted.id, deleted.object, deleted.deleted), (id, "file", True))
    holds("gone from the list", id not in [file.id for file in session.client.files.list()])


def files_delete_again(session: Session) -> None:
    id = session.earlier("other").id
    fails(openai.NotFoundError, lambda: session.client.files.delete(id), status_code=404)
    fails(openai.NotFoundError, lambda: session.client.files.retrieve(id), param="id")
    fails(openai.NotFoundError, lambda: session.client.files.content(id))


def files_create_not_jsonl(session: Session) -> None:
    create = session.client.files.create
    error = fails(openai.BadRequestError, lambda: create(file=("rows.txt", b"a,b"), purpose="fine-tune"), param="file")
    holds("the message says `.jsonl`", ".jsonl" in error.message, error.message)


def uploads_create(session: Session) -> None:
    upload = session.client.uploads.create(
        filename="parts.jsonl", purpose="fine-tune", bytes=len(ROWS), mime_type="application/jsonl"
    )
    is_a(upload, Upload)
    holds("id", upload.id.startswith("upload_"), upload.id)
    same("status", (upload.status, upload.file), ("pending", None))
    same("filename and bytes", (upload.filename, upload.bytes), ("parts.jsonl", len(ROWS)))
    same("expires an hour later", upload.expires_at - upload.created_at, 3600)
    session.made["upload"] = upload


def uploads_parts_create(session: Session) -> None:
    upload = session.earlier("upload")
    pieces = ROWS[:PART_BYTES], ROWS[PART_BYTES:]
    # The last part is sent first: the order is what `complete` says, not that of arrival.
    later, first = [session.client.uploads.parts.create(upload.id, data=data) for data in reversed(pieces)]
    is_a(first, UploadPart)
    holds("id", first.id.startswith("part_"), first.id)
    same("part", (first.object, first.upload_id), ("upload.part", upload.id))
    session.made["parts"] = [first.id, later.id]


def uploads_complete(session: Session) -> None:
    upload, parts = session.earlier("upload"), session.earlier("parts")
    done = session.client.uploads.complete(upload.id, part_ids=parts, md5=hashlib.md5(ROWS).hexdigest())
    is_a(done, Upload)
    same("status", (done.id, done.status), (upload.id, "completed"))
    is_a(done.file, FileObject)
    assert done.file is not None
    same("file", (done.file.filename, done.file.bytes, done.file.status), ("parts.jsonl", len(ROWS), "processed"))
    same("bytes", session.client.files.content(done.file.id).read(), ROWS)


def uploads_complete_wrong_md5(session: Session) -> None:
    uploads = session.client.uploads
    upload = uploads.create(filename="parts.jsonl", purpose="fine-tune", bytes=4, mime_type="application/jsonl")
    part = uploads.parts.create(upload.id, data=b"{}\n\n")
    fails(
        openai.BadRequestError,
        lambda: uploads.complete(upload.id, part_ids=[part.id], md5="0" * 32),
        param="md5",
    )
    session.made["unfinished upload"] = upload, part


def uploads_cancel(session: Session) -> None:
    upload, part = session.earlier("unfinished upload")
    cancelled = session.client.uploads.cancel(upload.id)
    is_a(cancelled, Upload)
    same("status", cancelled.status, "cancelled")
    complete = session.client.with_options(max_retries=0).uploads.complete
    fails(openai.ConflictError, lambda: complete(upload.id, part_ids=[part.id]), code="cancelled")


def uploads_upload_file_chunked(session: Session) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chunked.jsonl"
        path.write_bytes(ROWS)
        done = session.client.uploads.upload_file_chunked(
            file=path,
            mime_type="application/jsonl",
            purpose="fine-tune",
            part_size=PART_BYTES,
            md5=hashlib.md5(ROWS).hexdigest(),
        )
    same("status", done.status, "completed")
    assert done.file is not None
    same("file", (done.file.filename, done.file.bytes), ("chunked.jsonl", len(ROWS)))
    same("bytes", session.client.files.content(done.file.id).read(), ROWS)


def _ids(session: Session, *names: str) -> list[str]:
    return [session.earlier(name).id for name in names]
