"""The first thing a request meets: its id, the headers by which clients could steer Ray Serve, and the end of streams
whose server died. No auth, no routes.

Serve's own HTTP proxy reads some request headers before any application sees them, and it outlives the applications.
`proxy_middlewares` puts the guard there; the application has it too, for servers without that proxy.
"""

import asyncio
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneloom.domain import new_id
from tuneloom.errors import InvalidRequest, Overloaded
from tuneloom.serve.flow import ConnectionEnd
from tuneloom.serve.sse import DONE, event

# For the processes of the cluster: Serve's proxy reads it when it starts.
PROXY_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "tuneloom.serve.guard.proxy_middlewares",
    # By default uvicorn believes the `X-Forwarded-For` of whoever calls from this machine; whom we believe is said by
    # `limits.trusted_proxies`.
    "FORWARDED_ALLOW_IPS": "",
}
REQUEST_ID = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

# With these a client could take away a request's time limit, or its end when the client leaves.
FORBIDDEN = frozenset({"x_request_timeout_seconds", "x_request_disconnect_disabled"})
# With these a client could choose the replica. Serve reads `-` and `_` alike.
STRIPPED = frozenset({"serve_multiplexed_model_id", "x_session_id"})

# The empty line ends what may have been cut off.
BROKEN_STREAM = (
    b"\n\n"
    + event(
        Overloaded(
            "The stream broke off because its server was lost. Send the request again.", code="stream_interrupted"
        ).body()
    )
    + DONE
)


class Guard:
    """ASGI: gives a request a sound id, drops or refuses Serve's control headers, answers with exactly one id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get(REQUEST_ID, "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = new_id("req_")
        kept, forbidden = [], None
        for name, value in scope["headers"]:
            key = name.decode("latin-1").lower().replace("-", "_")
            if key in FORBIDDEN:
                forbidden = name.decode("latin-1")
            elif key not in STRIPPED and key != "x_request_id":
                kept.append((name, value))
        scope = {**scope, "headers": [*kept, (REQUEST_ID.encode(), request_id.encode())]}

        is_open_stream = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_open_stream
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
                is_open_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
            elif not message.get("more_body", False):
                is_open_stream = False
            await send(message)

        if forbidden is not None:
            error = InvalidRequest(f"The header `{forbidden}` is not accepted. Leave it out.")
            await JSONResponse(error.body(), error.status)(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            is_open_stream = False
            raise
        finally:
            # Serve's proxy ends the stream of a replica that died without a word, which a client takes for a network
            # fault.
            if is_open_stream:
                await send({"type": "http.response.body", "body": BROKEN_STREAM, "more_body": False})


def proxy_middlewares() -> list[Middleware]:
    """What Serve's HTTP proxy runs around every request, by `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`."""
    # The last is the outermost: bodies are counted where they come in.
    return [Middleware(Guard), Middleware(ConnectionEnd)]
