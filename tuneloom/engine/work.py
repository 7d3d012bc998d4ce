"""The words between the scheduler and those who carry out its plans: what a step computes, and what sequences need.

Integers only, no tensors, no decisions.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from tuneloom.engine.sequence import Sequence


class Outcome(Enum):
    """What became of an attempt to run a sequence.

    `REFUSED`: it never will. `COMPILING` its grammar or `LOADING` its adapter; `NO_SLOT` for its adapter, which is
    loaded; `NO_ROOM` in the cache.
    """

    ADMITTED = "admitted"
    REFUSED = "refused"
    COMPILING = "compiling"
    LOADING = "loading"
    NO_SLOT = "no slot"
    NO_ROOM = "no room"


class Resources(Protocol):
    """What sequences need to run."""

    def admit(self, sequence: Sequence) -> Outcome:
        """Give a waiting sequence a cache and an adapter slot, or change nothing."""
        ...

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether nothing but room is wanting for a waiting sequence."""
        ...

    def extend(self, sequence: Sequence) -> bool:
        """Make room in the cache for all tokens of a running sequence."""
        ...

    def goes_on(self, sequence: Sequence) -> bool:
        """Whether to compute the prompt of a running sequence now, or to wait for one that computes the same tokens.

        May shorten what is left of the prompt. True is to be followed by a chunk of it in this step.
        """
        ...

    def take_back(self, sequence: Sequence) -> None:
        """Take all from a running sequence, which will wait and be admitted again."""
        ...


@dataclass(frozen=True)
class Limits:
    """`options.EngineConfig` describes them. `cache_tokens` is what the cache holds."""

    max_running: int
    max_step_tokens: int
    cache_tokens: int
    max_step_ms: float = 200.0
    decode_weight: float = 2.0
    adapter_bytes_per_token: int = 1 << 20


@dataclass(frozen=True)
class Work:
    """One step: `decoding` sequences compute one token each, `prefilling` ones the given number.

    `resting` are the owners whose running sequences sit it out.
    """

    decoding: list[Sequence]
    prefilling: list[tuple[Sequence, int]]
    resting: frozenset[str] = frozenset()

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.decoding, *(sequence for sequence, _ in self.prefilling)]

    @property
    def num_prefill(self) -> int:
        return sum(count for _, count in self.prefilling)

    @property
    def num_tokens(self) -> int:
        return len(self.decoding) + self.num_prefill
