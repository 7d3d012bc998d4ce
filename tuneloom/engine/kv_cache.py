"""What a cache of keys and values is, and attention over rows of one. Token positions in, no scheduling, no memory.

Shapes: T tokens of the batch · H heads · C key/value heads · Q = H / C · D head width · L positions · B cache slots
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tuneloom.engine.blocks import BlockPool
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
        """That of a Hugging Face text config, whose optional fields default as the models themselves do it.

        Where layers differ, the largest counts.
        """
        shapes = [_heads_of(layer) for layer in layer_configs(config)]
        groups, width = (max(sizes) for sizes in zip(*shapes, strict=True))
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


def layer_configs(config: Any) -> Sequence[Any]:
    """The configs of the layers that differ; one that stands for all where none does."""
    return config.per_layer_config if config.is_heterogeneous else [config]


def _heads_of(config: Any) -> tuple[int, int]:
    """Heads of keys, and their width."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return groups, getattr(config, "head_dim", None) or config.hidden_size // heads


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
