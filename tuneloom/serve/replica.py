"""One base behind a queue of frames: prompts to ids, ids to text, around an engine. No HTTP, no names, no Ray.

`Base` is what Serve runs in a replica; `Replica` is all of it but the start, on any engine.
"""

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from tuneloom.domain import AdapterRef
from tuneloom.engine.base import AdapterState, Engine, EngineStats
from tuneloom.errors import ContextLengthExceeded, InvalidRequest, Overloaded, TuneloomError
from tuneloom.generation import ChatPrompt, Frame, GenerationRequest, Prompt, TextPrompt, TokenPrompt
from tuneloom.serve.callers import Callers
from tuneloom.serve.disk import DiskCache
from tuneloom.serve.forms import form_of
from tuneloom.serve.identity import is_replica_alive, num_cores, num_here, own_id
from tuneloom.serve.pins import PinFollower
from tuneloom.serve.run import Encoded, Run
from tuneloom.serve.scaling import load_of
from tuneloom.serve.usage import Recorder
from tuneloom.serve.warmup import Usage, Use, load_all, share

if TYPE_CHECKING:
    from tuneloom.config import BaseSettings, EngineSettings
    from tuneloom.engine.options import EngineConfig
    from tuneloom.engine.text import Codec

logger = logging.getLogger(__name__)

# An engine that has work and makes no step for this long is stuck.
STUCK_S = 90.0


