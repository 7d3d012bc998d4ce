"""The gateway on Ray Serve: the deployment, handles of bases and of control, what Ray's errors mean. No routes."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import anyio.to_thread
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, RayServeException, ReplicaUnavailableError
from starlette.applications import Starlette

from tuneloom.config import Settings, read_pepper
from tuneloom.engine.base import EngineStats
from tuneloom.errors import Overloaded, TuneloomError
from tuneloom.generation import Frame, GenerationRequest
from tuneloom.serve.app import CONTROL_APP, base_app
from tuneloom.serve.callers import own_name
from tuneloom.serve.ingress import Context, make_app
from tuneloom.serve.upstream import RETRY_AFTER_S, Bases, ReplicaLost
from tuneloom.store import open_store

logger = logging.getLogger(__name__)

# A replica's death, as it shows to those who wait for it.
DEATHS = (RayActorError, WorkerCrashedError, ObjectLostError, ReplicaUnavailableError)


class Gateway:
    """The Serve deployment of the application. Serve builds it in the replica; it is never pickled."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = Settings.model_validate(settings)
        self._store = open_store(self._settings)
        self._pepper = read_pepper(self._settings)
        self._bases = serve_bases()

    def __serve_build_asgi_app__(self) -> Starlette:
        return make_app(Context(self._settings, self._store, self._pepper, self._bases, Poke()))

    async def check_health(self) -> None:
        """Raises unless the store answers."""
        async with asyncio.timeout(10):
            await anyio.to_thread.run_sync(self._store.records.keys.find, "key_none")


class ServeBase:
    """A base by its Serve application. The handle is found at the first use and kept; it follows its replicas."""

    def __init__(self, base_id: str, caller: str) -> None:
        self._base_id = base_id
        self._caller = caller
        self._handle: Any = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Frame, None]:
        handle = await self._find()
        # A bare base carries no affinity: with one, all its traffic would stick to a single replica.
        affinity = {"session_id": request.adapter.sha256} if request.adapter else {}
        response = handle.options(stream=True, **affinity).generate.remote(request, self._caller)
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
                self._handle = await anyio.to_thread.run_sync(serve.get_app_handle, base_app(self._base_id))
            except (RayServeException, RayError) as error:
                raise Overloaded(
                    f"The base `{self._base_id}` is not running. Try again later.", retry_after_s=RETRY_AFTER_S
                ) from error
        return self._handle


def serve_bases() -> Bases:
    """Bases by id, one handle each for the life of the process."""
    known: dict[str, ServeBase] = {}
    caller = own_name()
    return lambda base_id: known.setdefault(base_id, ServeBase(base_id, caller))


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


class Poke:
    """Wakes the control loop, so that it need not wait for its next tick. Callable from any thread; never fails."""

    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self) -> None:
        threading.Thread(target=self._send, name="poke", daemon=True).start()

    def _send(self) -> None:
        try:
            if self._handle is None:
                self._handle = serve.get_app_handle(CONTROL_APP)
            self._handle.poke.remote()
        except (RayServeException, RayError) as error:
            # The tick does the same, later.
            logger.info("control was not poked: %s", error)


def _lost(base_id: str) -> ReplicaLost:
    return ReplicaLost(
        f"The process that served the base `{base_id}` ended in the middle of the request. Send it again.",
        retry_after_s=RETRY_AFTER_S,
    )
