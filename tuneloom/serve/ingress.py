"""The HTTP service as one Starlette application: what each URL does, in which order. No Ray, no torch.

A generation goes: key -> Principal -> body -> Call -> Target -> frames of a base -> OpenAI's objects.
"""

import asyncio
import functools
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.config import Pepper, Settings
from tuneloom.control.api import ApiContext
from tuneloom.control.api import routes as control_routes
from tuneloom.domain import Principal, Target
from tuneloom.errors import InvalidRequest, TuneloomError
from tuneloom.generation import Finished, Frame, GenerationRequest
from tuneloom.serve import edge, sse
from tuneloom.serve.answers import Answer, ChatAnswer, CompletionAnswer
from tuneloom.serve.api_bases import BasesApi
from tuneloom.serve.api_limits import OwnLimitsApi
from tuneloom.serve.auth import Authentication, SignIn
from tuneloom.serve.body import parse_object
from tuneloom.serve.flow import ApplicationEnd
from tuneloom.serve.guard import Guard
from tuneloom.serve.keys import Keys
from tuneloom.serve.limits import Gate, Limits
from tuneloom.serve.limits_middleware import Limited, WrongKeys
from tuneloom.serve.openai import Call, parse_chat, parse_completion
from tuneloom.serve.reads import Reads
from tuneloom.serve.resolve import Resolver
from tuneloom.serve.upstream import BaseHandle, Bases, collect, frames
from tuneloom.store import Store

READY_TIMEOUT_S = 3.0
# The store among what is asked, beside ids of bases.
STORE = "store"
# For a base that has to be started: without a wish of the client, and at most.
START_WAIT_S, MAX_WAIT_S = 0.5, 600.0
_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?:[,;]|$)", re.IGNORECASE)
BODY_TIMEOUT_S = 120.0
# A larger body is parsed in a thread, so that it holds up nobody else.
LARGE_BODY_BYTES = 256 << 10


@dataclass(frozen=True)
class Context:
    """What the application works with. `bases` finds a base by id; `poke` wakes the control loop and never fails.

    `people` is there if they sign in. `watch_limits` hears whether all gateways count limits together.
    """

    settings: Settings
    store: Store
    pepper: Pepper
    bases: Bases
    poke: Callable[[], None]
    people: SignIn | None = None
    watch_limits: Callable[[bool], None] = lambda is_shared: None


@dataclass(frozen=True)
class Dialect:
    """One of OpenAI's two ways to ask for text."""

    parse: Callable[[dict[str, Any], str | None], Call]
    answer: Callable[[Call, Target], Answer]


CHAT = Dialect(parse_chat, ChatAnswer)
COMPLETION = Dialect(parse_completion, CompletionAnswer)


def make_app(context: Context) -> Starlette:
    gateway, records = context.settings.gateway, context.store.records
    reads = Reads(gateway.store_wait_s)
    keys = Keys(records, context.pepper, reads, cache_s=gateway.key_cache_s, stale_s=gateway.stale_s)
    limits = Limits(context.settings, records, reads, watch=context.watch_limits)
    service = _Service(context, reads)
    chat, completion = (functools.partial(service.generate, dialect) for dialect in (CHAT, COMPLETION))
    control = ApiContext(context.settings, context.store, context.pepper, context.poke, keys.forget)
    return Starlette(
        routes=[
            Route("/healthz", service.live),
            Route("/readyz", service.ready),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
            *control_routes(control),
            *BasesApi(control, context.bases).routes(),
            *OwnLimitsApi(limits).routes(),
            # A model's name may hold slashes, so these come after everything that has a URL of its own.
            Route("/v1/{model:path}/chat/completions", chat, methods=["POST"]),
            Route("/v1/{model:path}/completions", completion, methods=["POST"]),
            Route("/v1/{model:path}/models", service.models_of),
        ],
        middleware=[
            Middleware(ApplicationEnd),
            Middleware(Guard),
            Middleware(
                CORSMiddleware,
                allow_origins=list(gateway.cors_origins),
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=edge.EXPOSED_HEADERS,
            ),
            Middleware(edge.Edge),
            Middleware(edge.BodyLimit, settings=gateway),
            Middleware(WrongKeys, limits=limits),
            Middleware(Authentication, keys=keys, people=context.people),
            Middleware(Limited, limits=limits),
        ],
        exception_handlers={HTTPException: edge.answer_http_exception},
    )


