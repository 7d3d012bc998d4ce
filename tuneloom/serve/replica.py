"""One base behind a queue of frames: prompts to ids, ids to text, around an engine. No HTTP, no names, no Ray.

`Base` is what Serve runs in a replica; `Replica` is all of it but the start, on any engine.
"""

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from tuneloom.engine.base import Engine, EngineStats, SequenceRequest
from tuneloom.errors import ContextLengthExceeded, InvalidRequest, TuneloomError
from tuneloom.generation import (
    ChatPrompt,
    Delta,
    Finished,
    FinishReason,
    Frame,
    GenerationRequest,
    Prompt,
    Started,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    Usage,
)

if TYPE_CHECKING:
    from tuneloom.engine.base import TokenOutput
    from tuneloom.engine.text import Codec

# The first piece goes at once; later ones wait this long for company, since each costs a hop between processes.
FLUSH_S = 0.02
# How long an answer may be silent before it counts as begun: from then on failures are events, not statuses.
ADMIT_S = 10.0
# An engine that has work and makes no step for this long is stuck.
STUCK_S = 120.0


@dataclass(frozen=True)
class Encoded:
    """A prompt as the engine takes it, and the text to repeat before the answer (`echo`)."""

    ids: tuple[int, ...]
    max_tokens: int
    echo: str = ""


class Replica:
    """Generations on one engine. `max_parallel`: choices of one request that run at once; the rest wait their turn."""

    def __init__(self, engine: Engine, codec: "Codec", *, context_length: int, max_parallel: int) -> None:
        self._engine = engine
        self._codec = codec
        self._context_length = context_length
        self._max_parallel = max_parallel
        self._progress = (0, time.monotonic())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Frame, None]:
        """The frames of one request. What is wrong with it is raised before `Started`. Closing aborts all of it."""
        encoded = await anyio.to_thread.run_sync(self._encode, request)
        run = _Run(self._engine, self._codec, request, encoded, self._max_parallel)
        async with aclosing(run.frames()) as frames:
            async for frame in frames:
                yield frame

    async def stats(self) -> EngineStats:
        return self._engine.stats()

    async def check_health(self) -> None:
        """Raises if the engine has work and does not step."""
        stats = self._engine.stats()
        steps, since = self._progress
        if stats.steps != steps or not stats.running:
            self._progress = (stats.steps, time.monotonic())
        elif time.monotonic() - since > STUCK_S:
            raise RuntimeError(f"the engine has made no step for {STUCK_S:.0f} s with {stats.running} running")

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
        return Encoded(tuple(ids), max_tokens, echo if request.echo else "")

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
        from tuneloom.store import open_blobs
        from tuneloom.store.artifacts import fetch_adapter

        tree = Settings.model_validate(settings)
        options = next(base.engine for base in tree.bases if base.id == base_id)
        base = get_base(tree.bases_dir, base_id)
        fetch = functools.partial(fetch_adapter, open_blobs(tree.blobs), cache=tree.home / "cache" / "adapters")
        codec = await anyio.to_thread.run_sync(Codec.load, base.path)
        engine = LocalEngine(base.path, options, fetch)
        await engine.start()
        super().__init__(
            engine,
            codec,
            context_length=min(codec.context_length, options.max_length or codec.context_length),
            max_parallel=options.max_sequences,
        )
        self._is_started = True

    async def __del__(self) -> None:
        # Serve awaits this when it stops the replica, whether or not it came to life.
        if self._is_started:
            await self._engine.close()


