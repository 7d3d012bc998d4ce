"""Rows of files on the wire: looked at, edited into a new file, and given out in other formats."""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tuneloom.control import audit, files, owner_limits, repeat
from tuneloom.control.api_files import show_file
from tuneloom.control.body import Body, digest, identify, parse, read_json
from tuneloom.control.context import FileRoutes, caller, in_thread, query_choice, query_int
from tuneloom.domain import Actor, AuditTarget, File, new_id
from tuneloom.errors import InvalidFile, InvalidRequest, NotFound
from tuneloom.rows import Appended, Edit, NewRow, SeenRow, export, plan_export, read_page
from tuneloom.rows.convert import joined
from tuneloom.store import Store
from tuneloom.store.base import BlobNotFound, Write

MAX_PAGE = 1000
PAGE_BYTES = 4 << 20
MAX_OPERATIONS = 1000
MAX_PROBLEMS_SHOWN = 20
_KIND = re.compile(r"(operations\.\d+)\.(?:replace|delete|insert|append)\b")
MEDIA_TYPES = {"jsonl": "application/jsonl", "json": "application/json", "csv": "text/csv; charset=utf-8"}

RowNumber = Annotated[int, Field(ge=1)]
RowData = dict[str, Any]


class Replace(Body):
    op: Literal["replace"]
    row: RowNumber
    data: RowData


class Delete(Body):
    op: Literal["delete"]
    rows: list[RowNumber] = Field(min_length=1)


class Insert(Body):
    op: Literal["insert"]
    before: RowNumber
    rows: list[RowData] = Field(min_length=1)


class Append(Body):
    """Rows, or the rows of another file."""

    op: Literal["append"]
    rows: list[RowData] | None = Field(None, min_length=1)
    file: str | None = None


Operation = Annotated[Replace | Delete | Insert | Append, Field(discriminator="op")]


class EditFile(Body):
    operations: list[Operation] = Field(min_length=1, max_length=MAX_OPERATIONS)
    filename: str | None = None


class RowsApi(FileRoutes):
    def routes(self) -> list[Route]:
        return [
            Route("/v1/tuneloom/files/{id}", self.show, methods=["GET"]),
            Route("/v1/tuneloom/files/{id}/rows", self.rows, methods=["GET"]),
            Route("/v1/tuneloom/files/{id}/edit", self.edit, methods=["POST"]),
            Route("/v1/tuneloom/files/{id}/export", self.export, methods=["GET"]),
        ]

    async def show(self, request: Request) -> Response:
        """The file as OpenAI shows it, and where its rows are from."""
        owner, id = caller(request, "training").owner, request.path_params["id"]
        file = (await in_thread(files.get_file, self._records, owner, id)).value
        return JSONResponse({**show_file(file), "sha256": file.sha256, "provenance": file.provenance})

    async def rows(self, request: Request) -> Response:
        page = await in_thread(self._rows, request, caller(request, "training").owner)
        return Response(page, media_type="application/json")

    def _rows(self, request: Request, owner: str) -> str:
        after = query_int(request, "after", 0, 0, 999_999_999)
        limit = query_int(request, "limit", 100, 1, MAX_PAGE)
        file = get_rows_file(self._store, owner, request.path_params["id"], "id")
        with contextlib.closing(self._open(file)) as source:
            page = read_page(source, after=after, limit=limit, max_bytes=PAGE_BYTES)
        last = page.rows[-1].number if page.rows else None
        end = json.dumps({"last_row": last, "has_more": page.has_more})
        start = json.dumps({"object": "list", "format": page.format})
        # A row stands there as it is stored: a number that is read may not be written again as it was.
        return f'{start[:-1]}, "data": [{", ".join(map(_show_row, page.rows))}], {end[1:]}'

    async def edit(self, request: Request) -> Response:
        owner = caller(request, "training").owner
        raw = await read_json(request, self._limits.max_body_bytes)
        return JSONResponse(await in_thread(self._edit, request, owner, raw))

    def _edit(self, request: Request, owner: str, raw: bytes) -> dict[str, Any]:
        body = _read_edit(raw)
        base = get_rows_file(self._store, owner, request.path_params["id"], "id")
        name = str(PurePosixPath(base.filename).with_suffix(".jsonl"))
        filename = files.clean_filename(name if body.filename is None else body.filename)
        if not filename.lower().endswith(".jsonl"):
            raise InvalidRequest(
                "Invalid `filename`: an edited file is JSON Lines and ends in `.jsonl`.", param="filename"
            )
        asked = identify(request, owner, digest(base.id, raw))
        id = new_id("file-")
        with contextlib.ExitStack() as opened:
            source = opened.enter_context(contextlib.closing(self._open(base)))
            edit = Edit()
            sources = [self._note(edit, owner, index, each, opened) for index, each in enumerate(body.operations)]
            now = time.time()
            file = File(
                id=id,
                owner=owner,
                filename=filename,
                purpose="fine-tune",
                size_bytes=0,
                sha256="",
                blob=f"files/{id}",
                created_at=now,
            )
            lines = joined(edit.lines(source))
            file = files.put_bytes(
                self._store, file, lines, max_bytes=self._limits.max_file_bytes, timeout_s=self._timeout_s
            )
        file = file.model_copy(update={"provenance": _provenance(base, edit, sources, now)})

        def make() -> tuple[str, File, list[Write]]:
            owner_limits.check_room(self._settings, self._records, caller(request), file.size_bytes)
            data = {"from": base.id, "operations": len(body.operations), "bytes": file.size_bytes}
            target = AuditTarget(owner=owner, type="file", id=id, name=file.filename)
            entry = audit.entry(audit.actor_of(request), "file.edited", target, data)
            return id, file, [self._records.files.create(file), entry]

        with files.dropped_if_refused(self._store, file.blob):
            kept = repeat.create_once(
                self._records,
                asked,
                make,
                lambda found: files.get_file(self._records, owner, found).value,
            )
        if kept.id != id:
            self._store.blobs.delete(file.blob)
        problems = [{"row": p.line, "field": p.field, "message": p.message} for p in edit.scan.problems]
        return {
            **show_file(kept),
            "provenance": kept.provenance,
            "rows": edit.scan.num_rows,
            "problem_count": edit.scan.problem_count,
            "problems": problems[:MAX_PROBLEMS_SHOWN],
        }

    def _note(
        self, edit: Edit, owner: str, index: int, operation: Operation, opened: contextlib.ExitStack
    ) -> str | None:
        """Put one operation into `edit`; returns the id of the file that it appends, if it does."""
        param = f"operations.{index}"
        if isinstance(operation, Replace):
            edit.replace(operation.row, NewRow(f"{param}.data", operation.data))
        elif isinstance(operation, Delete):
            for number in operation.rows:
                edit.delete(number, f"{param}.rows")
        elif isinstance(operation, Insert):
            edit.insert(operation.before, _new_rows(param, operation.rows))
        elif (operation.rows is None) == (operation.file is None):
            raise InvalidRequest(f"Invalid `{param}`: an `append` has either `rows` or `file`.", param=param)
        elif operation.rows is not None:
            edit.appended += _new_rows(param, operation.rows)
        elif operation.file is not None:
            other = get_rows_file(self._store, owner, operation.file, f"{param}.file")
            edit.appended.append(Appended(f"{param}.file", opened.enter_context(contextlib.closing(self._open(other)))))
            return other.id
        return None

    async def export(self, request: Request) -> Response:
        owner, id = caller(request, "training").owner, request.path_params["id"]
        kind = query_choice(request, "format", "jsonl", tuple(MEDIA_TYPES))
        chunks = await in_thread(self._export, owner, id, kind, audit.actor_of(request))
        headers = {"content-disposition": f'attachment; filename="{id}.{kind}"'}
        return StreamingResponse(chunks, media_type=MEDIA_TYPES[kind], headers=headers)

    def _export(self, owner: str, id: str, kind: str, actor: Actor) -> Iterator[bytes]:
        file = get_rows_file(self._store, owner, id, "id")
        columns = None
        if kind == "json" or kind == "csv":
            with contextlib.closing(self._open(file)) as source:
                columns = plan_export(source, kind)
        self._records.commit(files.told(actor, "downloaded", file, format=kind))
        source = self._open_blob(file)
        return _chunks(source) if columns is None else export(source, kind, columns)

    def _open(self, file: File) -> BinaryIO:
        return _Timed(self._open_blob(file), self._timeout_s)  # type: ignore[return-value]

    def _open_blob(self, file: File) -> BinaryIO:
        try:
            return self._store.blobs.open(file.blob)
        except BlobNotFound as error:
            # Deleted between the two reads.
            raise NotFound(f"No such File object: {file.id}", param="id") from error


