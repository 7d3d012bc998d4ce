"""Rows end to end in one forward pass, each on its own: no padding is computed. Knows transformers' attention registry.

Positions begin anew with each row, attention stays inside it, and every other layer sees a flat list of tokens.
"""

# Shapes: B entries of a batch · T tokens · H heads of queries · K heads of keys and values · D width

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils import is_flash_attn_2_available

from tuneloom.train.attention import attend, groups_of

IGNORED = -100
# The name of our attention among transformers'.
ATTENTION = "tuneloom_rows"
# How far the states of a row may be, packed and alone, as a share of their size.
_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_16_BIT = 0.04
_TRIAL_LENGTHS = (9, 9, 4, 13)


def pack(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """One model input of (ids, labels) of each row; a label says what is learned at its own token."""
    borders = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    labels = np.concatenate([labels for _, labels in rows]).astype(np.int64)
    # What follows a row's last token is another row.
    labels[borders[:-1]] = IGNORED
    positions = np.concatenate([np.arange(len(ids)) for ids, _ in rows])
    starts = torch.from_numpy(borders.astype(np.int32))
    longest = int(np.diff(borders).max())
    return {
        "input_ids": torch.from_numpy(np.concatenate([ids for ids, _ in rows]).astype(np.int64))[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def pad(rows: Sequence[tuple[np.ndarray, np.ndarray]], pad_id: int) -> dict[str, Tensor]:
    """The same rows one below the other, filled up at their ends."""
    longest = max(len(ids) for ids, _ in rows)
    found = {
        "input_ids": np.full((len(rows), longest), pad_id, np.int64),
        "labels": np.full((len(rows), longest), IGNORED, np.int64),
        "attention_mask": np.zeros((len(rows), longest), np.int64),
    }
    for number, (ids, labels) in enumerate(rows):
        found["input_ids"][number, : len(ids)] = ids
        found["labels"][number, : len(ids)] = labels
        found["attention_mask"][number, : len(ids)] = 1
    return {name: torch.from_numpy(values) for name, values in found.items()}


def try_packing(model: PreTrainedModel) -> str | None:
    """Set `model` up for packed rows if it gives them the same states as each row alone; else the reason.

    A model that keeps something across tokens besides attention, or whose attention is not in the registry, does not.
    """
    before = model.config._attn_implementation
    vocabulary = model.config.get_text_config().vocab_size
    rows = [(ids, ids) for ids in (np.arange(1, length + 1) * 7 % vocabulary for length in _TRIAL_LENGTHS)]
    was_training = model.training
    model.eval()
    try:
        apart = pad(rows, 0)
        expected = _states(model, apart)[apart["attention_mask"].bool()]
        model.set_attn_implementation(_implementation(model))
        found = _states(model, pack(rows))[0]
        if ((found - expected).norm() / expected.norm()).item() <= _TOLERANCE.get(model.dtype, _TOLERANCE_16_BIT):
            return None
        reason = "rows end to end would change each other in this base"
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        reason = f"this base does not take rows end to end ({str(error)[:100]})"
    finally:
        model.train(was_training)
    model.set_attn_implementation(before)
    return reason


def _states(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """The last hidden states, (B, T, D), on the CPU."""
    given = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    del given["labels"]
    with torch.no_grad():
        return model.base_model(**given, use_cache=False).last_hidden_state.float().cpu()


def _implementation(model: PreTrainedModel) -> str:
    if model.device.type == "cpu":
        return ATTENTION
    has_kernel = model.dtype in (torch.bfloat16, torch.float16) and is_flash_attn_2_available()
    return "flash_attention_2" if has_kernel else "sdpa"


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer as the registry calls it: query (B, H, T, D), the result (B, T, H, D).

    Ours where borders of rows are given, and transformers' own for everything else that the model is asked.
    """
    needs_torch = any(others.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))
    if cu_seq_lens_q is None or attention_mask is not None or dropout or needs_torch:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **others,
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    groups = groups_of(cu_seq_lens_q.tolist())
    return attend(q_THD, k_TKD, v_TKD, groups, scale=scale, window=sliding_window)[None], None


def _mask(*, attention_mask: Tensor | None, allow_is_causal_skip: bool, use_vmap: bool, **others: Any) -> Any:
    """No mask for packed rows, which transformers tells apart by their positions; else that of torch's attention."""
    if attention_mask is None and not allow_is_causal_skip and not use_vmap:
        return None
    return sdpa_mask(
        attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, use_vmap=use_vmap, **others
    )


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