class _Run:
    """One request on its way: a task for each choice, which leave their deltas for one reader."""

    def __init__(
        self, engine: Engine, codec: "Codec", request: GenerationRequest, encoded: list[Encoded], max_parallel: int
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._request = request
        self._encoded = encoded
        self._turns = asyncio.Semaphore(max_parallel)
        self._deltas: list[Delta] = []
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._completion_tokens = 0
        self._cached_tokens = [0] * len(encoded)

    async def frames(self) -> AsyncGenerator[Frame, None]:
        n = self._request.params.n
        tasks = [
            asyncio.create_task(self._choose(index, self._encoded[index // n]))
            for index in range(len(self._encoded) * n)
        ]
        everything = asyncio.gather(*tasks, return_exceptions=True)
        everything.add_done_callback(lambda _: self._news.set())
        try:
            await self._wait(ADMIT_S)
            self._raise_error()
            prompt_tokens = sum(len(prompt.ids) for prompt in self._encoded)
            yield Started(prompt_tokens)
            while True:
                await self._wait(None)
                is_done = everything.done()
                if deltas := self._take():
                    yield deltas
                self._raise_error()
                if is_done:
                    break
                await asyncio.wait({everything}, timeout=FLUSH_S)
            yield Finished(Usage(prompt_tokens, self._completion_tokens, sum(self._cached_tokens)))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _wait(self, timeout_s: float | None) -> None:
        """Until there is something to read, or everything is done."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return

    def _take(self) -> list[Delta]:
        """The deltas that wait, one for each choice."""
        deltas, self._deltas = self._deltas, []
        if self._error is None:
            self._news.clear()
        merged: dict[int, Delta] = {}
        for delta in deltas:
            if earlier := merged.get(delta.index):
                delta = replace(delta, text=earlier.text + delta.text, logprobs=(*earlier.logprobs, *delta.logprobs))
            merged[delta.index] = delta
        return list(merged.values())

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    async def _choose(self, index: int, prompt: Encoded) -> None:
        try:
            async with self._turns:
                await self._sample(index, prompt)
        except Exception as error:
            if self._error is None:
                self._error = error
            self._news.set()

    async def _sample(self, index: int, prompt: Encoded) -> None:
        """Generate one choice, up to a stop id, a stop string or its number of tokens."""
        params, n = self._request.params, self._request.params.n
        choice = _Choice(self._codec, params.stop, params.logprobs)
        if prompt.echo:
            self._put(Delta(index, prompt.echo))
        async with aclosing(self._engine.generate(self._sequence(index, prompt))) as outputs:
            async for output in outputs:
                self._completion_tokens += len(output.tokens)
                if index % n == 0:
                    self._cached_tokens[index // n] = max(self._cached_tokens[index // n], output.cached_tokens)
                text, logprobs, reason = choice.push(output.tokens, output.finish_reason)
                if text or logprobs or reason:
                    self._put(Delta(index, text, logprobs, reason))
                if reason:
                    return
        raise TuneloomError("The engine ended an answer without a reason. Send the request again.")

    def _put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._news.set()

    def _sequence(self, index: int, prompt: Encoded) -> SequenceRequest:
        request = self._request
        sample = index % request.params.n
        seed = None if request.params.seed is None else request.params.seed + sample
        return SequenceRequest(
            id=f"{request.id}-{index}",
            prompt_ids=prompt.ids,
            params=replace(request.params, n=1, stop=(), max_tokens=prompt.max_tokens, seed=seed),
            stop_ids=self._codec.stop_ids,
            owner=request.owner,
            adapter=request.adapter,
            deadline_s=request.deadline_s,
        )


class _Choice:
    """The text of one choice and the log-probabilities that belong to it: those of tokens that show in the text."""

    def __init__(self, codec: "Codec", stop: tuple[str, ...], logprobs: int | None) -> None:
        from tuneloom.engine.text import TextStream

        self._codec = codec
        self._text = TextStream(codec, stop)
        self._wants_logprobs = logprobs is not None
        self._waiting: list[tuple[int, TokenLogprob]] = []
        self._token_bytes = 0
        self._text_bytes = 0

    def push(
        self, tokens: "tuple[TokenOutput, ...]", reason: FinishReason | None
    ) -> tuple[str, tuple[TokenLogprob, ...], FinishReason | None]:
        """New text and log-probabilities, and why the choice ends, if it does."""
        text, is_stopped = self._text.push([token.token_id for token in tokens], final=reason is not None)
        self._text_bytes += len(text.encode())
        if is_stopped:
            reason = "stop"
        return text, self._logprobs(tokens, reason, is_stopped), reason

    def _logprobs(
        self, tokens: "tuple[TokenOutput, ...]", reason: FinishReason | None, is_stopped: bool
    ) -> tuple[TokenLogprob, ...]:
        """Entries of the tokens whose text is out; those of a stop string or stop id never are."""
        if not self._wants_logprobs:
            return ()
        for token in tokens:
            if token.logprob is not None and token.token_id not in self._codec.stop_ids:
                entry = self._entry(token.token_id, token.logprob, token.top)
                self._waiting.append((self._token_bytes, entry))
                self._token_bytes += len(entry.bytes)
        is_whole = reason is not None and not is_stopped
        ready = [entry for start, entry in self._waiting if is_whole or start < self._text_bytes]
        self._waiting = self._waiting[len(ready) :]
        return tuple(ready)

    def _entry(self, id: int, logprob: float, top: tuple[tuple[int, float], ...] = ()) -> TokenLogprob:
        text, data = self._codec.token_text(id)
        return TokenLogprob(text, logprob, tuple(data), tuple(self._entry(*other) for other in top))
