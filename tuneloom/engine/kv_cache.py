"""Keys and values of running sequences, and attention over them. Token positions in, no scheduling.

Shapes: T tokens of the batch · H heads · C key/value heads · Q = H / C · D head width · L positions · B cache slots
"""

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tuneloom.engine.blocks import BLOCK_TOKENS, BlockPool
from tuneloom.engine.kernels import Kernels
from tuneloom.engine.pages import lazy_zeros
from tuneloom.errors import InvalidRequest

# Length of the decode view is rounded up, so that its shape, and what the allocator keeps for it, changes rarely.
_LENGTH_STEP = 32


@dataclass(frozen=True)
class Chunk:
    """`length` prompt tokens from `start` in the batch, written behind `past` cached ones of their sequence."""

    slot: int
    start: int
    length: int
    past: int


@dataclass(frozen=True)
class Move:
    source: int
    target: int


class CacheBatch:
    """Where the tokens of one batch live: first one token for each decoding sequence, then chunks of prompts."""

    def __init__(self, slots: list[int], positions: list[int], chunks: list[Chunk], device: torch.device) -> None:
        self.slots, self.positions, self.chunks = slots, positions, chunks
        self.num_decoding = len(slots)
        self.num_rows = max(slots, default=-1) + 1
        self.is_dense = slots == list(range(len(slots)))
        self.slots_T = torch.tensor(slots, device=device)
        self.positions_T = torch.tensor(positions, device=device)
        longest = max(positions, default=0) + 1
        self.length = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
        self._masks: dict[tuple[object, ...], Tensor] = {}

    @functools.cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """The slot and the position of every token."""
        slots, positions = list(self.slots), list(self.positions)
        for chunk in self.chunks:
            slots += [chunk.slot] * chunk.length
            positions += range(chunk.past, chunk.past + chunk.length)
        return torch.tensor(slots), torch.tensor(positions)

    def decode_start(self, window: int | None) -> int:
        """The first position that any decoding row sees."""
        return max(0, min(self.positions) - window + 1) if window else 0

    def decode_mask(self, window: int | None, length: int, like: Tensor) -> Tensor:
        """Additive mask (rows, 1, 1, length from `decode_start`)."""
        key = ("decode", window, length)
        if key not in self._masks:
            rows = self.positions_T.new_zeros(self.num_rows).index_copy_(0, self.slots_T, self.positions_T)[:, None]
            seen = torch.arange(self.decode_start(window), length, device=like.device)[None]
            self._masks[key] = _additive(_visible(rows, seen, window), like)[:, None, None]
        return self._masks[key]

    def chunk_mask(self, chunk: Chunk, window: int | None, start: int, repeats: int, like: Tensor) -> Tensor:
        """Additive mask (repeats * length, positions from `start`), the same for each of a group's heads."""
        key = (chunk, window)
        if key not in self._masks:
            end = chunk.past + chunk.length
            rows = torch.arange(chunk.past, end, device=like.device)[:, None]
            seen = torch.arange(start, end, device=like.device)[None]
            self._masks[key] = _additive(_visible(rows, seen, window), like).repeat(repeats, 1)
        return self._masks[key]


@dataclass(frozen=True)
class KVShape:
    """What a base keeps of each token: for each layer, keys and values of `num_groups` heads of `width` numbers."""

    num_layers: int
    num_groups: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> "KVShape":
        """That of a Hugging Face text config, whose optional fields default as the models themselves do it."""
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, groups, width, dtype)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_groups * self.width * self.dtype.itemsize

    def check(self, key_CTD: Tensor, value_CTD: Tensor) -> None:
        """Raise InvalidRequest unless a layer's keys and values have this shape."""
        for each in (key_CTD, value_CTD):
            if (each.shape[0], each.shape[2]) != (self.num_groups, self.width):
                raise InvalidRequest(
                    f"a layer has keys and values of {each.shape[0]} x {each.shape[2]} numbers a token, "
                    f"its config says {self.num_groups} x {self.width}"
                )


