"""The one connection to Redis that all requests of a process share, and what happens when Redis is away.

What comes while a call is under way goes out together with the next, so that many requests cost few round trips. After
a failure every call is refused at once, and Redis is asked in the background until it answers. No limits.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import redis.asyncio
from redis.exceptions import NoScriptError, RedisError, ResponseError

from tuneloom.serve.limits_window import CountersDown

logger = logging.getLogger(__name__)

# The time that Redis has is counted in slices: each passes only while this process looks for the answer, so that a busy
# event loop is not taken for a dead Redis.
SLICE_S = 0.02
PROBE_EVERY_S = 0.5
MAX_BATCH = 128

Command = tuple[Any, ...]


class Link:
    """Runs scripts by name. `probe` is called with the link to see whether Redis works; `on_change` hears if it does.

    A call may have been done although it failed: whether the answer or the question was lost cannot be seen.
    """

    def __init__(
        self,
        url: str,
        password_file: Path | None,
        timeout_s: float,
        scripts: dict[str, str],
        probe: Sequence[Any],
        on_change: Callable[[bool], None],
    ) -> None:
        password = password_file.read_text(encoding="utf-8").strip() if password_file else None
        given = {"password": password} if password else {}
        # Each time limit of the client's own costs a task for every command; the one below holds for all of them.
        self._pool = redis.asyncio.ConnectionPool.from_url(
            url, client_name="tuneloom-gateway", socket_timeout=None, socket_connect_timeout=None, **given
        )
        self._timeout_s = timeout_s
        self._scripts = scripts
        self._probe = probe
        self._on_change = on_change
        self._connection: Any = None
        self._shas: dict[str, str] = {}
        self._waiting: list[tuple[Sequence[Any], asyncio.Future[Any]]] = []
        self._pump: asyncio.Task[None] | None = None
        self._prober: asyncio.Task[None] | None = None
        self.is_up = True

    def send(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> asyncio.Future[Any]:
        """Of what the script returns, or CountersDown within about `timeout_s`."""
        loop = asyncio.get_running_loop()
        coming: asyncio.Future[Any] = loop.create_future()
        if not self.is_up:
            coming.set_exception(CountersDown())
            return coming
        self._waiting.append(((script, len(keys), *keys, *arguments), coming))
        if self._pump is None:
            self._pump = loop.create_task(self._work())
        return coming

    async def close(self) -> None:
        for task in (self._pump, self._prober):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        await self._disconnect()

    async def _work(self) -> None:
        batch: list[tuple[Sequence[Any], asyncio.Future[Any]]] = []
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                try:
                    async with _Patience(self._timeout_s):
                        replies = await self._exchange([call for call, _ in batch])
                except CountersDown as error:
                    self._give_up(error, batch)
                    return
                for (_, coming), reply in zip(batch, replies, strict=True):
                    if not coming.done():
                        coming.set_result(reply)
        finally:
            self._pump = None
            # Nobody is left waiting, also when this task is ended.
            for _, coming in [*batch, *self._waiting]:
                coming.cancel()
            self._waiting = []

    def _give_up(self, error: CountersDown, batch: Sequence[tuple[Any, asyncio.Future[Any]]]) -> None:
        self.is_up = False
        for _, coming in [*batch, *self._waiting]:
            if not coming.done():
                coming.set_exception(CountersDown(str(error)))
        self._waiting = []
        logger.error("Redis does not count (%s): limits are kept by each gateway alone until it does", error)
        self._on_change(False)
        self._prober = asyncio.create_task(self._wait_for_redis())

    async def _wait_for_redis(self) -> None:
        while not self.is_up:
            await asyncio.sleep(PROBE_EVERY_S)
            with contextlib.suppress(CountersDown):
                async with _Patience(self._timeout_s):
                    await self._exchange([self._probe])
                self.is_up = True
        logger.warning("Redis counts again: limits are kept for all gateways together")
        self._on_change(True)

    async def _exchange(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        """The replies to these calls. A connection that was closed while it was idle is opened anew, once."""
        try:
            was_open = self._connection is not None
            try:
                return await self._send(calls)
            except (RedisError, OSError) as error:
                await self._disconnect()
                if not was_open or isinstance(error, ResponseError):
                    raise
                return await self._send(calls)
        except (RedisError, OSError) as error:
            await self._disconnect()
            raise CountersDown(f"{type(error).__name__}: {error}") from error
        except asyncio.CancelledError:
            # Late answers would be taken for those of the next calls.
            await self._disconnect()
            raise
        except Exception as error:
            logger.exception("the connection to Redis failed unexpectedly")
            await self._disconnect()
            raise CountersDown(type(error).__name__) from error

    async def _send(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        if self._connection is None:
            self._connection = connection = self._pool.make_connection()
            await connection.connect()
            self._shas = {}
        if not self._shas:
            loads = [("SCRIPT", "LOAD", text) for text in self._scripts.values()]
            answers = await self._pipe(loads)
            self._shas = dict(zip(self._scripts, [_checked(answer).decode() for answer in answers], strict=True))
        replies = await self._pipe([("EVALSHA", self._shas[name], *rest) for name, *rest in calls])
        if any(isinstance(reply, NoScriptError) for reply in replies):
            # Somebody flushed the scripts; those calls did nothing.
            self._shas = {}
            lost = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            for i, reply in zip(lost, await self._send([calls[i] for i in lost]), strict=True):
                replies[i] = reply
        return [_checked(reply) for reply in replies]

    async def _pipe(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, errors among them as they are."""
        await self._connection.send_packed_command(self._connection.pack_commands(commands))
        replies: list[Any] = []
        for _ in commands:
            try:
                replies.append(await self._connection.read_response())
            except ResponseError as error:
                replies.append(error)
        return replies

    async def _disconnect(self) -> None:
        connection, self._connection, self._shas = self._connection, None, {}
        if connection is not None:
            with contextlib.suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)


def _checked(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise reply
    return reply


class _Patience:
    """A block that is given up after `timeout_s`, in slices that end only when the event loop comes to them.

    Raises:
        CountersDown: it was given up.
    """

    def __init__(self, timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._left = math.ceil(timeout_s / SLICE_S)
        self._is_over = False

    async def __aenter__(self) -> None:
        self._task = asyncio.current_task()
        self._timer = self._loop.call_later(SLICE_S, self._tick)

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._timer.cancel()
        if self._is_over and isinstance(error, asyncio.CancelledError) and self._task and not self._task.uncancel():
            raise CountersDown(f"no answer within {self._timeout_s:g} s") from error

    def _tick(self) -> None:
        self._left -= 1
        if self._left:
            self._timer = self._loop.call_later(SLICE_S, self._tick)
        elif self._task:
            self._is_over = True
            self._task.cancel()
