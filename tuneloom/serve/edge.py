"""The HTTP edge: every failure becomes one OpenAI error object, every answer has OpenAI's headers, bodies have a limit.

No routes, no meaning of bodies.
"""

import logging
import math
import re
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneloom.config import GatewaySettings
from tuneloom.errors import InvalidRequest, NotFound, Overloaded, TooLarge, TuneloomError
from tuneloom.serve.guard import REQUEST_ID
from tuneloom.serve.limits_answer import HEADERS as RATE_LIMIT_HEADERS
from tuneloom.serve.sse import ClientGone
from tuneloom.store.base import BlobExists, BlobNotFound, StoreRefused

logger = logging.getLogger(__name__)

VERSION_HEADER = (b"openai-version", b"2020-10-01")
EXPOSED_HEADERS = (
    "x-request-id",
    "openai-version",
    "openai-processing-ms",
    "openai-organization",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    *RATE_LIMIT_HEADERS,
)
# Fields and boundaries of a multipart body, beside the file in it.
MULTIPART_SLACK = 1 << 20
CLIENT_CLOSED_REQUEST = 499
# Somebody has to put it right, which takes a while.
REFUSED_RETRY_AFTER_S = 30.0


def request_id(scope: Scope) -> str:
    return Headers(scope=scope).get(REQUEST_ID, "")


def as_tuneloom_error(error: Exception, request_id: str) -> TuneloomError:
    """The error to answer with. What nobody expected is logged here, once, and says only where to find it."""
    if isinstance(error, StoreRefused):
        logger.error("request failed: %s: %s", request_id, error.message)
        return Overloaded(
            f"The server cannot get at its store. Its operator finds the reason in the log, by the request id "
            f"{request_id}. Try again later.",
            retry_after_s=REFUSED_RETRY_AFTER_S,
        )
    # A blob's absence is ours to explain: the person asked for a file or a model, and its records were there.
    if isinstance(error, TuneloomError) and not isinstance(error, BlobNotFound | BlobExists):
        if error.status >= 500:
            logger.warning("request failed: %s %s: %s", request_id, type(error).__name__, error.message)
        return error
    logger.error("request failed unexpectedly: %s", request_id, exc_info=error)
    return TuneloomError(
        f"The server had an error while it worked on your request. Send it again; if it fails again, report the "
        f"request id {request_id}."
    )


def error_response(error: TuneloomError) -> JSONResponse:
    headers = {}
    if error.should_retry is not None:
        headers["x-should-retry"] = str(error.should_retry).lower()
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    retry_after_s = error.retry_after_s
    if retry_after_s is None and isinstance(error, Overloaded):
        retry_after_s = 1.0
    if retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(retry_after_s))
        headers["retry-after-ms"] = str(math.ceil(retry_after_s * 1000))
    return JSONResponse(error.body(), error.status, headers)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (unknown URL, wrong method) in OpenAI's form."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        answer: TuneloomError = NotFound(f"Unknown request URL: {where}. Check the path.", code="unknown_url")
    else:
        text = f"Not allowed: {where}. Check the method." if error.status_code == 405 else str(error.detail)
        answer = InvalidRequest(text, code="method_not_allowed" if error.status_code == 405 else None)
        answer.status = error.status_code
    response = error_response(answer)
    response.headers.update(error.headers or {})
    return response


class Edge:
    """ASGI: the one handler of errors, and the headers of every answer."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state, started, is_sent = scope.setdefault("state", {}), self._clock(), False

        async def send_with_headers(message: Message) -> None:
            nonlocal is_sent
            if message["type"] == "http.response.start":
                is_sent = True
                # Nobody below sets any of these, so that none has to be looked for.
                headers = {"openai-processing-ms": str(round((self._clock() - started) * 1000))}
                if principal := state.get("principal"):
                    headers["openai-organization"] = principal.owner
                if gate := state.get("gate"):
                    headers.update(gate.headers)
                encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
                message["headers"] = [*message.get("headers", ()), VERSION_HEADER, *encoded]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except (ClientGone, ClientDisconnect):
            await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send_with_headers)
        except Exception as error:
            answer = as_tuneloom_error(error, request_id(scope))
            if is_sent:
                # Too late for an answer. Only a connection that breaks off says that this one is not whole.
                raise
            await error_response(answer)(scope, receive, send_with_headers)


class BodyLimit:
    """ASGI: the most of a body that is ever read, refused while it arrives. Control has limits of its own below it."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._limits = (
            (re.compile(r"/v1/(?:.+/)?completions/?", re.DOTALL), settings.max_body_bytes),
            (re.compile(r".*", re.DOTALL), settings.max_file_bytes + MULTIPART_SLACK),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = next(limit for path, limit in self._limits if path.fullmatch(scope["path"]))
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
            raise _too_large(limit)
        seen = 0

        async def receive_up_to_limit() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, receive_up_to_limit, send)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"The body is larger than {limit} bytes, the most that this URL takes. Send less.")
