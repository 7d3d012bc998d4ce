"""Our engine, driven as a replica drives it: through the asyncio face, all requests at once or a few at a time."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.inputs import Setup, fetch
from tuneloom.domain import AdapterRef
from tuneloom.engine.base import SequenceRequest
from tuneloom.engine.engine import LocalEngine
from tuneloom.engine.options import EngineConfig
from tuneloom.generation import SamplingParams

_numbers = itertools.count()


@dataclass(frozen=True)
class Answer:
    """`first_s` and `total_s` count from when the request was made."""

    tokens: tuple[int, ...]
    first_s: float
    total_s: float
    cached_tokens: int


@dataclass(frozen=True)
class Outcome:
    elapsed_s: float
    answers: list[Answer]

    @property
    def tokens_per_s(self) -> float:
        return sum(len(answer.tokens) for answer in self.answers) / self.elapsed_s


class Ours:
    """One engine with its own event loop."""

    def __init__(self, setup: Setup, get_folder: Callable[[AdapterRef], Path], **options: Any) -> None:
        config = EngineConfig(**{"dtype": setup.dtype, "threads": setup.threads, **options})
        self.engine = LocalEngine(setup.base, config, get_folder)
        self._now = setup.now
        self._runner = asyncio.Runner()
        self._runner.run(self.engine.start())

    def run(self, requests: Sequence[SequenceRequest], *, at_once: int | None = None) -> Outcome:
        """Answer all requests, at most `at_once` at a time."""
        return self._runner.run(answer_all(self.engine, requests, at_once=at_once, now=self._now))

    def do(self, work: Any) -> Any:
        """Run a coroutine on the engine's loop."""
        return self._runner.run(work)

    def close(self) -> None:
        self._runner.run(self.engine.close())
        self._runner.close()


@contextmanager
def open_engine(setup: Setup, get_folder: Callable[[AdapterRef], Path] = fetch, **options: Any) -> Iterator[Ours]:
    ours = Ours(setup, get_folder, **options)
    try:
        yield ours
    finally:
        ours.close()


def requests(
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    adapters: Sequence[AdapterRef] = (),
    *,
    owner: str = "bench",
    params: SamplingParams | None = None,
) -> list[SequenceRequest]:
    """A greedy request of `new_tokens` for each prompt, over the adapters in turn; nothing ends it before."""
    chosen = params or SamplingParams(max_tokens=new_tokens, temperature=0.0)
    return [
        SequenceRequest(
            id=f"r{next(_numbers)}",
            prompt_ids=tuple(prompt),
            params=chosen,
            stop_ids=frozenset(),
            owner=owner,
            adapter=adapters[i % len(adapters)] if adapters else None,
            deadline_s=3600.0,
        )
        for i, prompt in enumerate(prompts)
    ]


async def answer_all(
    engine: LocalEngine, asked: Sequence[SequenceRequest], *, at_once: int | None, now: Callable[[], float]
) -> Outcome:
    places = asyncio.Semaphore(at_once or max(1, len(asked)))

    async def one(request: SequenceRequest) -> Answer:
        async with places:
            return await answer(engine, request, now=now)

    started = now()
    answers = await asyncio.gather(*(one(request) for request in asked))
    return Outcome(now() - started, list(answers))


async def answer(
    engine: LocalEngine,
    request: SequenceRequest,
    on_tokens: Callable[[int], None] = lambda count: None,
    *,
    now: Callable[[], float] = time.perf_counter,
) -> Answer:
    """One answer; `on_tokens` hears of each hand-over's number of tokens."""
    started = now()
    tokens: list[int] = []
    first_s, cached = 0.0, 0
    async for output in engine.generate(request):
        if output.tokens and not tokens:
            first_s = now() - started
        tokens += [token.token_id for token in output.tokens]
        cached = max(cached, output.cached_tokens)
        on_tokens(len(output.tokens))
    return Answer(tuple(tokens), first_s, now() - started, cached)
