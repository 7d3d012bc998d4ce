"""Keys and values of running sequences as one long row each. Token positions in, no scheduling.

Shapes: T tokens of the batch · H heads · C key/value heads · D head width · L positions · B cache slots
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from tuneloom.engine.blocks import BLOCK_TOKENS, BlockPool
from tuneloom.engine.kernels import Kernels
from tuneloom.engine.kv_cache import CacheBatch, KVShape, Layer, Move, decode, prefill
from tuneloom.engine.pages import lazy_zeros


class DenseCache:
    """One long row per sequence. Decode attention reads the rows of low slots as a view, without a gather.

    Address space for `num_slots * max_length` tokens and for `prefix_blocks` copies of blocks is reserved at once. On
    a CPU a page is used only once a token is written to it, so memory follows the longest sequence that each slot has
    held. Other devices pay for all of it. `token_budget` bounds what all sequences together may hold; None: as much as
    fits.
    """

    def __init__(
        self,
        shape: KVShape,
        num_slots: int,
        max_length: int,
        device: torch.device,
        *,
        token_budget: int | None = None,
        prefix_blocks: int = 0,
        kernels: Kernels | None = None,
    ) -> None:
        # The kernel takes 32 numbers of a head at a time.
        self._kernels = kernels if shape.width % 32 == 0 else None
        self.shape, self.num_slots, self.max_length = shape, num_slots, max_length
        self.num_tokens = num_slots * max_length if token_budget is None else min(num_slots * max_length, token_budget)
        self.pool = BlockPool(prefix_blocks)
        layers, groups, width = shape.num_layers, shape.num_groups, shape.width
        # One tensor for all layers: a block moves in one strided copy. A layer's part is contiguous.
        self._rows = lazy_zeros(layers, 2, num_slots, groups, max_length, width, dtype=shape.dtype, device=device)
        self._blocks = lazy_zeros(
            max(1, prefix_blocks), layers, 2, groups, BLOCK_TOKENS, width, dtype=shape.dtype, device=device
        )
        self._layers = [Layer(*self._rows[layer]) for layer in range(shape.num_layers)]
        self._free = list(range(num_slots))
        self._reserved: dict[int, int] = {}
        self._num_free_tokens = self.num_tokens

    @property
    def num_free_tokens(self) -> int:
        return self._num_free_tokens

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self, num_tokens: int, blocks: Sequence[int] = ()) -> int | None:
        """The lowest free slot, or None."""
        if not self._free or num_tokens > self._num_free_tokens:
            return None
        slot = heapq.heappop(self._free)
        self._reserved[slot] = num_tokens
        self._num_free_tokens -= num_tokens
        return slot

    def extend(self, slot: int, num_tokens: int) -> bool:
        more = max(0, num_tokens - self._reserved[slot])
        if more > self._num_free_tokens:
            return False
        self._reserved[slot] += more
        self._num_free_tokens -= more
        return True

    def release(self, slot: int, *, length: int, is_clean: bool) -> None:
        if not is_clean:
            self._rows[:, :, slot, :, :length] = 0
        self._num_free_tokens += self._reserved.pop(slot)
        heapq.heappush(self._free, slot)

    def compact(self, lengths: dict[int, int]) -> list[Move]:
        """Close gaps when they are more than a quarter of the rows that attention would read."""
        moves: list[Move] = []
        used = sorted(lengths)
        # The kernel finds a row wherever it is.
        if self._kernels is not None or not used or (used[-1] + 1 - len(used)) * 4 <= used[-1] + 1:
            return moves
        while used[-1] >= len(used):
            source = used.pop()
            target = heapq.heappop(self._free)
            length = lengths[source]
            self._rows[:, :, target, :, :length] = self._rows[:, :, source, :, :length]
            heapq.heappush(self._free, source)
            self._reserved[target] = self._reserved.pop(source)
            moves.append(Move(source, target))
            used = sorted([*used, target])
        return moves

    def save(self, slot: int, index: int) -> int | None:
        block = self.pool.take()
        if block is not None:
            self._blocks[block] = self._rows[:, :, slot, :, index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
        return block

    def attach(self, slot: int, index: int, blocks: Sequence[int]) -> None:
        for at, block in enumerate(blocks, index):
            self._rows[:, :, slot, :, at * BLOCK_TOKENS : (at + 1) * BLOCK_TOKENS] = self._blocks[block]

    def share(self, slot: int, index: int, block: int) -> None:
        """Rows are nobody else's."""

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
        store = self._layers[layer]
        if self._kernels is not None:
            return self._kernels.attend(
                *(each.transpose(0, 1) for each in (query_HTD, key_CTD, value_CTD)),
                *(store.key_BCLD, store.value_BCLD, *batch.places),
                scaling=self.shape.width**-0.5 if scaling is None else scaling,
                window=window,
            )
        parts = []
        if batch.num_decoding:
            count = batch.num_decoding
            store.key_BCLD[batch.slots_T, :, batch.positions_T] = key_CTD[:, :count].transpose(0, 1)
            store.value_BCLD[batch.slots_T, :, batch.positions_T] = value_CTD[:, :count].transpose(0, 1)
            parts.append(decode(store, query_HTD[:, :count].transpose(0, 1), batch, scaling, window))
        for chunk in batch.chunks:
            tokens = slice(chunk.start, chunk.start + chunk.length)
            places = slice(chunk.past, chunk.past + chunk.length)
            store.key_BCLD[chunk.slot, :, places] = key_CTD[:, tokens]
            store.value_BCLD[chunk.slot, :, places] = value_CTD[:, tokens]
            parts.append(prefill(store, query_HTD[:, tokens], batch, chunk, scaling, window))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
