"""Keys and values in blocks that sequences share: the form for devices whose memory is taken once and for all.

Attention gathers the blocks of its sequences into a dense batch and goes on as the dense cache does.

Shapes: T tokens · H heads · C key/value heads · D head width · B sequences · P blocks of N tokens
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tuneloom.engine.blocks import BLOCK_TOKENS, BlockPool
from tuneloom.engine.kv_cache import CacheBatch, Chunk, KVShape, Layer, Move, decode, prefill
from tuneloom.engine.pages import lazy_zeros

# Stands behind the end of each sequence: attention multiplies what it masks by zero, so that must be finite.
_ZERO_BLOCK = 0


class PagedCache:
    """Room for `num_tokens` in blocks, rounded up to whole ones; a prefix that several sequences use is there once.

    What a sequence reserves are blocks of its own, which `attach` and `share` exchange for those of others.
    """

    def __init__(
        self, shape: KVShape, num_slots: int, max_length: int, device: torch.device, *, num_tokens: int
    ) -> None:
        self.shape, self.num_slots = shape, num_slots
        self.pool = BlockPool(_num_blocks(num_tokens), first=_ZERO_BLOCK + 1)
        size = (_ZERO_BLOCK + 1 + self.pool.num_blocks, BLOCK_TOKENS, shape.num_groups, shape.width)
        self._blocks = lazy_zeros(shape.num_layers, 2, *size, dtype=shape.dtype, device=device)
        self._table_BP = torch.full((num_slots, _num_blocks(max_length)), _ZERO_BLOCK, device=device)
        self._free = list(range(num_slots))
        self._held: dict[int, list[int]] = {}
        self._unclean: set[int] = set()
        self._step: _Step | None = None

    @property
    def num_tokens(self) -> int:
        return self.pool.num_blocks * BLOCK_TOKENS

    @property
    def num_free_tokens(self) -> int:
        """Idle prefix blocks count as free: they go when their room is needed."""
        return self.pool.num_free * BLOCK_TOKENS

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self, num_tokens: int, blocks: Sequence[int] = ()) -> int | None:
        left = self.pool.num_free - sum(self.pool.is_idle(block) for block in blocks)
        if not self._free or _num_blocks(num_tokens) - len(blocks) > left:
            return None
        slot = heapq.heappop(self._free)
        # Used before others are taken, which may evict what is idle.
        for block in blocks:
            self.pool.use(block)
        self._held[slot] = list(blocks)
        self._record(slot, 0, len(blocks))
        self.extend(slot, num_tokens)
        return slot

    def extend(self, slot: int, num_tokens: int) -> bool:
        held = self._held[slot]
        start, end = len(held), _num_blocks(num_tokens)
        if end - start > self.pool.num_free:
            return False
        held += [self._take() for _ in range(start, end)]
        self._record(slot, start, end)
        return True

    def release(self, slot: int, *, length: int, is_clean: bool) -> None:
        held = self._held.pop(slot)
        if not is_clean:
            # Others may use some of them still: each is wiped when it is taken anew.
            self._unclean.update(held)
        for block in reversed(held):
            self.pool.drop(block)
        self._table_BP[slot] = _ZERO_BLOCK
        heapq.heappush(self._free, slot)

    def compact(self, lengths: dict[int, int]) -> list[Move]:
        """No slot is cheaper than another."""
        return []

    def save(self, slot: int, index: int) -> int | None:
        block = self._held[slot][index]
        self.pool.use(block)
        return block

    def attach(self, slot: int, index: int, blocks: Sequence[int]) -> None:
        held = self._held[slot]
        for at, block in enumerate(blocks, index):
            self.pool.use(block)
            self.pool.drop(held[at])
            held[at] = block
        self._record(slot, index, index + len(blocks))

    def share(self, slot: int, index: int, block: int) -> None:
        if self._held[slot][index] != block:
            self.attach(slot, index, [block])

    def attend(
        self,
        layer: int,
        query_HTD: Tensor,
        key_CTD: Tensor,
        value_CTD: Tensor,
        batch: CacheBatch,
        *,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        self.shape.check(key_CTD, value_CTD)
        if self._step is None or self._step.batch is not batch:
            self._step = _Step(batch, self._table_BP)
        step = self._step
        key_PNCD, value_PNCD = self._blocks[layer]
        for store, new in ((key_PNCD, key_CTD), (value_PNCD, value_CTD)):
            store.view(-1, *store.shape[2:])[step.places_T] = new.transpose(0, 1)
        parts = []
        if batch.num_decoding:
            seen = step.decoding(window)
            query_THD = query_HTD[:, : batch.num_decoding].transpose(0, 1)
            parts.append(decode(_gather(key_PNCD, value_PNCD, seen), query_THD, seen.batch, scaling, window))
        for chunk in batch.chunks:
            seen = step.chunk(chunk, window)
            query = query_HTD[:, chunk.start : chunk.start + chunk.length]
            store = _gather(key_PNCD, value_PNCD, seen)
            parts.append(prefill(store, query, seen.batch, seen.batch.chunks[0], scaling, window))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _take(self) -> int:
        block = self.pool.take()
        assert block is not None
        if block in self._unclean:
            self._unclean.discard(block)
            self._blocks[:, :, block] = 0
        return block

    def _record(self, slot: int, start: int, end: int) -> None:
        if start < end:
            self._table_BP[slot, start:end] = torch.tensor(self._held[slot][start:end], device=self._table_BP.device)


@dataclass(frozen=True)
class _Seen:
    """The blocks (B, P) that some tokens see, and the batch of those tokens as the gathered blocks make it."""

    blocks_BP: Tensor
    batch: CacheBatch


class _Step:
    """Where the tokens of one batch are written, and what they see; the same for all layers of a kind."""

    def __init__(self, batch: CacheBatch, table_BP: Tensor) -> None:
        self.batch, self._table_BP = batch, table_BP
        self._seen: dict[tuple[object, ...], _Seen] = {}

    @cached_property
    def places_T(self) -> Tensor:
        """Of each token, its place among the tokens of all blocks."""
        slots, positions = list(self.batch.slots), list(self.batch.positions)
        for chunk in self.batch.chunks:
            slots += [chunk.slot] * chunk.length
            positions += range(chunk.past, chunk.past + chunk.length)
        slot_T, position_T = torch.tensor([slots, positions], device=self._table_BP.device)
        return self._table_BP[slot_T, position_T // BLOCK_TOKENS] * BLOCK_TOKENS + position_T % BLOCK_TOKENS

    def decoding(self, window: int | None) -> _Seen:
        if (window,) not in self._seen:
            batch = self.batch
            first = batch.decode_start(window) // BLOCK_TOKENS
            rows = list(range(batch.num_decoding))
            # Masks tell distances only, so blocks before the first one that is seen are left out of all positions.
            positions = [position - first * BLOCK_TOKENS for position in batch.positions]
            moved = CacheBatch(rows, positions, [], self._table_BP.device)
            blocks_BP = self._table_BP[batch.slots_T, first : first + _num_blocks(moved.length)]
            self._seen[window,] = _Seen(blocks_BP, moved)
        return self._seen[window,]

    def chunk(self, chunk: Chunk, window: int | None) -> _Seen:
        if (chunk, window) not in self._seen:
            first = max(0, chunk.past - window + 1) // BLOCK_TOKENS if window else 0
            end = _num_blocks(chunk.past + chunk.length)
            moved = Chunk(0, chunk.start, chunk.length, chunk.past - first * BLOCK_TOKENS)
            batch = CacheBatch([], [], [moved], self._table_BP.device)
            self._seen[chunk, window] = _Seen(self._table_BP[chunk.slot : chunk.slot + 1, first:end], batch)
        return self._seen[chunk, window]


def _gather(key_PNCD: Tensor, value_PNCD: Tensor, seen: _Seen) -> Layer:
    count = seen.blocks_BP.shape[0]
    index = seen.blocks_BP.flatten()
    return Layer(
        *(
            store.index_select(0, index).view(count, -1, *store.shape[2:]).transpose(1, 2)
            for store in (key_PNCD, value_PNCD)
        )
    )


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)
