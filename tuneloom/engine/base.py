"""The engine seam: token ids in, token ids out, over one base and many adapters. No text, no Ray, no store."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from tuneloom.domain import AdapterRef
from tuneloom.generation import FinishReason, SamplingParams


@dataclass(eq=False)
class Meter:
    """What one sequence has taken of the device so far: its share of the time of each step, by tokens computed.

    The engine adds to it, also after whoever asked has gone; others read.
    """

    device_s: float = 0.0


@dataclass(frozen=True)
class SequenceRequest:
    """One generation. `params.n`, `stop` and `max_tokens` None are resolved before: here n is 1, `stop` is unused
    and `max_tokens` is a number. Generation ends after a token of `stop_ids`, which is reported with the rest.

    `priority`: the higher goes first among sequences of one owner; between owners tokens are shared fairly.
    `grammar`: a grammar in llguidance's JSON form that the output must follow.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    owner: str
    adapter: AdapterRef | None = None
    deadline_s: float = 600.0
    priority: int = 0
    grammar: str | None = None
    meter: Meter = field(default_factory=Meter, compare=False)


@dataclass(frozen=True)
class TokenOutput:
    """A sampled token; `logprob` and `top` (token id, logprob) only if the request asks for logprobs."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SequenceOutput:
    """What one hand-over brings for one sequence. `finish_reason` is set on the last: `stop` (a stop id), `length`."""

    tokens: tuple[TokenOutput, ...]
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class AdapterState:
    """An adapter that an engine knows. `tier`: `slot`, `host`, `loading`, `failed` (a while ago) or `none`."""

    sha256: str
    tier: str
    rank: int
    size_bytes: int
    in_use: int
    is_pinned: bool
    last_used_at: float


@dataclass(frozen=True)
class TierStats:
    """One tier that adapters live in: what it holds, its limit, and what has happened since the start.

    `hits` and `misses` count requests for an adapter that reached this tier; `fills` adapters that came into it,
    `fill_s` the seconds that took in all; `failures` fills that failed.
    """

    count: int
    size_bytes: int
    limit_bytes: int
    hits: int
    misses: int
    fills: int
    evictions: int
    failures: int
    fill_s: float


@dataclass(frozen=True)
class EngineStats:
    """Numbers of one engine as of its last step.

    `waiting_tokens`: tokens that waiting sequences must compute before their next one: what the queue costs.
    `kv_tokens_used`: tokens that running sequences have reserved of the `kv_tokens_total` that fit.
    `step_ms`, `step_tokens`, `tokens_per_s`: moving means of a step's time, of the tokens it computes (prompt and
    answer), and of answer tokens per second of step time. `preemptions`: running sequences that gave up their place
    for want of cache room and were computed anew later. `tiers`: `slot`, `host` and, where a replica has one, `disk`.
    `busy_s`: the time of all steps since the start.
    """

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    steps: int
    step_ms: float
    tokens_generated: int
    adapter_loads: int
    adapter_evictions: int
    waiting_tokens: int = 0
    preemptions: int = 0
    step_tokens: float = 0.0
    tokens_per_s: float = 0.0
    tiers: dict[str, TierStats] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    busy_s: float = 0.0


class Engine(Protocol):
    """One base in one process. Methods are called from one asyncio loop; the work runs in a thread of the engine."""

    async def start(self) -> None: ...

    def generate(self, request: SequenceRequest) -> AsyncIterator[SequenceOutput]:
        """Tokens as they come. Closing the iterator aborts the sequence and frees its slot before the next step.

        Raises:
            Overloaded: too many requests wait, or the adapter did not load in time.
            AdapterRejected: the adapter does not fit this base.
            TuneloomError: the step failed; other sequences go on.
        """
        ...

    async def abort(self, id: str) -> None: ...

    async def load_adapter(self, ref: AdapterRef) -> None: ...

    async def evict_adapter(self, sha256: str) -> None: ...

    async def pin_adapter(self, ref: AdapterRef, is_pinned: bool) -> None: ...

    def adapters(self) -> list[AdapterState]: ...

    def stats(self) -> EngineStats: ...

    async def drain(self, timeout_s: float) -> None: ...

    async def close(self) -> None: ...