class Replica:
    """Generations on one engine. `max_parallel`: choices of one request that run at once; the rest wait their turn."""

    def __init__(
        self,
        engine: Engine,
        codec: "Codec",
        callers: Callers,
        recorder: Recorder,
        *,
        context_length: int,
        max_parallel: int,
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._callers = callers
        self._recorder = recorder
        self._context_length = context_length
        self._max_parallel = max_parallel
        self._numbers = itertools.count()
        self._num_open = 0
        self._progress = (0, time.monotonic())
        self._usage = Usage()

    async def generate(self, request: GenerationRequest, caller: str = "") -> AsyncGenerator[Frame, None]:
        """The frames of one request. What is wrong with it is raised before `Started`. Closing aborts all of it.

        So does the death of `caller`, the name of the replica that asks, if it is one.
        """
        encoded = await anyio.to_thread.run_sync(self._encode, request)
        # A request id comes from a client and may repeat; a sequence needs an id that no other has.
        name = f"{next(self._numbers)}-{request.id}"
        run = Run(
            self._engine,
            self._codec,
            request,
            encoded,
            name=name,
            max_parallel=self._max_parallel,
            num_streams=lambda: self._num_open,
        )
        if request.adapter is not None:
            self._usage.add(request.adapter)
        self._num_open += 1
        try:
            with self._callers.working(caller, run.abandon), self._recorder.counting(request, run.usage):
                async with aclosing(run.frames()) as frames:
                    async for frame in frames:
                        yield frame
        finally:
            self._num_open -= 1

    async def stats(self) -> EngineStats:
        return self._engine.stats()

    async def uses(self) -> list[Use]:
        """The adapters that were asked for here lately, the most used first."""
        return self._usage.uses()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve hands to the scaling policy."""
        return load_of(self._engine.stats())

    async def check_health(self) -> None:
        """Raises if the engine has work and does not step."""
        num_steps = self._engine.stats().steps
        last_steps, since = self._progress
        if num_steps != last_steps or not self._num_open:
            self._progress = (num_steps, time.monotonic())
        elif time.monotonic() - since > STUCK_S:
            raise RuntimeError(f"the engine has made no step for {STUCK_S:.0f} s with {self._num_open} requests open")

    def _encode(self, request: GenerationRequest) -> list[Encoded]:
        for token in request.params.logit_bias:
            if token >= self._codec.vocab_size:
                raise InvalidRequest(
                    f"The token id {token} in `logit_bias` is not in this model's vocabulary of "
                    f"{self._codec.vocab_size}.",
                    param="logit_bias",
                )
        return [self._encode_prompt(prompt, request) for prompt in request.prompts]

    def _encode_prompt(self, prompt: Prompt, request: GenerationRequest) -> Encoded:
        match prompt:
            case ChatPrompt():
                ids, echo = self._codec.encode_chat(prompt.messages, prompt.tools), ""
            case TextPrompt():
                ids, echo = self._codec.encode_text(prompt.text), prompt.text
            case TokenPrompt():
                ids, echo = list(prompt.token_ids), ""
                if (largest := max(ids)) >= self._codec.vocab_size:
                    raise InvalidRequest(
                        f"The token id {largest} is not in this model's vocabulary of {self._codec.vocab_size}.",
                        param="prompt",
                    )
                if request.echo:
                    echo = self._codec.decode(ids)
        if not ids:
            raise InvalidRequest("The prompt is empty for this model. Send some text.", param="prompt")
        max_tokens = self._check_context(len(ids), request.params.max_tokens, isinstance(prompt, ChatPrompt))
        form = form_of(prompt, request.response_format, self._codec)
        return Encoded(tuple(ids), max_tokens, echo if request.echo else "", form)

    def _check_context(self, prompt_tokens: int, max_tokens: int | None, is_chat: bool) -> int:
        """The number of tokens that may be generated; None asks for all that is left."""
        limit, what = self._context_length, "messages" if is_chat else "prompt"
        room = limit - prompt_tokens
        if room >= (max_tokens or 1):
            return max_tokens or room
        if max_tokens is None:
            detail = f"your {what} resulted in {prompt_tokens} tokens"
        else:
            detail = (
                f"you requested {prompt_tokens + max_tokens} tokens ({prompt_tokens} in the {what}, "
                f"{max_tokens} in the completion)"
            )
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens. However, {detail}. "
            f"Reduce the length of the {what} or completion.",
            param=what,
        )


class Base(Replica):
    """The Serve deployment: an engine and a codec for one base of an installation, in this process."""

    _is_started = False

    async def __init__(self, settings: Mapping[str, Any], base_id: str) -> None:
        from tuneloom.bases import get_base
        from tuneloom.config import Settings
        from tuneloom.engine.engine import LocalEngine
        from tuneloom.engine.text import Codec
        from tuneloom.store import open_store
        from tuneloom.store.usage_writer import UsageWriter

        tree = Settings.model_validate(settings)
        options = next(base for base in tree.bases if base.id == base_id)
        base = get_base(tree.bases_dir, base_id)
        codec = await anyio.to_thread.run_sync(Codec.load, base.path)
        store = await anyio.to_thread.run_sync(open_store, tree)
        disk = DiskCache(store.blobs, tree.home / "cache" / "adapters", options.engine.disk_cache_bytes)
        config = engine_config(options.engine, replicas_here=num_here(options.most_replicas))
        engine = LocalEngine(base.path, config, disk.fetch)
        await engine.start()
        super().__init__(
            engine,
            codec,
            Callers(is_replica_alive),
            Recorder(UsageWriter(store.records), base_id, tree.usage),
            context_length=engine.max_length,
            max_parallel=options.engine.max_sequences,
        )
        self._disk = disk
        self._pins = PinFollower(store.records, base_id, engine.pin_adapter)
        self._is_started = True
        self._recorder.start()
        await self._pins.start()
        if options.most_replicas > 1:
            await self._warm_up(options)

    async def _warm_up(self, options: "BaseSettings") -> None:
        """Load what the other replicas work with and this one will get. Never fails, never takes long."""
        from tuneloom.serve.handles import ServeBase

        limits = {"count": options.engine.adapter_slots, "size_bytes": options.engine.host_cache_bytes // 2}
        try:
            async with asyncio.timeout(options.warmup_s):
                used = await ServeBase(options.id, "").on_each_replica("uses")
                known = {id: uses for id, uses in used.items() if not isinstance(uses, TuneloomError)}
                adapters = share(known, own_id(), **limits) if known else []
                await load_all(adapters, self._engine.load_adapter)
                logger.info("warmed up with %d adapters of %d replicas", len(adapters), len(known))
        except TimeoutError:
            logger.info("the warm-up ended after %.1f s", options.warmup_s)
        except Exception:
            # Whatever it is, the replica can do without.
            logger.exception("the warm-up failed; adapters are loaded as they are asked for")

    async def stats(self) -> EngineStats:
        disk = await anyio.to_thread.run_sync(self._disk.stats)
        stats = await super().stats()
        return dataclasses.replace(stats, tiers={**stats.tiers, "disk": disk})

    async def adapters(self) -> list[AdapterState]:
        return self._engine.adapters()

    async def prewarm(self, ref: AdapterRef) -> None:
        """Load an adapter into host memory. Raises what loading it for a request would raise."""
        await self._engine.load_adapter(ref)

    async def pin(self, ref: AdapterRef, is_pinned: bool) -> None:
        """Keep an adapter that is loaded with this call, or let it go its way."""
        await self._pins.set(ref, is_pinned)
        if is_pinned:
            await self._engine.load_adapter(ref)

    async def unload(self, sha256: str) -> None:
        """Drop an adapter from the disk, and from memory and device as soon as nothing uses it."""
        await self._engine.evict_adapter(sha256)
        await anyio.to_thread.run_sync(self._disk.drop, sha256)

    async def operate(self, method: str, arguments: tuple[Any, ...], timeout_s: float = 60.0) -> tuple[str, Any]:
        """This replica's id and what a method of it returns, or raises of ours: a call that went to all replicas."""
        try:
            async with asyncio.timeout(timeout_s):
                return own_id(), await getattr(self, method)(*arguments)
        except TuneloomError as error:
            return own_id(), error
        except TimeoutError:
            return own_id(), Overloaded(f"This did not end within {timeout_s:g} s; it may go on.", retry_after_s=5.0)

    async def __del__(self) -> None:
        # Serve awaits this when it stops the replica, whether or not it came to life.
        if self._is_started:
            await self._pins.stop()
            await self._engine.close()
            await self._recorder.stop()


def engine_config(settings: "EngineSettings", *, replicas_here: int = 1) -> "EngineConfig":
    """A base's settings as its engine takes them; the disk is not the engine's. The machine's cores are shared out."""
    from tuneloom.engine.options import EngineConfig

    options = settings.model_dump(exclude={"disk_cache_bytes"})
    if not settings.threads and replicas_here > 1:
        options["threads"] = max(1, (num_cores() - 1) // replicas_here)
    return EngineConfig(**options)
