"""What a new replica loads before it takes requests: of the adapters that the others work with, those it will get.

What was used is remembered by each replica for itself and asked of it when one more comes. No Ray, no engine.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tuneloom.domain import AdapterRef
from tuneloom.errors import TuneloomError
from tuneloom.serve.placement import Rates, rendezvous

logger = logging.getLogger(__name__)

# Use counts less the longer it is ago.
MEMORY_S = 600.0
MAX_USES = 1000
PARALLEL = 4


@dataclass(frozen=True)
class Use:
    """An adapter and how often it is asked for, in requests per second."""

    adapter: AdapterRef
    rate: float


class Usage:
    """Which adapters were asked for here lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._rates = Rates(MEMORY_S, clock)
        self._refs: dict[str, AdapterRef] = {}

    def add(self, adapter: AdapterRef) -> None:
        self._rates.add(adapter.sha256)
        self._refs.pop(adapter.sha256, None)
        self._refs[adapter.sha256] = adapter
        if len(self._refs) > MAX_USES:
            del self._refs[next(iter(self._refs))]

    def uses(self) -> list[Use]:
        """The most used first."""
        uses = [Use(ref, self._rates.get(sha256)) for sha256, ref in self._refs.items()]
        return sorted(uses, key=lambda use: -use.rate)


def share(used: Mapping[str, Iterable[Use]], newcomer: str, *, count: int, size_bytes: int) -> list[AdapterRef]:
    """The adapters that come first to `newcomer` beside the replicas of `used`, most used first, within the limits."""
    rates: dict[str, float] = {}
    refs: dict[str, AdapterRef] = {}
    for uses in used.values():
        for use in uses:
            refs[use.adapter.sha256] = use.adapter
            rates[use.adapter.sha256] = rates.get(use.adapter.sha256, 0.0) + use.rate
    chosen: list[AdapterRef] = []
    for sha256 in sorted(rates, key=lambda sha256: -rates[sha256]):
        if len(chosen) == count:
            break
        if refs[sha256].size_bytes > size_bytes or rendezvous(sha256, [*used, newcomer])[0] != newcomer:
            continue
        size_bytes -= refs[sha256].size_bytes
        chosen.append(refs[sha256])
    return chosen


async def load_all(adapters: Sequence[AdapterRef], load: Callable[[AdapterRef], Awaitable[None]]) -> None:
    """Load them a few at a time. One that cannot be loaded is left for the request that asks for it."""
    turns = asyncio.Semaphore(PARALLEL)

    async def one(adapter: AdapterRef) -> None:
        async with turns:
            try:
                await load(adapter)
            except TuneloomError as error:
                logger.warning("the adapter %s was not warmed up: %s", adapter.sha256[:12], error)

    await asyncio.gather(*(one(adapter) for adapter in adapters))
