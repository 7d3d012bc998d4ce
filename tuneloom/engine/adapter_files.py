"""Reads a PEFT LoRA folder into factors that are ready to copy into a slot, or says why it cannot be served."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuneloom.engine.lora import HostAdapter
from tuneloom.errors import AdapterRejected

_PREFIX = "base_model.model."
# What would change the result beyond scale * B A, and the values under which it does not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),
}
# PEFT reads the keys of a pattern as regular expressions; without quantifiers they cannot run away.
_PATTERN_KEY = re.compile(r"[\w.^|]{1,300}")


def read_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], *, max_rank: int, dtype: torch.dtype
) -> HostAdapter:
    """Read an adapter for a base whose layers have `shapes`: name -> (outputs, inputs).

    Raises:
        AdapterRejected: it is no plain LoRA for this base; the message names the reason.
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    factors = {}
    for name in sorted({key.rsplit(".lora_", 1)[0] for key in tensors}):
        a_RK, b_NR = tensors.pop(f"{name}.lora_A.weight", None), tensors.pop(f"{name}.lora_B.weight", None)
        module = name.removeprefix(_PREFIX)
        if a_RK is None or b_NR is None or module not in shapes:
            raise AdapterRejected(f"The adapter changes `{module}`, which is no adaptable linear layer of this base.")
        _check_shapes(module, a_RK, b_NR, shapes[module], max_rank)
        scale = _scale(config, module, a_RK.shape[0])
        factors[module] = (a_RK.to(dtype).contiguous(), (b_NR.float().t() * scale).to(dtype).contiguous())
    if tensors or not factors:
        raise AdapterRejected(f"The adapter holds unexpected weights: {sorted(tensors)[:3] or 'none at all'}.")
    return HostAdapter(
        rank=max(a.shape[0] for a, _ in factors.values()),
        size_bytes=sum(a.nbytes + b.nbytes for a, b in factors.values()),
        factors=factors,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterRejected("The adapter has no readable `adapter_config.json`.") from error
    if config.get("peft_type") != "LORA":
        raise AdapterRejected(f"Only LoRA adapters are served, this is `{config.get('peft_type')}`.")
    for key, values in _NEUTRAL.items():
        if config.get(key) not in values:
            raise AdapterRejected(f"`{key}` = {config[key]!r} is not supported. Train the adapter without it.")
    for key in (*(config.get("alpha_pattern") or {}), *(config.get("rank_pattern") or {})):
        if not _PATTERN_KEY.fullmatch(key):
            raise AdapterRejected(f"The pattern {key[:80]!r} is not supported. Name modules in patterns plainly.")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise AdapterRejected("The adapter has no readable `adapter_model.safetensors`.") from error


def _check_shapes(module: str, a_RK: Tensor, b_NR: Tensor, shape: tuple[int, int], max_rank: int) -> None:
    rank = a_RK.shape[0]
    if a_RK.dim() != 2 or b_NR.shape != (shape[0], rank) or a_RK.shape[1] != shape[1]:
        raise AdapterRejected(
            f"`{module}`: A {tuple(a_RK.shape)} and B {tuple(b_NR.shape)} do not fit a layer "
            f"of {shape[1]} inputs and {shape[0]} outputs. The adapter belongs to another base."
        )
    if rank > max_rank:
        raise AdapterRejected(f"Rank {rank} is above this engine's limit: {max_rank}.")


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that matches the whole name, or its end after a dot."""
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)
