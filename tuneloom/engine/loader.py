"""Loads a base for the engine: device and number format, and whether its attention can be served. No batching.

Checkpoints are safetensors on local disk; no code of a base is run.
"""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tuneloom.errors import InvalidRequest

logger = logging.getLogger(__name__)

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Rope variants whose frequencies depend on the longest position in the batch; up to their first length they do not.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class LoadedModel:
    """`max_length`: positions for which a token's result does not depend on its batch."""

    model: PreTrainedModel
    body: nn.Module
    body_name: str
    device: torch.device
    dtype: torch.dtype
    max_length: int
    vocab_size: int


def load_model(folder: Path, dtype: str) -> LoadedModel:
    """Load the base in `folder`; `dtype` is `auto`, `bf16` or `fp32`.

    Raises:
        InvalidRequest: the engine cannot serve it; the message says why.
    """
    started = time.monotonic()
    _check_config(folder)
    device = pick_device()
    number_format = pick_dtype(dtype, device)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=number_format, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    model = model.to(device).eval().requires_grad_(False)
    config = model.config.get_text_config()
    _check_attention(model, config)
    body = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is body)
    logger.info("base loaded: %s as %s on %s in %.1f s", folder.name, dtype, device, time.monotonic() - started)
    return LoadedModel(model, body, name, device, number_format, _safe_length(config), config.vocab_size)


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """bf16 where the machine multiplies it faster than fp32."""
    if dtype != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def _check_config(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"The base in {folder.name} has no readable `config.json`.") from error
    if "auto_map" in config:
        raise InvalidRequest(f"The base in {folder.name} needs code of its own, which is never run. Use another base.")


def _check_attention(model: PreTrainedModel, config: Any) -> None:
    """Refuse what cannot be right; the runner's trial compares the rest with the base's own attention."""
    kinds = set(config.to_dict().get("layer_types") or ()) - _LAYER_TYPES
    if kinds:
        raise InvalidRequest(f"This base has layers of kind {sorted(kinds)}, which the engine does not serve.")
    if not model._supports_attention_backend:
        raise InvalidRequest(f"{type(model).__name__} does not let its attention be replaced; it cannot be served.")


def _safe_length(config: Any) -> int:
    length = config.max_position_embeddings
    rope = config.to_dict().get("rope_parameters") or {}
    for each in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if each.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            length = min(length, each.get("original_max_position_embeddings") or length)
    return length
