"""Bases as the processes that call them see them: handles of their applications, and what Ray's errors mean."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import anyio.to_thread
from grpc import RpcError
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)

from tuneloom.config import Settings
from tuneloom.engine.base import EngineStats
from tuneloom.errors import Overloaded, TuneloomError
from tuneloom.generation import Frame, GenerationRequest
from tuneloom.serve import members
from tuneloom.serve.app import BASE_DEPLOYMENT, base_app
from tuneloom.serve.identity import own_name
from tuneloom.serve.placement import RoutingKey
from tuneloom.serve.upstream import RETRY_AFTER_S, ReplicaLost

logger = logging.getLogger(__name__)

# A replica's death, as it shows to those who wait for it. Of gRPC, Ray hands on the codes that it has no error for: a
# replica that shuts down ends its calls with CANCELLED.
DEATHS = (RayActorError, WorkerCrashedError, ObjectLostError, ReplicaUnavailableError, RpcError)
CALL_ERRORS = (RayError, RayServeException, RpcError)

# How long a base takes to start, until one start was seen.
FIRST_START_S = 30.0
WAKE_TIMEOUT_S = 600.0
# Clients that obey `Retry-After` do so up to a minute.
SHORTEST_RETRY_S, LONGEST_RETRY_S = 2.0, 60.0
# How often and how long a process that has not called a base before looks for the list of its replicas: briefly where
# a request waits for the answer, longer where an empty list would hide replicas from an operator.
MEMBERS_PAUSE_S = 0.025
MEMBERS_WAIT_S, MEMBERS_PATIENT_WAIT_S = 0.5, 3.0
EACH_TIMEOUT_S = 60.0
# Within this time Serve ends a replica that answers nothing at all.
SILENCE_S = 40.0


class ServeBase:
    """A base by its Serve application. The handle is found at the first use and kept; it follows its replicas."""

    def __init__(self, base_id: str, caller: str, *, may_be_cold: bool = False) -> None:
        """`may_be_cold`: it has no replica while nobody asks."""
        self._base_id = base_id
        self._caller = caller
        self._may_be_cold = may_be_cold
        self._handle: Any = None
        self._waking: asyncio.Task[None] | None = None
        self._started_waking = 0.0
        self._start_s = FIRST_START_S

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Frame, None]:
        handle = await self._find()
        key = str(RoutingKey.of(request))
        response = handle.options(stream=True, session_id=key).generate.remote(request, self._caller)
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
        except CALL_ERRORS as error:
            is_open = False
            raise as_our_error(error, self._base_id) from error
        finally:
            if is_open:
                response.cancel()

    async def stats(self) -> EngineStats:
        handle = await self._find()
        try:
            return await handle.stats.remote()
        except CALL_ERRORS as error:
            raise as_our_error(error, self._base_id) from error

    async def wake(self, wait_s: float) -> None:
        if not self._may_be_cold or not await self.is_cold():
            return
        if self._waking is None or self._waking.done():
            self._started_waking = time.monotonic()
            self._waking = asyncio.create_task(self._wake())
        await asyncio.wait({self._waking}, timeout=wait_s)
        if await self.is_cold():
            left_s = self._start_s - (time.monotonic() - self._started_waking)
            raise Overloaded(
                f"The base `{self._base_id}` is being loaded: it runs only while it is used. Try again in a moment, or "
                "send the header `Prefer: wait=60` to wait for it.",
                code="model_loading",
                retry_after_s=min(max(left_s, SHORTEST_RETRY_S), LONGEST_RETRY_S),
            )

    async def is_cold(self) -> bool:
        return self._may_be_cold and not await self._replicas()

    async def on_each_replica(
        self, method: str, *arguments: Any, timeout_s: float = EACH_TIMEOUT_S
    ) -> dict[str, Any | TuneloomError]:
        """What a method of `Base` returns, or raises of ours, on every running replica, by the replica's id.

        Never starts a replica; a base that has none gives an empty answer. One that does not answer, or dies
        meanwhile, is there with an `Overloaded` that says so.
        """
        handle = await self._find()
        asked = await self._replicas(wait_s=MEMBERS_PATIENT_WAIT_S)
        if not asked:
            return {}
        try:
            # A replica ends a slow method itself, and Serve ends one that does not even do that.
            answers = await handle.broadcast("operate", method, arguments, timeout_s).results_async(
                timeout_s=timeout_s + SILENCE_S, return_exceptions=True
            )
        except DeploymentUnavailableError:
            return {}
        except CALL_ERRORS as error:
            raise as_our_error(error, self._base_id) from error
        except TimeoutError:
            answers = [TimeoutError(f"no answers within {timeout_s + SILENCE_S:.0f} s")]
        for answer in answers:
            if isinstance(answer, BaseException):
                logger.warning("a replica of %s did not answer to %s: %s", self._base_id, method, answer)
        found = dict(answer for answer in answers if not isinstance(answer, BaseException))
        silent = Overloaded("This replica did not answer. Try again in a moment.", retry_after_s=RETRY_AFTER_S)
        return {**dict.fromkeys(sorted(asked - found.keys()), silent), **found}

    async def _replicas(self, *, wait_s: float = MEMBERS_WAIT_S) -> frozenset[str]:
        """Those that run, as far as this process hears of it within `wait_s`."""
        # The handle must have its router, which is what hears of replicas.
        (await self._find()).options(stream=True)
        for _ in range(round(wait_s / MEMBERS_PAUSE_S)):
            found = members.find(base_app(self._base_id))
            if found is not None:
                return found
            await asyncio.sleep(MEMBERS_PAUSE_S)
        return frozenset()

    async def _wake(self) -> None:
        """Ask for something: Serve starts a replica for whatever waits, and keeps starting it while it waits."""
        with contextlib.suppress(TimeoutError, TuneloomError):
            async with asyncio.timeout(WAKE_TIMEOUT_S):
                await self.stats()
            self._start_s = time.monotonic() - self._started_waking
            logger.info("the base %s was started in %.1f s", self._base_id, self._start_s)

    async def _find(self) -> Any:
        if self._handle is None:
            try:
                app = base_app(self._base_id)
                self._handle = await anyio.to_thread.run_sync(serve.get_deployment_handle, BASE_DEPLOYMENT, app)
            except (RayServeException, RayError) as error:
                raise Overloaded(
                    f"The base `{self._base_id}` is not running. Try again later.", retry_after_s=RETRY_AFTER_S
                ) from error
        return self._handle


def serve_bases(settings: Settings) -> Callable[[str], ServeBase]:
    """Bases by id, one handle each for the life of the process."""
    caller = own_name()
    rare = {base.id for base in settings.bases if not base.fewest_replicas}
    known: dict[str, ServeBase] = {}
    return lambda base_id: known.setdefault(base_id, ServeBase(base_id, caller, may_be_cold=base_id in rare))


def as_our_error(error: BaseException, base_id: str) -> TuneloomError:
    """What an error of Ray means to the caller of a base."""
    if isinstance(error, RayTaskError):
        # Raised inside the replica: the cause is what it raised.
        cause = error.cause
        if isinstance(cause, TuneloomError):
            return cause
        if isinstance(cause, DEATHS):
            return _lost(base_id)
        logger.error("the replica of %s failed: %s", base_id, error)
        return TuneloomError(f"The base `{base_id}` failed on this request. Send it again.")
    if isinstance(error, BackPressureError):
        return Overloaded(f"Too many requests wait for the base `{base_id}`. Try again later.", retry_after_s=1.0)
    if isinstance(error, DEATHS):
        return _lost(base_id)
    logger.error("the base %s cannot be reached: %s", base_id, error)
    return Overloaded(f"The base `{base_id}` cannot be reached. Try again later.", retry_after_s=RETRY_AFTER_S)


def _lost(base_id: str) -> ReplicaLost:
    return ReplicaLost(
        f"The process that served the base `{base_id}` ended in the middle of the request. Send it again.",
        retry_after_s=RETRY_AFTER_S,
    )
