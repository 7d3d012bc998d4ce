"""The asyncio face of the engine: one step thread behind it, one hand-over per step. No computing here.

1. `generate` checks the request, registers a queue for it and posts it to the inbox.
2. The step thread empties the inbox, computes a step and hands all its outputs to the loop at once.
3. The loop spreads them over the queues; `generate` yields them, merged if its reader is slow.
4. Closing or cancelling `generate` posts an abort, which takes effect before the next step.
"""

import asyncio
import contextlib
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import torch

from tuneloom.domain import AdapterRef
from tuneloom.engine.base import AdapterState, EngineStats, SequenceOutput, SequenceRequest
from tuneloom.engine.core import EngineCore, Event
from tuneloom.engine.options import EngineConfig
from tuneloom.errors import InvalidRequest, Overloaded, TuneloomError

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 900.0
_CLOSE_TIMEOUT_S = 10.0
# How long the thread sleeps without being woken; deadlines are looked at that often at least.
_IDLE_S = 0.5
_WAITING_S = 0.05
# Beyond a request's own deadline, which the step thread enforces.
_GRACE_S = 60.0

Command = Callable[[EngineCore], None]


class LocalEngine:
    """One base in this process. Implements `engine.base.Engine`."""

    def __init__(self, base_path: Path, config: EngineConfig, fetch: Callable[[AdapterRef], Path]) -> None:
        """`fetch` gives the local folder of an adapter; it runs in loading threads and may block."""
        self._base_path, self._config, self._fetch = base_path, config, fetch
        self._inbox: deque[Command] = deque()
        self._signal = threading.Event()
        self._live: dict[str, _Mailbox] = {}
        self._num_by_owner = Counter[str]()
        self._has_none = asyncio.Event()
        self._is_draining = self._is_closing = self._has_stopped = False
        self._core: EngineCore | None = None
        self._stats: EngineStats | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self._started().max_length

    async def start(self) -> None:
        """Load the base and begin to step.

        Raises:
            InvalidRequest: the base cannot be served.
        """
        self._loop = asyncio.get_running_loop()
        ready: asyncio.Future[EngineCore] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="engine-step", daemon=True)
        self._thread.start()
        async with asyncio.timeout(_START_TIMEOUT_S):
            self._core = await ready

    async def generate(self, request: SequenceRequest) -> AsyncIterator[SequenceOutput]:
        self._started().check(request)
        self._check_room(request)
        mailbox = self._live[request.id] = _Mailbox()
        self._num_by_owner[request.owner] += 1
        self._post(lambda core: core.add(request))
        is_finished = False
        try:
            while not is_finished:
                output = await mailbox.take(request.deadline_s + _GRACE_S)
                is_finished = output.finish_reason is not None
                yield output
        finally:
            self._forget(request)
            if not is_finished:
                self._post(lambda core: core.abort(request.id))

    async def abort(self, id: str) -> None:
        """End a generation; its reader gets an error. An unknown id is fine."""
        self._post(lambda core: core.abort(id))
        self._hand_over([(id, TuneloomError("The generation was aborted.", code="aborted"))])

    async def load_adapter(self, ref: AdapterRef) -> None:
        """Bring an adapter into host memory.

        Raises:
            AdapterRejected: it does not fit this base.
            Overloaded: it did not load in time; the load goes on.
        """
        loading = asyncio.wrap_future(self._started().adapters.prefetch(ref))
        try:
            # Shielded: others may wait for the same load.
            async with asyncio.timeout(self._config.adapter_timeout_s):
                await asyncio.shield(loading)
        except TimeoutError as error:
            raise Overloaded("The adapter is still loading. Retry in a moment.", retry_after_s=5.0) from error

    async def evict_adapter(self, sha256: str) -> None:
        """Drop an adapter, at once or when the last sequence that uses it has ended."""
        self._started().adapters.evict(sha256)
        self._post(lambda core: core.drop_prefixes(sha256))

    async def pin_adapter(self, ref: AdapterRef, is_pinned: bool) -> None:
        """Load an adapter and keep it, or let it go its way. Raises Conflict: too many are pinned."""
        self._started().adapters.pin(ref, is_pinned)

    def adapters(self) -> list[AdapterState]:
        return self._started().adapters.states()

    def stats(self) -> EngineStats:
        """As of the last step. Raises TuneloomError if the step thread has died: a health check."""
        core = self._started()
        return self._stats or core.stats()

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, wait for the running ones, and end those that take longer than `timeout_s`."""
        self._is_draining = True
        if self._live:
            self._has_none.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._has_none.wait()
        self._fail_all(Overloaded("This replica is shutting down. Retry.", retry_after_s=1.0))

    async def close(self) -> None:
        """Stop the step thread. What still runs ends with an error."""
        self._is_draining = self._is_closing = True
        self._signal.set()
        self._fail_all(Overloaded("This replica is shutting down. Retry.", retry_after_s=1.0))
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                logger.error("the step thread did not end within %.0f s", _CLOSE_TIMEOUT_S)

    def _started(self) -> EngineCore:
        if self._core is None:
            raise Overloaded("The engine is starting. Retry in a moment.", retry_after_s=2.0)
        if self._has_stopped and not self._is_closing:
            raise TuneloomError("The engine has stopped. Restart this replica.", code="engine_stopped")
        return self._core

    def _check_room(self, request: SequenceRequest) -> None:
        if self._is_draining:
            raise Overloaded("This replica is shutting down. Retry.", retry_after_s=1.0)
        if len(self._live) >= self._config.max_sequences + self._config.max_waiting:
            self._check_share(request.owner)
        if request.id in self._live:
            raise InvalidRequest(f"A generation `{request.id}` is running. Choose another id.")

    def _check_share(self, owner: str) -> None:
        """With all places taken, let in who has less than its share of them, so that one owner locks nobody out."""
        limit = self._config.max_sequences + self._config.max_waiting
        share = max(1, limit // len({*self._num_by_owner, owner}))
        if self._num_by_owner[owner] >= share or len(self._live) >= 2 * limit:
            raise Overloaded(f"{self._config.max_waiting} requests wait already. Retry in a moment.", retry_after_s=2.0)

    def _forget(self, request: SequenceRequest) -> None:
        del self._live[request.id]
        self._num_by_owner[request.owner] -= 1
        if not self._num_by_owner[request.owner]:
            del self._num_by_owner[request.owner]
        if not self._live:
            self._has_none.set()

    def _post(self, command: Command) -> None:
        self._inbox.append(command)
        self._signal.set()

    def _hand_over(self, events: list[Event]) -> None:
        for id, output in events:
            mailbox = self._live.get(id)
            if mailbox is not None:
                mailbox.put(output)

    def _fail_all(self, error: TuneloomError) -> None:
        ids = list(self._live)
        for id in ids:
            self._post(lambda core, id=id: core.abort(id))
        self._hand_over([(id, error) for id in ids])

    def _run(self, ready: "asyncio.Future[EngineCore]") -> None:
        """The step thread, from loading to the end."""
        # OpenMP's thread count belongs to the thread that sets it.
        torch.set_num_threads(self._config.threads or max(1, len(os.sched_getaffinity(0)) - 1))
        try:
            core = EngineCore(self._base_path, self._config, self._fetch, wake=self._signal.set)
        except BaseException as error:
            self._call(_set_exception, ready, error)
            return
        self._call(_set_result, ready, core)
        try:
            while not self._is_closing:
                self._turn(core)
        finally:
            self._has_stopped = True
            core.close()
            self._call(self._fail_all, TuneloomError("The engine has stopped. Retry.", code="engine_stopped"))

    def _turn(self, core: EngineCore) -> None:
        self._signal.clear()
        try:
            while self._inbox:
                self._inbox.popleft()(core)
            events = core.step()
        except Exception:
            # A bug outside the guarded step: no sequence can be trusted, the engine itself can go on.
            logger.exception("engine turn failed")
            core.abort_all()
            self._call(self._fail_all, TuneloomError("The engine failed. Retry.", code="engine_error"))
            events = []
        self._stats = core.stats()
        if events:
            self._call(self._hand_over, events)
        if not core.did_run:
            self._signal.wait(_WAITING_S if core.has_sequences else _IDLE_S)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # The loop is closed: nobody is left to hear.
            self._is_closing = True


class _Mailbox:
    """Outputs of one generation on their way to its reader."""

    def __init__(self) -> None:
        self._items: deque[SequenceOutput | TuneloomError] = deque()
        self._has_some = asyncio.Event()

    def put(self, item: SequenceOutput | TuneloomError) -> None:
        self._items.append(item)
        self._has_some.set()

    async def take(self, timeout_s: float) -> SequenceOutput:
        """What has come, as one output; waits for the first. An error is raised in its turn."""
        if not self._items:
            self._has_some.clear()
            try:
                # Not `wait_for`: before Python 3.12 it loses a cancellation that comes together with the result.
                async with asyncio.timeout(timeout_s):
                    await self._has_some.wait()
            except TimeoutError as error:
                raise TuneloomError("The engine does not answer. Retry.", code="engine_stuck") from error
        first = self._items.popleft()
        if isinstance(first, TuneloomError):
            raise first
        outputs = [first]
        while self._items and isinstance(self._items[0], SequenceOutput):
            outputs.append(self._items.popleft())
        tokens = tuple(token for output in outputs for token in output.tokens)
        return SequenceOutput(tokens, outputs[-1].finish_reason, outputs[-1].cached_tokens)


def _set_result(future: "asyncio.Future[EngineCore]", core: EngineCore) -> None:
    if not future.done():
        future.set_result(core)


def _set_exception(future: "asyncio.Future[EngineCore]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