class _Service:
    def __init__(self, context: Context, reads: Reads) -> None:
        self._context = context
        self._reads = reads
        settings = context.settings
        self._resolver = Resolver(
            context.store.records,
            frozenset(base.id for base in settings.bases),
            settings.base_aliases,
            reads,
            stale_s=settings.gateway.stale_s,
        )

    async def generate(self, dialect: Dialect, request: Request) -> Response:
        """Parse, resolve, then relay: the status goes out when the base has accepted the request, not before."""
        principal: Principal = request.state.principal
        principal.require("inference")
        call = await _read_call(dialect, request)
        target = await self._resolver.resolve(call.model, principal)
        work = GenerationRequest(
            id=edge.request_id(request.scope),
            prompts=call.prompts,
            params=call.params,
            owner=principal.owner,
            adapter=target.adapter,
            echo=call.echo,
            deadline_s=self._context.settings.gateway.request_timeout_s,
            is_streamed=call.stream,
            priority=call.priority,
            response_format=call.response_format,
            key_id=principal.key_id,
            model=target.stable_name,
        )
        answer = dialect.answer(call, target)
        gate: Gate = request.state.gate
        bases = (await gate.admit(call, target)).watch(self._context.bases)
        await sse.until_disconnect(request.receive, self._context.bases(target.base).wake(_patience(request)))
        if not call.stream:
            whole = await sse.until_disconnect(request.receive, collect(bases, target, work))
            return JSONResponse(answer.whole(whole))
        stream = frames(bases, target, work)
        try:
            await sse.until_disconnect(request.receive, anext(stream))
        except BaseException:
            await stream.aclose()
            raise
        describe = functools.partial(_describe, edge.request_id(request.scope))
        return sse.EventStream(sse.with_heartbeats(sse.guarded(_events(answer, stream), describe)))

    async def models_of(self, request: Request) -> Response:
        """The list for a client whose base URL is that of one model: that model."""
        name = request.path_params["model"]
        target = await self._resolver.resolve(name, request.state.principal)
        entry = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": request.state.principal.owner if target.adapter else "tuneloom",
            "root": target.base,
            "parent": target.base if target.adapter else None,
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def live(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 if every base answers now; else 503 and which do not. A cold base is as it should be.

        Without the store it is `degraded` for as long as keys and models that were read before still count: taking all
        gateways out at once would end what goes on without the store.
        """
        ids = [base.id for base in self._context.settings.bases]
        find = functools.partial(self._context.store.records.keys.find, "key_none")
        checks = {
            STORE: self._reads.read(find, has_older=False),
            **{base_id: _ask(self._context.bases(base_id)) for base_id in ids},
        }
        results = await asyncio.gather(*(_is_answered(check) for check in checks.values()))
        failing = sorted(name for name, is_ok in zip(checks, results, strict=True) if not is_ok)
        if failing == [STORE] and self._reads.silent_s <= self._context.settings.gateway.stale_s:
            return JSONResponse({"status": "degraded", "failing": failing})
        if failing:
            return JSONResponse({"status": "not ready", "failing": failing}, 503, {"retry-after": "1"})
        warning = self._context.people.warning() if self._context.people else None
        return JSONResponse({"status": "ok", **({"warning": warning} if warning else {})})


async def _read_call(dialect: Dialect, request: Request) -> Call:
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            raw = await request.body()
    except TimeoutError:
        error = InvalidRequest(f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s. Send it again.")
        error.status = 408
        raise error from None
    model = request.path_params.get("model")
    if len(raw) > LARGE_BODY_BYTES:
        return await anyio.to_thread.run_sync(lambda: dialect.parse(parse_object(raw), model))
    return dialect.parse(parse_object(raw), model)


async def _events(answer: Answer, stream: AsyncGenerator[Frame, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(stream):
        for chunk in answer.opening():
            yield sse.event(chunk)
        async for frame in stream:
            if isinstance(frame, Finished):
                for chunk in answer.closing(frame.usage):
                    yield sse.event(chunk)
            elif isinstance(frame, list):
                for delta in frame:
                    for chunk in answer.chunks(delta):
                        yield sse.event(chunk)


def _describe(request_id: str, error: Exception) -> Mapping[str, Any]:
    return edge.as_tuneloom_error(error, request_id).body()


def _patience(request: Request) -> float:
    """How long the client waits for a base that has to be started: by `Prefer: wait=SECONDS` (RFC 7240)."""
    wished = _WAIT.search(", ".join(request.headers.getlist("prefer")))
    return min(float(wished[1]), MAX_WAIT_S) if wished else START_WAIT_S


async def _ask(base: BaseHandle) -> None:
    if not await base.is_cold():
        await base.stats()


async def _is_answered(check: Any) -> bool:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await check
    except (TimeoutError, TuneloomError, OSError):
        return False
    except Exception:
        edge.logger.exception("a readiness check failed unexpectedly")
        return False
    return True
