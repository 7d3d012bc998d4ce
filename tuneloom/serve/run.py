"""One request on its way through an engine: a sequence for each choice, their text, and frames for one reader.

Knows neither templates nor limits: prompts come encoded and checked.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tuneloom.engine.base import Engine, Meter, SequenceOutput, SequenceRequest, TokenOutput
from tuneloom.errors import Overloaded, TuneloomError
from tuneloom.generation import (
    Delta,
    Finished,
    FinishReason,
    Frame,
    GenerationRequest,
    Started,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from tuneloom.serve.forms import Form

if TYPE_CHECKING:
    from tuneloom.engine.text import Codec

# The first piece goes at once; later ones wait for company, since each costs some two milliseconds of computing on its
# way through three processes, which the engine lacks on a small machine: so many may go in a second over all streams.
FLUSH_S, MAX_FLUSH_S = 0.02, 0.25
PIECES_PER_S = 100
# How long an answer may be silent before it counts as begun: from then on failures are events, not statuses.
ADMIT_S = 10.0
# Between two tries of a choice whose siblings run while the engine has no room for it.
FULL_PAUSE_S = 0.2


@dataclass(frozen=True)
class Encoded:
    """A prompt as the engine takes it, the text to repeat before the answer (`echo`), and the form of the answer."""

    ids: tuple[int, ...]
    max_tokens: int
    echo: str = ""
    form: Form = field(default_factory=Form)


class Run:
    """One request on its way: a task for each choice, which leave their deltas for one reader."""

    def __init__(
        self,
        engine: Engine,
        codec: "Codec",
        request: GenerationRequest,
        encoded: list[Encoded],
        *,
        name: str,
        max_parallel: int,
        num_streams: Callable[[], int] = lambda: 1,
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._request = request
        self._encoded = encoded
        self._name = name
        self._turns = asyncio.Semaphore(max_parallel)
        self._num_streams = num_streams
        self._deltas: list[Delta] = []
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._begun: set[int] = set()
        self._completion_tokens = 0
        self._cached_tokens = [0] * len(encoded)
        self._meters = [Meter() for _ in range(len(encoded) * request.params.n)]

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
            if not self._request.is_streamed:
                await self._until_end(everything)
            while True:
                await self._wait(None)
                is_done = everything.done()
                if deltas := self._take():
                    yield deltas
                self._raise_error()
                if is_done:
                    break
                pause_s = min(max(FLUSH_S, self._num_streams() / PIECES_PER_S), MAX_FLUSH_S)
                await asyncio.wait({everything}, timeout=pause_s)
            yield Finished(self.usage())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def usage(self) -> Usage:
        """What it has taken so far; a prompt counts as soon as anything of it was computed."""
        n = self._request.params.n
        computed = {index // n for index, meter in enumerate(self._meters) if meter.device_s}
        computed |= {index // n for index in self._begun}
        return Usage(
            sum(len(self._encoded[number].ids) for number in computed),
            self._completion_tokens,
            sum(self._cached_tokens),
            sum(meter.device_s for meter in self._meters),
        )

    async def _wait(self, timeout_s: float | None) -> None:
        """Until there is something to read, or everything is done."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return

    async def _until_end(self, everything: asyncio.Future[Any]) -> None:
        while not everything.done() and self._error is None:
            self._news.clear()
            await self._news.wait()

    def _take(self) -> list[Delta]:
        """The deltas that wait, one for each choice."""
        deltas, self._deltas = self._deltas, []
        if self._error is None:
            self._news.clear()
        merged: dict[int, Delta] = {}
        for delta in deltas:
            if earlier := merged.get(delta.index):
                delta = replace(
                    delta,
                    text=earlier.text + delta.text,
                    logprobs=(*earlier.logprobs, *delta.logprobs),
                    tool_calls=(*earlier.tool_calls, *delta.tool_calls),
                )
            merged[delta.index] = delta
        return list(merged.values())

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """End it: nobody reads the frames any more."""
        self._fail(TuneloomError("The caller of this request is gone."))

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._news.set()

    async def _choose(self, index: int, prompt: Encoded) -> None:
        try:
            async with self._turns:
                await self._sample_in_turn(index, prompt)
        except Exception as error:
            self._fail(error)

    async def _sample_in_turn(self, index: int, prompt: Encoded) -> None:
        """Generate one choice. Once others of the request have text, it waits for room instead of being refused."""
        while True:
            try:
                return await self._sample(index, prompt)
            except Overloaded:
                if not self._completion_tokens or index in self._begun:
                    raise
            await asyncio.sleep(FULL_PAUSE_S)

    async def _sample(self, index: int, prompt: Encoded) -> None:
        """Generate one choice, up to a stop id, a stop string or its number of tokens."""
        params, n = self._request.params, self._request.params.n
        choice = _Choice(self._codec, prompt.form, params.stop, params.logprobs)
        async with aclosing(self._engine.generate(self._sequence(index, prompt))) as outputs:
            async for output in outputs:
                if prompt.echo and index not in self._begun:
                    self._put(Delta(index, prompt.echo))
                self._begun.add(index)
                if index % n == 0:
                    self._cached_tokens[index // n] = max(self._cached_tokens[index // n], output.cached_tokens)
                # One by one: what the engine wrote behind a stop string is no part of the answer, nor of its usage.
                for tokens, reason in _one_by_one(output):
                    self._completion_tokens += len(tokens)
                    delta = choice.push(index, tokens, reason)
                    if delta.text or delta.logprobs or delta.tool_calls or delta.finish_reason:
                        self._put(delta)
                    if delta.finish_reason:
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
            id=f"{self._name}-{index}",
            prompt_ids=prompt.ids,
            params=replace(request.params, n=1, stop=(), max_tokens=prompt.max_tokens, seed=seed),
            stop_ids=self._codec.stop_ids,
            owner=request.owner,
            adapter=request.adapter,
            deadline_s=request.deadline_s,
            priority=request.priority,
            grammar=prompt.form.grammar,
            meter=self._meters[index],
        )


