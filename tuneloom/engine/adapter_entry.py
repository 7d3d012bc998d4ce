"""What an engine knows of one adapter, and the numbers it keeps of all of them. No threads, no decisions."""

from concurrent.futures import Future
from dataclasses import dataclass

from tuneloom.domain import AdapterRef
from tuneloom.engine.base import AdapterState, TierStats
from tuneloom.engine.lora import HostAdapter
from tuneloom.errors import TuneloomError


@dataclass
class Counters:
    """`slot_*` count requests that began to run, `host_*` requests that came while their adapter had no slot."""

    slot_hits: int = 0
    slot_fills: int = 0
    slot_fill_s: float = 0.0
    slot_evictions: int = 0
    host_hits: int = 0
    host_misses: int = 0
    host_evictions: int = 0
    loads: int = 0
    load_failures: int = 0
    load_s: float = 0.0

    def slot_tier(self, count: int, limit: int, slot_bytes: int) -> TierStats:
        """`count` of `limit` slots are taken, each of `slot_bytes`."""
        return TierStats(
            count=count,
            size_bytes=count * slot_bytes,
            limit_bytes=limit * slot_bytes,
            hits=self.slot_hits,
            misses=self.slot_fills,
            fills=self.slot_fills,
            evictions=self.slot_evictions,
            failures=0,
            fill_s=self.slot_fill_s,
        )

    def host_tier(self, count: int, size_bytes: int, limit_bytes: int) -> TierStats:
        return TierStats(
            count=count,
            size_bytes=size_bytes,
            limit_bytes=limit_bytes,
            hits=self.host_hits,
            misses=self.host_misses,
            fills=self.loads - self.load_failures,
            evictions=self.host_evictions,
            failures=self.load_failures,
            fill_s=self.load_s,
        )


@dataclass
class Entry:
    ref: AdapterRef
    host: HostAdapter | None = None
    slot: int | None = None
    loading: Future[None] | None = None
    is_urgent: bool = False
    failure: TuneloomError | None = None
    failed_at: float = 0.0
    num_waiting: int = 0
    num_running: int = 0
    is_pinned: bool = False
    evict_when_free: bool = False
    last_used_at: float = 0.0
    # What the totals of the cache hold of this entry.
    counted: tuple[int, int, int] = (0, 0, 0)

    @property
    def is_needed(self) -> bool:
        return bool(self.num_waiting or self.num_running or self.is_pinned)

    @property
    def tier(self) -> str:
        if self.slot is not None:
            return "slot"
        if self.host is not None:
            return "host"
        if self.loading is not None:
            return "loading"
        return "none" if self.failure is None else "failed"

    def state(self) -> AdapterState:
        return AdapterState(
            sha256=self.ref.sha256,
            tier=self.tier,
            rank=self.ref.rank,
            size_bytes=self.host.size_bytes if self.host else self.ref.size_bytes,
            in_use=self.num_running,
            is_pinned=self.is_pinned,
            last_used_at=self.last_used_at,
        )

    def count(self) -> tuple[int, int, int]:
        """Bytes in host memory, bytes there that only wait for a slot, bytes on their way."""
        size = self.host.size_bytes if self.host is not None else 0
        waiting = size if self.slot is None and self.num_waiting else 0
        return size, waiting, self.ref.size_bytes if self.loading is not None else 0


def finish(done: "Future[None]", failure: TuneloomError | None) -> None:
    """Set the outcome unless closing the cache was first."""
    if done.done():
        return
    if failure is not None:
        done.set_exception(copy_of(failure))
    else:
        done.set_result(None)


def copy_of(error: TuneloomError) -> TuneloomError:
    """The same error for another request; one exception object must not be raised twice."""
    copied = type(error)(error.message, param=error.param, code=error.code, retry_after_s=error.retry_after_s)
    copied.__cause__ = error
    return copied
