"""From the ingress to a base's replicas: handles, time limits, one repetition after a replica's death. No HTTP, no text.

A generation is safe to repeat as long as nothing of it was shown to anyone. What Ray raises becomes ours here.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

import anyio.to_thread
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, RayServeException, ReplicaUnavailableError

from tuneloom.bases import slug
from tuneloom.domain import Target
from tuneloom.engine.base import EngineStats
from tuneloom.errors import ModelNotFound, Overloaded, TuneloomError
from tuneloom.generation import Frame, GenerationRequest, Started
from tuneloom.store.base import BlobNotFound

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
RESTART_TIMEOUT_S = 45.0
RESTART_PAUSE_S = 0.5
RETRY_AFTER_S = 5.0


class ReplicaLost(Overloaded):
    """The replica died or went away under the request."""


class BaseHandle(Protocol):
    """One base, wherever its replicas run."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Frame, None]:
        """Frames, first `Started`. Closing it ends the generation. Raises ReplicaLost, TuneloomError."""
        ...

    async def stats(self) -> EngineStats: ...


Bases = Callable[[str], BaseHandle]


class ServeBase:
    """A base by its Serve application. The handle is found at the first use and kept; it follows its replicas."""

    def __init__(self, base_id: str) -> None:
        self._base_id = base_id
        self._handle: Any = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Frame, None]:
        handle = await self._find()
        # A bare base carries no affinity: with one, all its traffic would stick to a single replica.
        affinity = {"session_id": request.adapter.sha256} if request.adapter else {}
        response = handle.options(stream=True, **affinity).generate.remote(request)
        is_open = True
        try:
            async for frame in response:
                yield frame
            is_open = False
        except asyncio.CancelledError:
            # Ray raises this too when the replica's side of the call was cancelled, as by a shutdown.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise _lost(self._base_id) from None
        except (RayError, RayServeException) as error:
            is_open = False
            raise as_our_error(error, self._base_id) from error
        finally:
            if is_open:
                response.cancel()

    async def stats(self) -> EngineStats:
        handle = await self._find()
        try:
            return await handle.stats.remote()
        except (RayError, RayServeException) as error:
            raise as_our_error(error, self._base_id) from error

    async def _find(self) -> Any:
        if self._handle is None:
            try:
                self._handle = await anyio.to_thread.run_sync(serve.get_app_handle, f"base-{slug(self._base_id)}")
            except (RayServeException, RayError) as error:
                raise Overloaded(
                    f"The base `{self._base_id}` is not running. Try again later.", retry_after_s=RETRY_AFTER_S
                ) from error
        return self._handle


def serve_bases() -> Bases:
    """Bases by id, one handle each for the life of the process."""
    known: dict[str, ServeBase] = {}
    return lambda base_id: known.setdefault(base_id, ServeBase(base_id))


def as_our_error(error: BaseException, base_id: str) -> TuneloomError:
    """What an error of Ray means to the caller of a base."""
    if isinstance(error, RayTaskError):
        # Raised inside the replica: the cause is what it raised.
        cause = error.cause
        if isinstance(cause, TuneloomError):
            return cause
        if isinstance(cause, RayActorError | WorkerCrashedError):
            return _lost(base_id)
        logger.error("the replica of %s failed: %s", base_id, error)
        return TuneloomError(f"The base `{base_id}` failed on this request. Send it again.")
    if isinstance(error, BackPressureError):
        return Overloaded(f"Too many requests wait for the base `{base_id}`. Try again later.", retry_after_s=1.0)
    if isinstance(error, RayActorError | WorkerCrashedError | ReplicaUnavailableError):
        return _lost(base_id)
    logger.error("the base %s cannot be reached: %s", base_id, error)
    return Overloaded(f"The base `{base_id}` cannot be reached. Try again later.", retry_after_s=RETRY_AFTER_S)


async def frames(bases: Bases, target: Target, request: GenerationRequest) -> AsyncGenerator[Frame, None]:
    """The frames of one call, `Started` once. Repeated once on another replica if one is lost before the first text.

    Raises:
        Overloaded: the base does not answer in time, or was lost in the middle.
        TuneloomError: what the replica says of the request.
    """
    deadline = time.monotonic() + request.deadline_s
    has_started = False
    for start_s in (START_TIMEOUT_S, RESTART_TIMEOUT_S):
        has_text = False
        try:
            async with aclosing(_attempt(bases, target, request, deadline, start_s)) as attempt:
                async for frame in attempt:
                    has_text = has_text or isinstance(frame, list)
                    if not isinstance(frame, Started) or not has_started:
                        has_started = True
                        yield frame
            return
        except ReplicaLost as error:
            if has_text or start_s == RESTART_TIMEOUT_S:
                raise
            await _before_repetition(request, error)


async def collect(bases: Bases, target: Target, request: GenerationRequest) -> list[Frame]:
    """All frames of one call. Nothing of it was shown when a replica is lost, so it is repeated, once."""
    deadline = time.monotonic() + request.deadline_s
    try:
        return [frame async for frame in _attempt(bases, target, request, deadline, START_TIMEOUT_S)]
    except ReplicaLost as error:
        await _before_repetition(request, error)
    return [frame async for frame in _attempt(bases, target, request, deadline, RESTART_TIMEOUT_S)]


async def _attempt(
    bases: Bases, target: Target, request: GenerationRequest, deadline: float, start_s: float
) -> AsyncGenerator[Frame, None]:
    """One attempt, each wait within the time that is left for it."""
    now = time.monotonic()
    limit = min(deadline, now + start_s)
    attempt = dataclasses.replace(request, deadline_s=max(deadline - now, 0.0))
    async with aclosing(bases(target.base).generate(attempt)) as stream:
        while True:
            try:
                async with asyncio.timeout(max(limit - time.monotonic(), 0)):
                    frame = await anext(stream, None)
            except TimeoutError:
                raise _late(request, limit >= deadline) from None
            except BlobNotFound as error:
                # The model was deleted between the door and the engine.
                raise ModelNotFound.named(target.name) from error
            if frame is None:
                return
            yield frame
            limit = deadline


async def _before_repetition(request: GenerationRequest, error: ReplicaLost) -> None:
    logger.warning("repeating %s: %s", request.id, error.message)
    await asyncio.sleep(RESTART_PAUSE_S)


def _late(request: GenerationRequest, is_whole: bool) -> Overloaded:
    if not is_whole:
        return Overloaded("The model does not start answering. Try again later.", retry_after_s=RETRY_AFTER_S)
    error = Overloaded(f"The answer took longer than {request.deadline_s:.0f} s. Ask for less, or stream it.")
    # It would take as long again.
    error.should_retry = False
    return error


def _lost(base_id: str) -> ReplicaLost:
    return ReplicaLost(
        f"The process that served the base `{base_id}` ended in the middle of the request. Send it again.",
        retry_after_s=RETRY_AFTER_S,
    )
