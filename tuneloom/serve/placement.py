"""Which replica of a base a request should go to: pure arithmetic over names and queue lengths. No Ray.

Placement is computed, not agreed on: every gateway comes to the same order of replicas for a key by hashing the two
together (rendezvous hashing, Thaler and Ravishankar 1998), so that an adapter or a conversation meets its warm caches
without anyone telling where they are. A replica that comes or goes moves only its own share of the keys. No replica
gets more than a bound over the mean (consistent hashing with bounded loads, Mirrokni et al. 2017): what is over it goes
to the next in the key's order.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from tuneloom.generation import ChatPrompt, GenerationRequest, TextPrompt, TokenPrompt

# A prompt's beginning decides where it goes; a shorter one has too little to find in a prefix cache.
PREFIX_CHARS = 1024
MIN_PREFIX_CHARS = 256
# A prompt of token ids: as much text as about that many characters.
PREFIX_TOKENS = 256
MIN_PREFIX_TOKENS = 64
MAX_KEYS = 10_000


@dataclass(frozen=True)
class RoutingKey:
    """What a request would like to find warm: an adapter, the beginning of a prompt, both or neither ("")."""

    adapter: str = ""
    prefix: str = ""

    @classmethod
    def of(cls, request: GenerationRequest) -> "RoutingKey":
        return cls(request.adapter.sha256 if request.adapter else "", _prefix(request))

    @classmethod
    def parse(cls, text: str) -> "RoutingKey":
        """From the form that `str` gives."""
        adapter, _, prefix = text.partition("/")
        return cls(adapter, prefix)

    def __str__(self) -> str:
        return f"{self.adapter}/{self.prefix}" if self.adapter or self.prefix else ""

    @property
    def main(self) -> str:
        """What decides first. A bare base is everywhere, so there the prompt does."""
        return self.adapter or self.prefix


class Placement:
    """The order in which replicas are asked, for one base as one gateway sees it. Not thread-safe.

    `load_factor`, `slack`: a replica is over its bound when its queue is over `load_factor` x the mean + `slack`.
    `rate_per_replica`: requests per second of one key for each replica that shares it; a key has 1, then 2, 4, ... .
    """

    def __init__(
        self,
        *,
        load_factor: float = 1.25,
        slack: int = 2,
        rate_per_replica: float = 4.0,
        window_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load_factor = load_factor
        self._slack = slack
        self._rate_per_replica = rate_per_replica
        self._rates = Rates(window_s, clock)

    def count(self, key: RoutingKey) -> None:
        """A request with this key has come."""
        if key.main:
            self._rates.add(key.main)

    def order(self, key: RoutingKey, loads: Mapping[str, int]) -> list[str]:
        """All replicas of `loads` (requests at each), the one to ask first at the front."""
        if not key.main:
            return sorted(loads, key=lambda replica: (loads[replica], replica))
        ranking = rendezvous(key.main, loads)
        spread = self.spread(key)
        head, tail = ranking[:spread], ranking[spread:]
        # Those that share a busy adapter: a conversation keeps to one of them, anything else goes where it is quiet.
        head = rendezvous(key.prefix, head) if key.adapter and key.prefix else sorted(head, key=loads.__getitem__)
        bound = self.bound(loads)
        preferred = [replica for replica in head + tail if loads[replica] < bound]
        full = [replica for replica in ranking if loads[replica] >= bound]
        return preferred + sorted(full, key=loads.__getitem__)

    def spread(self, key: RoutingKey) -> int:
        """How many replicas share this key by its rate, were there that many."""
        needed = self._rates.get(key.main) / self._rate_per_replica
        return 1 if needed <= 1 else 1 << math.ceil(math.log2(needed))

    def bound(self, loads: Mapping[str, int]) -> int:
        """The queue from which on a replica is passed over while others are below it."""
        return math.ceil(self._load_factor * sum(loads.values()) / max(len(loads), 1)) + self._slack


class Rates:
    """Requests per second of many keys, each a counter that decays over `window_s`."""

    def __init__(self, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._clock = clock
        self._counters: dict[str, tuple[float, float]] = {}

    def add(self, key: str) -> None:
        # The most lately counted is last, so that the quiet ones are at the front.
        rate = self.get(key)
        self._counters.pop(key, None)
        self._counters[key] = (rate + 1 / self._window_s, self._clock())
        if len(self._counters) > MAX_KEYS:
            del self._counters[next(iter(self._counters))]

    def get(self, key: str) -> float:
        rate, at = self._counters.get(key, (0.0, 0.0))
        return rate * math.exp((at - self._clock()) / self._window_s) if rate else 0.0


def rendezvous(key: str, replicas: Iterable[str]) -> list[str]:
    """The replicas in the order that the key gives them: the same in every process, for every set that holds them."""
    return sorted(replicas, key=lambda replica: _weight(key, replica), reverse=True)


def _weight(key: str, replica: str) -> bytes:
    return blake2b(replica.encode(), key=blake2b(key.encode(), digest_size=16).digest(), digest_size=8).digest()


def _prefix(request: GenerationRequest) -> str:
    """A name for how the first prompt begins, by owner, since prefix caches are; "" if there is little to share."""
    match request.prompts[0]:
        case ChatPrompt(messages=messages):
            beginning, enough = _opening(messages), MIN_PREFIX_CHARS
        case TextPrompt(text=text):
            beginning, enough = text[:PREFIX_CHARS], MIN_PREFIX_CHARS
        case TokenPrompt(token_ids=ids):
            beginning, enough = ",".join(map(str, ids[:PREFIX_TOKENS])), 2 * MIN_PREFIX_TOKENS
    if len(beginning) < enough:
        return ""
    return blake2b(f"{request.owner}\0{beginning}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _opening(messages: Iterable[Mapping[str, Any]]) -> str:
    """The messages up to the first of the user: what every later turn of the same conversation begins with, too."""
    text = ""
    for message in messages:
        text += message.get("content") or ""
        if message.get("role") == "user" or len(text) >= PREFIX_CHARS:
            break
    return text[:PREFIX_CHARS]
