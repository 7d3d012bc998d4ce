"""Files and uploads as records and blobs: made, completed, deleted, swept. No HTTP.

Bytes go first and under keys made of our own ids, then the record; a deletion goes the other way round.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Iterable, Iterator
from typing import Literal

from tuneloom.control import audit
from tuneloom.domain import UNFINISHED, Actor, AuditTarget, File, Job, Upload, UploadPart
from tuneloom.errors import Conflict, InsufficientQuota, InvalidFile, InvalidRequest, NotFound, TooLarge
from tuneloom.rows import to_json_lines
from tuneloom.store import Store
from tuneloom.store.base import Create, StoreConflict, Write
from tuneloom.store.records import Records, Stored

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
UPLOAD_LIFE_S = 3600.0
BATCH_LIFE_S = 30 * 86400
EXPIRY_S = (3600, 30 * 86400)
CHUNK_BYTES = 1 << 20
_ENDINGS = {"fine-tune": (".jsonl", ".json", ".csv"), "batch": (".jsonl",)}
MAX_FILENAME = 255

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def find_file(records: Records, owner: str, id: str, at: float) -> Stored[File] | None:
    """An owner's file that has not expired."""
    stored = records.files.find(id)
    if stored is None or stored.value.owner != owner or is_expired(stored.value, at):
        return None
    return stored


def get_file(records: Records, owner: str, id: str) -> Stored[File]:
    stored = find_file(records, owner, id, time.time())
    if stored is None:
        raise NotFound(f"No such File object: {id[:200]}", param="id")
    return stored


def is_expired(file: File, at: float) -> bool:
    return file.expires_at is not None and file.expires_at <= at


def check_purpose(purpose: str, filename: str) -> str:
    if purpose not in PURPOSES:
        choices = ", ".join(f"`{name}`" for name in PURPOSES)
        raise InvalidRequest(f"Invalid `purpose`: {purpose[:40]!r}. Use one of {choices}.", param="purpose")
    endings = _ENDINGS.get(purpose)
    if endings is not None and not filename.lower().endswith(endings):
        raise InvalidRequest(
            f"The name {filename[-80:]!r} does not end in {', '.join(f'`{each}`' for each in endings)}, as the purpose "
            f"`{purpose}` asks for.",
            param="file",
            code="invalid_file_format",
        )
    return purpose


def rows_kind(file: File) -> Literal["csv", "json"] | None:
    """What has to be made JSON Lines of; None for what is stored as it comes."""
    if file.purpose != "fine-tune":
        return None
    name = file.filename.lower()
    return "csv" if name.endswith(".csv") else "json" if name.endswith(".json") else None


def put_bytes(store: Store, file: File, chunks: Iterable[bytes], *, max_bytes: int, timeout_s: float) -> File:
    """Store the bytes of a new file, training rows as JSON Lines; returns its record with their size and hash.

    Raises:
        InvalidFile: it is a CSV or JSON file with rows that are wrong, or so many that they take longer.
        TooLarge: as JSON Lines it has more than `max_bytes`.
    """
    kind = rows_kind(file)
    lines = chunks if kind is None else to_json_lines(_within(chunks, timeout_s), kind)
    size_bytes = 0

    def counted() -> Iterator[bytes]:
        nonlocal size_bytes
        for chunk in lines:
            size_bytes += len(chunk)
            if size_bytes > max_bytes:
                raise TooLarge(f"As JSON Lines the file is larger than {max_bytes:,} bytes. Split it.", param="file")
            yield chunk

    sha256 = store.blobs.write(file.blob, counted())
    return file.model_copy(update={"size_bytes": size_bytes, "sha256": sha256})


@contextlib.contextmanager
def dropped_if_refused(store: Store, blob: str) -> Iterator[None]:
    """Remove a blob whose record was refused. After any other failure the commit may have been made: it stays."""
    try:
        yield
    except (StoreConflict, InvalidRequest, InsufficientQuota):
        store.blobs.delete(blob)
        raise


def _within(chunks: Iterable[bytes], timeout_s: float) -> Iterator[bytes]:
    # A file of nothing but line ends has half a billion rows to look at.
    deadline = time.monotonic() + timeout_s
    for chunk in chunks:
        if time.monotonic() >= deadline:
            message = f"Reading its rows takes longer than {timeout_s:.0f} s. Split the file, or send JSON Lines."
            raise InvalidFile(message, param="file", code="invalid_file")
        yield chunk


def clean_filename(name: str) -> str:
    """The last part of a path of any system, without control characters. It is shown, and never opened."""
    last = _CONTROL.sub("", name).replace("\\", "/").rsplit("/", 1)[-1].strip()
    if last in ("", ".", ".."):
        raise InvalidRequest(f"Invalid `filename`: {name[:80]!r}. Use a plain file name.", param="file")
    return last[-MAX_FILENAME:]


def expiry(purpose: str, seconds: int | None, created_at: float) -> float | None:
    """When a file ends. Batch files do after 30 days unless told otherwise, others never."""
    if seconds is None:
        return created_at + BATCH_LIFE_S if purpose == "batch" else None
    return created_at + seconds


def check_expiry(anchor: object, seconds: object) -> int:
    if anchor != "created_at":
        raise InvalidRequest("Invalid `expires_after.anchor`. Use `created_at`.", param="expires_after.anchor")
    low, high = EXPIRY_S
    number = int(seconds) if isinstance(seconds, str) and seconds.isascii() and seconds.isdecimal() else seconds
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        raise InvalidRequest(
            f"Invalid `expires_after.seconds`. Use a whole number from {low} to {high}.", param="expires_after.seconds"
        )
    return number


