"""The calls of bases: their time limits, and one repetition after a replica's death. No HTTP, no Ray.

A generation is safe to repeat as long as nothing of it was shown to anyone.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

from tuneloom.domain import Target
from tuneloom.engine.base import EngineStats
from tuneloom.errors import ModelNotFound, Overloaded, TuneloomError
from tuneloom.generation import Finished, Frame, GenerationRequest, Started
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

    async def wake(self, wait_s: float) -> None:
        """Return when it takes requests: at once, but for a base that has no replica while nobody asks.

        Raises:
            Overloaded: it does not within `wait_s`; it is on its way, and the error says when to come back.
        """
        ...

    async def is_cold(self) -> bool:
        """Whether it has no replica because nobody asks. Looking does not start one."""
        ...

    async def on_each_replica(
        self, method: str, *arguments: Any, timeout_s: float = 60.0
    ) -> "dict[str, Any | TuneloomError]":
        """What a method of `Base` returns, or raises of ours, on every running replica, by the replica's id."""
        ...


Bases = Callable[[str], BaseHandle]


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
    is_finished = False
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
                break
            is_finished = isinstance(frame, Finished)
            yield frame
            limit = deadline
    if not is_finished:
        raise TuneloomError("The answer ended before it was complete. Send the request again.")


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
