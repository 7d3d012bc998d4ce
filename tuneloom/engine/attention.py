"""Our attention in the models of transformers: what a step carries to it, and how the models call it. No arithmetic.

Shapes: T tokens of the batch · H heads · C key/value heads · D head width
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from tuneloom.engine.kv_cache import CacheBatch, KVCache
from tuneloom.errors import InvalidRequest

ATTENTION = "tuneloom"
# Arguments by which some attentions differ from the plain one that is computed here.
_FOREIGN_ARGUMENTS = ("softcap", "s_aux", "position_bias")


@dataclass
class StepAttention:
    """What travels with a forward call to each attention layer."""

    cache: KVCache
    batch: CacheBatch
    num_calls: int = 0
    num_windowed: int = 0

    def attend(
        self,
        layer: int,
        query_HTD: Tensor,
        key_CTD: Tensor,
        value_CTD: Tensor,
        *,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """(T, H, D) of one layer; its keys and values are in the cache afterwards."""
        self.num_calls += 1
        self.num_windowed += window is not None
        return self.cache.attend(layer, query_HTD, key_CTD, value_CTD, self.batch, scaling=scaling, window=window)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tuneloom: StepAttention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """The attention function of the models; query [1, H, T, D] to [1, T, H, D]."""
    foreign = [name for name in _FOREIGN_ARGUMENTS if arguments.get(name) is not None]
    if foreign:
        raise InvalidRequest(f"its attention uses {', '.join(foreign)}, which the engine's does not")
    out = tuneloom.attend(module.layer_idx, query[0], key[0], value[0], scaling=scaling, window=sliding_window)
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, attend)