def _one_by_one(output: SequenceOutput) -> list[tuple[tuple[TokenOutput, ...], FinishReason | None]]:
    """The tokens of an output, the last of them with its finish reason, which may come without a token."""
    if not output.tokens:
        return [((), output.finish_reason)]
    *others, last = output.tokens
    return [*(((token,), None) for token in others), ((last,), output.finish_reason)]


class _Choice:
    """One choice as it grows: its text and calls, and the log-probabilities of tokens that show in the text.

    Stop strings are looked for in the text only: they do not cut a call.
    """

    def __init__(self, codec: "Codec", form: Form, stop: tuple[str, ...], logprobs: int | None) -> None:
        from tuneloom.engine.text_stream import StopStrings, TextStream

        self._codec = codec
        self._form = form
        self._written = TextStream(codec, shown=form.shown)
        self._calls = form.parser(codec)
        self._stops = StopStrings(stop)
        self._wants_logprobs = logprobs is not None
        self._waiting: list[tuple[int, TokenLogprob]] = []
        self._token_bytes = 0
        self._text_bytes = 0

    def push(self, index: int, tokens: tuple[TokenOutput, ...], reason: FinishReason | None) -> Delta:
        """What is new in choice `index`, and why it ends, if it does."""
        is_final = reason is not None
        text, _ = self._written.push([token.token_id for token in tokens], final=is_final)
        calls: tuple[ToolCallDelta, ...] = ()
        num_calls = 0
        if self._calls is not None:
            text, calls = self._calls.push(text, final=is_final)
            num_calls = self._calls.num_calls
        text, is_stopped = self._stops.push(text, final=is_final or num_calls > 0)
        self._text_bytes += len(text.encode())
        if is_stopped:
            return Delta(index, text, self._logprobs(tokens, "stop", True), "stop")
        logprobs = self._logprobs(tokens, reason, num_calls > 0)
        return Delta(index, text, logprobs, self._form.finish_reason(reason, num_calls), calls)

    def _logprobs(
        self, tokens: tuple[TokenOutput, ...], reason: FinishReason | None, is_cut: bool
    ) -> tuple[TokenLogprob, ...]:
        """Entries of the tokens whose text is out; those of a stop string, stop id or call never are."""
        if not self._wants_logprobs:
            return ()
        for token in tokens:
            if token.logprob is not None and token.token_id not in self._codec.stop_ids:
                entry = self._entry(token.token_id, token.logprob, token.top)
                self._waiting.append((self._token_bytes, entry))
                self._token_bytes += len(entry.bytes)
        is_whole = reason is not None and not is_cut
        ready = [entry for start, entry in self._waiting if is_whole or start < self._text_bytes]
        self._waiting = self._waiting[len(ready) :]
        return tuple(ready)

    def _entry(self, id: int, logprob: float, top: tuple[tuple[int, float], ...] = ()) -> TokenLogprob:
        text, data = self._codec.token_text(id)
        return TokenLogprob(text, logprob, tuple(data), tuple(self._entry(*other) for other in top))