class _Timed:
    """A file whose reading ends in time: of rows, there may be half a billion."""

    def __init__(self, file: BinaryIO, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._timeout_s = timeout_s
        self._clock = clock
        self._until = clock() + timeout_s
        self.read, self.seek, self.close = file.read, file.seek, file.close

    def readline(self, size: int = -1) -> bytes:
        if self._clock() > self._until:
            raise InvalidFile(
                f"Reading its rows takes longer than {self._timeout_s:.0f} s. Split the file.", param="id"
            )
        return self._file.readline(size)


def get_rows_file(store: Store, owner: str, id: str, param: str) -> File:
    """A training file of this owner's. Raises NotFound, or InvalidFile if it holds no training rows."""
    found = files.find_file(store.records, owner, id, time.time())
    if found is None:
        raise NotFound(f"No such File object: {id[:200]}", param=param)
    if found.value.purpose != "fine-tune":
        raise InvalidFile(
            f"The file `{id}` has the purpose `{found.value.purpose}`; only those of `fine-tune` hold rows.",
            param=param,
        )
    return found.value


def _read_edit(raw: bytes) -> EditFile:
    try:
        return parse(EditFile, raw)
    except InvalidRequest as error:
        # Pydantic puts the kind of an operation between its number and the field.
        error.message, error.param = (_KIND.sub(r"\1", text) if text else text for text in (error.message, error.param))
        raise


def _show_row(seen: SeenRow) -> str:
    problems = [{"field": problem.field, "message": problem.message} for problem in seen.problems]
    start = json.dumps({"row": seen.number, "line": seen.line, "problems": problems})
    return f'{start[:-1]}, "data": {seen.json or "null"}}}'


def _new_rows(param: str, rows: list[RowData]) -> list[NewRow]:
    return [NewRow(f"{param}.rows.{index}", data) for index, data in enumerate(rows)]


def _provenance(base: File, edit: Edit, sources: list[str | None], at: float) -> dict[str, Any]:
    """`origin` is what is known of the first file of a chain of edits, since a file in between may be deleted."""
    before = base.provenance or {}
    return {
        "kind": "edit",
        "file": base.id,
        "sha256": base.sha256,
        "appended_files": [source for source in sources if source is not None],
        "rows": edit.counts,
        "created_at": at,
        "origin": before.get("origin") or (before or None),
    }


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with contextlib.closing(file):
        while chunk := file.read(files.CHUNK_BYTES):
            yield chunk
