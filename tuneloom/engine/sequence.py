"""One generation as the engine sees it while it lives. No tensors but the sampler's."""

from dataclasses import dataclass, field

from tuneloom.domain import AdapterRef
from tuneloom.engine.base import SequenceRequest
from tuneloom.engine.prefix import Chain
from tuneloom.engine.sampler import SamplingState
from tuneloom.generation import SamplingParams


@dataclass(eq=False)
class Sequence:
    """A request with its progress.

    `num_computed` tokens of prompt and answer have keys and values in the cache slot `cache_slot`. `adapter_slot` 0 is
    the base. While `cache_slot` is None it waits, since `waiting_since`; it may run, be preempted and wait again, and
    keeps its answer and the state of its sampling then. `number` tells the order of arrival.

    `num_cached` tokens of its prompt came from the prefix cache, in which `chain` names its blocks. `num_reached`: how
    far it had come when it was preempted.
    `num_charged` of its tokens have been put on its owner's account, and so will `load_bytes`: what was loaded for it.
    """

    request: SequenceRequest
    sampling: SamplingState
    arrived_at: float
    max_tokens: int
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    cache_slot: int | None = None
    adapter_slot: int = 0
    number: int = 0
    waiting_since: float = field(init=False)
    num_charged: int = 0
    load_bytes: int = 0
    num_cached: int = 0
    num_reached: int = 0
    chain: Chain = field(init=False)

    def __post_init__(self) -> None:
        self.waiting_since = self.arrived_at

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def adapter(self) -> AdapterRef | None:
        return self.request.adapter

    @property
    def adapter_key(self) -> str | None:
        return None if self.request.adapter is None else self.request.adapter.sha256

    @property
    def owner(self) -> str:
        return self.request.owner

    @property
    def deadline_at(self) -> float:
        return self.arrived_at + self.request.deadline_s

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def most_tokens(self) -> int:
        """Length of prompt and answer if the answer becomes as long as it may."""
        return len(self.request.prompt_ids) + self.max_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that must be computed before the next one can be sampled."""
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        return bool(self.output_ids) and self.num_pending == 1

    def skip_to(self, num_computed: int) -> None:
        """Tokens up to `num_computed` came from the prefix cache."""
        self.num_cached += max(0, num_computed - max(self.num_computed, self.num_reached))
        self.num_computed = num_computed

    def tokens(self, start: int, end: int) -> list[int]:
        """Ids of positions `start` to `end` of prompt and answer."""
        prompt = self.request.prompt_ids
        head = list(prompt[start:end])
        return head + self.output_ids[max(0, start - len(prompt)) : max(0, end - len(prompt))]
