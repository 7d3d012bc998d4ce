"""Bodies of requests: JSON into checked models, multipart into spooled files, both within limits while they stream in.

What is wrong is named in OpenAI's manner: the dotted field in `param`, and what would be right.
"""

import hashlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from tuneloom.control import repeat
from tuneloom.errors import InvalidRequest, InvalidType, MissingParameter, TooLarge, UnknownParameter

CHUNK_BYTES = 1 << 20
# What a multipart body has besides the bytes of its files: boundaries, headers, short fields.
FORM_OVERHEAD_BYTES = 256 << 10
MAX_FIELD_BYTES = 64 << 10

M = TypeVar("M", bound=BaseModel)


class Body(BaseModel):
    """A JSON body: no field that we do not know, no value of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


async def read_json(request: Request, limit: int) -> bytes:
    """The raw body. Raises TooLarge as soon as it is over `limit` bytes, without reading on."""
    data = bytearray()
    async for chunk in _limited(request, limit, f"The body is larger than {size_text(limit)}."):
        data += chunk
    return bytes(data)


def parse(model: type[M], raw: bytes) -> M:
    """`raw` as a `model`.

    Raises:
        InvalidRequest: it is not JSON in UTF-8, or a field is missing, unknown or wrong; `param` names it.
    """
    try:
        return model.model_validate_json(raw or b"{}", strict=True)
    except ValidationError as error:
        raise explain(error) from error


def explain(error: ValidationError) -> InvalidRequest:
    """The first fault of a validation, as an error of the API."""
    return _explain(error.errors(include_url=False)[0])


def _explain(first: ErrorDetails) -> InvalidRequest:
    kind, message = first["type"], first["msg"]
    path = first["loc"]
    if len(path) > 1 and path[-1] in ("str", "int") and kind.endswith(("_type", "_from_float")):
        # The field may have either type, and this is which of them was tried.
        path = path[:-1]
    param = ".".join(str(part) for part in path) or None
    if kind == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON in UTF-8: {message.removeprefix('Invalid JSON: ')}.")
    if param is None:
        return InvalidType("The body is not a JSON object.")
    if kind == "missing":
        return MissingParameter(f"Missing required parameter: `{param}`.", param=param)
    if kind == "extra_forbidden":
        return UnknownParameter(f"Unknown parameter: `{param[:100]}`.", param=param[:100])
    message = message.partition(" after validation, not ")[0].replace("Dictionary", "Input")
    wrong = InvalidType if kind == "wrong_type" or kind.endswith(("_type", "_from_float")) else InvalidRequest
    return wrong(f"Invalid `{param}`: {message[0].lower()}{message[1:].rstrip('.')}.", param=param)


def auto_or(kind: type[int] | type[float], low: float, high: float, said: str) -> BeforeValidator:
    """A validator for `auto` or a number of `kind` from `low` to `high`; `said` tells people which."""

    def check(value: Any) -> Any:
        if value == "auto":
            return value
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            raise PydanticCustomError("wrong_type", "use `auto` or {said}", {"said": said})
        if not low <= value <= high:
            raise PydanticCustomError(
                "wrong_value", "{value} is out of range; use `auto` or {said}", {"value": value, "said": said}
            )
        return value

    return BeforeValidator(check)


@dataclass(frozen=True)
class Part:
    """A file of a multipart body, spooled to disk when large. Valid until the form is closed."""

    filename: str
    size_bytes: int
    file: BinaryIO

    def chunks(self) -> Iterator[bytes]:
        self.file.seek(0)
        while chunk := self.file.read(CHUNK_BYTES):
            yield chunk

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


@dataclass(frozen=True)
class Form:
    fields: dict[str, str]
    parts: dict[str, Part]

    def check_known(self, *names: str) -> None:
        for name in [*self.fields, *self.parts]:
            if name not in names:
                raise UnknownParameter(f"Unknown parameter: `{name[:100]}`.", param=name[:100])

    def part(self, name: str) -> Part:
        if name in self.fields:
            raise InvalidType(f"Invalid `{name}`: send a file part with a `filename`, not text.", param=name)
        if name not in self.parts:
            raise MissingParameter(f"Missing required parameter: `{name}`.", param=name)
        return self.parts[name]

    def field(self, name: str) -> str:
        if name not in self.fields:
            raise MissingParameter(f"Missing required parameter: `{name}`.", param=name)
        return self.fields[name]


@asynccontextmanager
async def read_form(request: Request, limit: int, *, max_files: int = 1) -> AsyncGenerator[Form]:
    """The multipart body, its files within `limit` bytes together; what was spooled is removed at the end.

    Raises:
        TooLarge: more came, or was announced. Nothing is read from there on.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise InvalidRequest("Send this request as `multipart/form-data`.")
    message = f"The file is larger than {size_text(limit)}, the most that is accepted in one request."
    stream = _limited(request, limit + FORM_OVERHEAD_BYTES, message)
    parser = MultiPartParser(request.headers, stream, max_files=max_files, max_fields=32, max_part_size=MAX_FIELD_BYTES)
    try:
        data = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"The multipart body cannot be read: {error.message}") from error
    try:
        form = _to_form(data)
        if sum(part.size_bytes for part in form.parts.values()) > limit:
            raise TooLarge(message)
        yield form
    finally:
        await data.close()


def identify(request: Request, owner: str, body_sha256: str) -> repeat.Request:
    """What makes a create safe to repeat; see `control.repeat`."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= 255:
        raise InvalidRequest("`Idempotency-Key` has 1 to 255 characters.")
    return repeat.Request(
        owner=owner,
        route=f"{request.method} {request.url.path}",
        body_sha256=body_sha256,
        arrived_at=request.state.arrived_at,
        retry_count=retry_count(request),
        key=key,
    )


def retry_count(request: Request) -> int:
    text = request.headers.get("x-stainless-retry-count", "0")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 4 else 0


def size_text(size_bytes: int) -> str:
    """A size for people: `512 MB` where it is whole megabytes, else bytes."""
    megabytes, rest = divmod(size_bytes, 1 << 20)
    return f"{megabytes:,} MB" if megabytes and not rest else f"{size_bytes:,} bytes"


def digest(*parts: str | bytes) -> str:
    """One sha256 over several parts, each with its length, so that no two lists of parts look the same."""
    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode(errors="surrogatepass")
        total.update(f"{len(data)}:".encode())
        total.update(data)
    return total.hexdigest()


async def _limited(request: Request, limit: int, message: str) -> AsyncGenerator[bytes]:
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdecimal() and int(announced[:20]) > limit:
        raise TooLarge(message)
    total = 0
    try:
        async for chunk in request.stream():
            total += len(chunk)
            if total > limit:
                raise TooLarge(message)
            yield chunk
    except ClientDisconnect as error:
        raise InvalidRequest("The body ended before it was whole.") from error


def _to_form(data: FormData) -> Form:
    fields: dict[str, str] = {}
    parts: dict[str, Part] = {}
    for name, value in data.multi_items():
        if name in fields or name in parts:
            raise InvalidRequest(f"`{name[:100]}` is given twice.", param=name[:100])
        if isinstance(value, UploadFile):
            parts[name] = Part(value.filename or "", value.size or 0, value.file)
        else:
            fields[name] = value
    return Form(fields, parts)