class KVCache(Protocol):
    """Room for the keys and values of sequences: a slot each, and tokens out of one budget that all share.

    A sequence writes only what it has reserved. `num_tokens` is the budget; `num_free_tokens` of it are unreserved.
    `pool` numbers the blocks in which prefixes are kept.
    """

    shape: KVShape
    pool: BlockPool

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_free_tokens(self) -> int: ...

    @property
    def num_free(self) -> int:
        """Slots that no sequence has."""
        ...

    def acquire(self, num_tokens: int, blocks: Sequence[int] = ()) -> int | None:
        """A free slot with room for `num_tokens`; None when no slot is free or the budget has not so many left.

        `blocks` are about to be attached from the first on: they take no room where blocks are shared.
        """
        ...

    def extend(self, slot: int, num_tokens: int) -> bool:
        """Let the slot hold `num_tokens` in all; False, with nothing changed, when the budget has not so many left."""
        ...

    def release(self, slot: int, *, length: int, is_clean: bool) -> None:
        """Free a slot that holds `length` tokens. Unless `is_clean`, what it holds may not be finite and is wiped:
        masked positions are still multiplied by zero, and zero times NaN would reach the next sequence there.
        """
        ...

    def compact(self, lengths: dict[int, int]) -> list[Move]:
        """Move sequences to lower slots where that makes attention cheaper.

        `lengths`: the tokens in each slot in use. The caller renames its slots by the moves, in order.
        """
        ...

    def save(self, slot: int, index: int) -> int | None:
        """A block with the slot's tokens from `index * BLOCK_TOKENS` on, which the caller uses until it drops it in
        `pool`; None when there is no room for one.
        """
        ...

    def attach(self, slot: int, index: int, blocks: Sequence[int]) -> None:
        """Let the slot hold the tokens of `blocks` as its blocks from `index` on, within what it has reserved."""
        ...

    def share(self, slot: int, index: int, block: int) -> None:
        """The slot's block `index` has the same tokens as `block`: one of the two is enough."""
        ...

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
        """Write the batch's keys and values, and return (T, H, D) attention over what each token may see."""
        ...


@dataclass
class Layer:
    key_BCLD: Tensor
    value_BCLD: Tensor


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


def decode(store: Layer, query_THD: Tensor, batch: CacheBatch, scaling: float | None, window: int | None) -> Tensor:
    """One query per row. Heads that share keys go into the length axis: several times as fast as repeating the keys."""
    heads, width = query_THD.shape[1:]
    groups = store.key_BCLD.shape[1]
    rows = batch.num_rows
    if not batch.is_dense:
        query_THD = query_THD.new_zeros(rows, heads, width).index_copy_(0, batch.slots_T, query_THD)
    length = min(batch.length, store.key_BCLD.shape[2])
    seen = slice(batch.decode_start(window), length)
    out = F.scaled_dot_product_attention(
        query_THD.reshape(rows, groups, heads // groups, width),
        store.key_BCLD[:rows, :, seen],
        store.value_BCLD[:rows, :, seen],
        attn_mask=batch.decode_mask(window, length, query_THD),
        scale=scaling,
    ).reshape(rows, heads, -1)
    return out if batch.is_dense else out.index_select(0, batch.slots_T)


def prefill(
    store: Layer, query_HTD: Tensor, batch: CacheBatch, chunk: Chunk, scaling: float | None, window: int | None
) -> Tensor:
    heads, length, width = query_HTD.shape
    groups = store.key_BCLD.shape[1]
    end = chunk.past + length
    start = max(0, chunk.past - window + 1) if window else 0
    key = store.key_BCLD[chunk.slot : chunk.slot + 1, :, start:end]
    value = store.value_BCLD[chunk.slot : chunk.slot + 1, :, start:end]
    if chunk.past == 0 and not (window and length > window):
        out = F.scaled_dot_product_attention(
            query_HTD[None], key, value, is_causal=True, scale=scaling, enable_gqa=heads > groups
        )[0]
        return out.transpose(0, 1)
    repeats = heads // groups
    out = F.scaled_dot_product_attention(
        query_HTD.reshape(1, groups, repeats * length, width),
        key,
        value,
        attn_mask=batch.chunk_mask(chunk, window, start, repeats, query_HTD),
        scale=scaling,
    )
    return out.reshape(heads, length, -1).transpose(0, 1)


def _visible(rows: Tensor, seen: Tensor, window: int | None) -> Tensor:
    visible = seen <= rows
    return visible & (seen > rows - window) if window else visible


def _additive(visible: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(visible, dtype=like.dtype).masked_fill_(~visible, float("-inf"))
