"""Requests under way whose key is revoked meanwhile: they end, as new ones are refused. No keys, no routes' meaning.

What streams and what waits for a model is cancelled, what sends a body is refused with its next piece; other requests
are over sooner than this looks.
"""

import asyncio
import copy
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneloom.errors import PermissionDenied, TuneloomError, Unauthenticated
from tuneloom.serve.limits_routes import cost_of
from tuneloom.serve.sse import DONE, event

logger = logging.getLogger(__name__)

# With what is remembered of keys, `gateway.key_cache_s`, this is how long a request outlives its key.
CHECK_S = 1.0
# An answer goes on after the hour of an ID token: what it was asked with was good.
OVER = ("expired_id_token", "expired_app_check_token")

Ask = Callable[[], Awaitable[Any]]


class _Request:
    """One request. `may_end`: cancelling it loses nothing but an answer. `error` is why it was cancelled."""

    def __init__(self, ask: Ask, *, may_end: bool) -> None:
        self.ask = ask
        self.may_end = may_end
        self.error: TuneloomError | None = None
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.asked_at = time.monotonic()

    async def check_if_due(self) -> None:
        if time.monotonic() - self.asked_at < CHECK_S:
            return
        self.asked_at = time.monotonic()
        if (error := await find_loss(self.ask)) is not None:
            raise error


class Standing:
    """Looks after the requests under way of one process, once a second; of those with one secret together."""

    def __init__(self) -> None:
        self._open: dict[_Request, str] = {}
        self._watching: asyncio.Task[None] | None = None

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, secret: str, ask: Ask) -> None:
        """Run `app` for a request with that secret, as long as `ask` does not refuse it."""
        request = _Request(ask, may_end=cost_of(scope["method"], scope["path"]) == "call")
        is_started = is_events = False

        async def receive_allowed() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                await request.check_if_due()
            return message

        async def send_allowed(message: Message) -> None:
            nonlocal is_started, is_events
            if message["type"] == "http.response.start":
                is_started = True
                is_events = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
            else:
                # An answer in pieces is a stream or a download; after the last one there is nothing to end.
                request.may_end = message.get("more_body", False)
            await send(message)

        cancelling = request.task.cancelling()
        self._open[request] = secret
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        try:
            await app(scope, receive_allowed, send_allowed)
        except asyncio.CancelledError:
            if request.error is None or request.task.cancelling() - 1 > cancelling:
                raise
            if not (is_started and is_events):
                # Of an answer that has begun, only a connection that breaks off says that it is not whole.
                raise request.error from None
            last = event(request.error.body()) + DONE
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            del self._open[request]
            if request.error is not None:
                request.task.uncancel()

    async def _watch(self) -> None:
        try:
            while self._open:
                await asyncio.sleep(CHECK_S)
                by_secret: dict[str, list[_Request]] = {}
                for request, secret in self._open.items():
                    if request.may_end and request.error is None:
                        by_secret.setdefault(secret, []).append(request)
                await asyncio.gather(*map(self._check, by_secret.values()))
        finally:
            self._watching = None

    async def _check(self, requests: list[_Request]) -> None:
        error = await find_loss(requests[0].ask)
        for request in requests if error is not None else ():
            if request.may_end and request in self._open:
                # Each its own: what is raised keeps where it was.
                request.error = copy.copy(error)
                request.task.cancel()


async def find_loss(ask: Ask) -> TuneloomError | None:
    """The error of a key or a person that is not welcome any more; None as well if that cannot be told now."""
    try:
        await ask()
    except (Unauthenticated, PermissionDenied) as error:
        return None if error.code in OVER else error
    except TuneloomError:
        pass
    except Exception:
        logger.exception("whether a key still holds could not be told")
    return None