def users_of(records: Records, owner: str, file_id: str) -> list[Job]:
    """The unfinished jobs that need a file."""
    return [
        stored.value
        for state in UNFINISHED
        for stored in records.jobs.query({"owner": owner, "state": state})
        if file_id in (stored.value.spec.training_file, stored.value.spec.validation_file)
    ]


def delete_file(store: Store, owner: str, id: str, actor: Actor | None = None) -> None:
    """Delete a file and its bytes.

    Raises:
        NotFound: no such file of this owner's.
        Conflict: an unfinished job needs it.
        StoreConflict: a job that needs it was created at this moment.
    """
    stored = get_file(store.records, owner, id)
    users = users_of(store.records, owner, id)
    if users:
        raise Conflict(
            f"The file `{id}` is used by the job `{users[0].id}`, which is `{users[0].state}`. "
            "Cancel the job or wait for its end.",
            code="file_in_use",
        )
    store.records.commit(store.records.files.delete(stored), told(actor or audit.cli_actor(), "deleted", stored.value))
    store.blobs.delete(stored.value.blob)


def told(actor: Actor, participle: str, file: File, **more: object) -> Create:
    """The entry of the audit log of what was done to a file."""
    target = AuditTarget(owner=file.owner, type="file", id=file.id, name=file.filename)
    data = {"purpose": file.purpose, "bytes": file.size_bytes, **more}
    return audit.entry(actor, f"file.{participle}", target, data)


def get_upload(records: Records, owner: str, id: str) -> Stored[Upload]:
    stored = records.uploads.find(id)
    if stored is None or stored.value.owner != owner:
        raise NotFound(f"No such Upload object: {id[:200]}", param="id")
    return stored


def status_of(upload: Upload, at: float) -> str:
    return "expired" if upload.status == "pending" and upload.expires_at <= at else upload.status


def get_pending(records: Records, owner: str, id: str) -> Stored[Upload]:
    """Raises Conflict, with the status as code, unless the upload is pending."""
    stored = get_upload(records, owner, id)
    status = status_of(stored.value, time.time())
    if status != "pending":
        raise Conflict(f"The upload `{id}` is {status}. Create a new upload.", code=status)
    return stored


def check_part(records: Records, upload: Upload, size_bytes: int, *, max_parts: int) -> None:
    """Refuse one more part, of so many bytes, that the upload could never use.

    Parts may have twice what was announced, since who lost the answer to one sends it again.
    """
    announced = upload.size_bytes
    if size_bytes > announced:
        raise InvalidRequest(
            f"The part has {size_bytes:,} bytes; the whole upload was announced with {announced:,}.", param="data"
        )
    parts = records.upload_parts.query({"upload_id": upload.id}, limit=max_parts)
    total = sum(part.value.size_bytes for part in parts) + size_bytes
    if len(parts) >= max_parts or total > 2 * announced:
        raise InvalidRequest(
            f"The upload has {len(parts):,} parts, and was announced with {announced:,} bytes. Its parts may be "
            f"{max_parts:,}, and have twice as many bytes together. Complete it, or cancel it and create a new one.",
            param="data",
        )


def parts_in_order(records: Records, upload: Upload, ids: Iterable[str]) -> list[UploadPart]:
    """The parts named by `ids`; one may come twice, since a retried part that was found again is one part."""
    parts = []
    for id in ids:
        stored = records.upload_parts.find(id)
        if stored is None or stored.value.upload_id != upload.id:
            raise InvalidRequest(f"The upload has no part `{id[:80]}`.", param="part_ids")
        parts.append(stored.value)
    total = sum(part.size_bytes for part in parts)
    if total != upload.size_bytes:
        raise InvalidRequest(
            f"The parts have {total:,} bytes together; the upload was announced with {upload.size_bytes:,}.",
            param="part_ids",
        )
    return parts


def join_parts(
    store: Store,
    upload: Upload,
    parts: list[UploadPart],
    md5: str | None,
    file_id: str,
    *,
    max_bytes: int,
    timeout_s: float,
) -> File:
    """Store the parts as one blob, as `put_bytes` does, and return the file's record, not stored yet."""
    digest = hashlib.md5(usedforsecurity=False)

    def chunks() -> Iterator[bytes]:
        for part in parts:
            with store.blobs.open(part.blob) as source:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    yield chunk

    now = time.time()
    file = File(
        id=file_id,
        owner=upload.owner,
        filename=upload.filename,
        purpose=upload.purpose,
        size_bytes=upload.size_bytes,
        sha256="",
        blob=f"files/{file_id}",
        created_at=now,
        expires_at=expiry(upload.purpose, upload.file_expires_after_s, now),
    )
    file = put_bytes(store, file, chunks(), max_bytes=max_bytes, timeout_s=timeout_s)
    if md5 is not None and digest.hexdigest() != md5.strip().lower():
        store.blobs.delete(file.blob)
        raise InvalidRequest("The bytes do not have the `md5` that was given. Upload them again.", param="md5")
    return file


def drop_parts(store: Store, upload_id: str) -> None:
    """Remove the parts of an upload that is over, records and bytes. Done again, it goes on where it stopped."""
    while parts := store.records.upload_parts.query({"upload_id": upload_id}, limit=100):
        # Bytes first here: the record is what finds them, and nobody reads the parts of an upload that is over.
        for part in parts:
            store.blobs.delete(part.value.blob)
        writes: list[Write] = [store.records.upload_parts.delete(part) for part in parts]
        store.records.commit(*writes)
