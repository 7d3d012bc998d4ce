"""Log-probabilities of tokens that are given, computed as a prompt is read: in a step's chunks, through the cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tuneloom.domain import AdapterRef
from tuneloom.engine.adapters import AdapterCache
from tuneloom.engine.assembly import Assembly
from tuneloom.errors import Overloaded

# Logits held at once, in numbers: 64 MB in fp32.
LOGITS_AT_ONCE = 16 << 20


def score(
    parts: Assembly,
    adapters: AdapterCache,
    ids: Sequence[int],
    places: Sequence[int],
    adapter: AdapterRef | None,
    *,
    timeout_s: float,
) -> list[float]:
    """`EngineCore.score`. `timeout_s` bounds the load of the adapter."""
    assert places and min(places) > 0, "the first token follows from nothing"
    cache_slot = parts.cache.acquire(len(ids))
    if cache_slot is None:
        raise Overloaded("The cache has no room for these tokens.", retry_after_s=1.0)
    try:
        with _slot_of(adapters, adapter, timeout_s) as adapter_slot:
            return _read(parts, ids, sorted(places), cache_slot, adapter_slot)
    finally:
        parts.cache.release(cache_slot, length=len(ids), is_clean=False)


def _read(
    parts: Assembly, ids: Sequence[int], places: Sequence[int], cache_slot: int, adapter_slot: int
) -> list[float]:
    found: list[float] = []
    # The logits behind a token speak of the next; those of the last place are the last that matter.
    end = places[-1]
    step = parts.max_step_tokens
    for start in range(0, end, step):
        piece = ids[start : min(start + step, end)]
        wanted = [at for at in places if start < at <= start + len(piece)]
        keep = [at - 1 - start for at in wanted]
        logits_KV = parts.runner.read(piece, start, keep, cache_slot=cache_slot, adapter_slot=adapter_slot)
        if logits_KV is not None:
            found += _log_probs(logits_KV, [ids[at] for at in wanted])
    return found


def _log_probs(logits_KV: Tensor, ids: Sequence[int]) -> list[float]:
    found: list[float] = []
    size = max(1, LOGITS_AT_ONCE // logits_KV.shape[-1])
    for at in range(0, len(ids), size):
        part = logits_KV[at : at + size].float()
        chosen = torch.tensor(ids[at : at + size], device=part.device)[:, None]
        found += (part.gather(-1, chosen).squeeze(-1) - part.logsumexp(-1)).tolist()
    return found


@contextmanager
def _slot_of(adapters: AdapterCache, adapter: AdapterRef | None, timeout_s: float) -> Iterator[int]:
    """The adapter's slot, loaded and held; 0 for the base."""
    if adapter is None:
        yield 0
        return
    adapters.expect(adapter)
    slot = None
    try:
        adapters.prefetch(adapter).result(timeout_s)
        slot = adapters.acquire(adapter)
        if slot is None:
            raise Overloaded("All adapter slots are in use.", retry_after_s=1.0)
    finally:
        if slot is None:
            adapters.forget(adapter)
    try:
        yield slot
    finally:
        adapters.release(adapter)
