"""Reads a PEFT LoRA folder into factors that an engine can arrange for its slots, or says why it cannot be served."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuneloom.engine.lora import HostAdapter
from tuneloom.errors import AdapterRejected

_PREFIX = "base_model.model."
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What the scale is computed from.
_READ = frozenset({"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})
# What does not change the result of a trained adapter, whatever it says.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "task_type",
    }
)
# What changes the result beyond scale * B A, but not under these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    # The others change the weights of the base too.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva", "mica"),
}
# PEFT writes one of these for each variant of LoRA that was not used.
_UNUSED: tuple[Any, ...] = (None, False, {}, [], "")
# PEFT reads the keys of a pattern as regular expressions; without quantifiers they cannot run away.
_PATTERN_KEY = re.compile(r"(?:[\w.^|]|\\\.){1,300}")


@dataclass(frozen=True)
class _Place:
    """Where a tensor's numbers are among all numbers of the file."""

    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], *, max_rank: int, dtype: torch.dtype, pack: bool = True
) -> HostAdapter:
    """Read an adapter for a base whose layers have `shapes`: name -> (outputs, inputs).

    The file is read at once and converted by few operations on all of it: they run without Python's lock, which the
    step thread needs. `pack`: into one piece of memory, contiguous; without it the factors are views of what was read,
    for a caller who copies them anyway.

    Raises:
        AdapterRejected: it is no plain LoRA for this base; the message names the reason.
    """
    config = _read_config(folder)
    places, values = _read_tensors(folder)
    pairs = _pair(places, shapes, max_rank)
    adapter = _convert(config, pairs, values, dtype)
    return _pack(adapter) if pack else adapter


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterRejected("The adapter has no readable `adapter_config.json`.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterRejected(f"Only LoRA adapters are served, this is `{kind}`.")
    for key in sorted(config.keys() - _READ - _HARMLESS):
        if config[key] not in _NEUTRAL.get(key, _UNUSED):
            value = repr(config[key])[:100]
            raise AdapterRejected(f"`{key}` = {value} is not supported. Train the adapter without it.")
    for key in (*(config.get("alpha_pattern") or {}), *(config.get("rank_pattern") or {})):
        if not _PATTERN_KEY.fullmatch(key):
            raise AdapterRejected(f"The pattern {key[:80]!r} is not supported. Name modules in patterns plainly.")
    return config


def _read_tensors(folder: Path) -> tuple[dict[str, _Place], Tensor]:
    """The places of all tensors, and their numbers in one flat tensor: in the file's format if it has but one."""
    path = folder / "adapter_model.safetensors"
    places, kinds, at = {}, [], 0
    try:
        with safe_open(path, framework="pt") as file:
            # The format leaves no gaps, so order and shapes tell where each tensor is.
            for name in file.offset_keys():
                part = file.get_slice(name)
                place = places[name] = _Place(at, tuple(part.get_shape()))
                kinds.append((part.get_dtype(), place.size))
                at += place.size
        data = _read_data(path)
    except (OSError, SafetensorError) as error:
        raise AdapterRejected("The adapter has no readable `adapter_model.safetensors`.") from error
    foreign = {kind for kind, _ in kinds} - _DTYPES.keys()
    if foreign:
        raise AdapterRejected(f"The adapter has weights as {sorted(foreign)}. Save it as F32, F16 or BF16.")
    if len({kind for kind, _ in kinds}) == 1:
        return places, data.view(_DTYPES[kinds[0][0]])
    parts = data.split([size * _DTYPES[kind].itemsize for kind, size in kinds])
    # A copy of each: a format of four bytes may start at any even byte behind one of two.
    floats = [part.clone().view(_DTYPES[kind]).float() for part, (kind, _) in zip(parts, kinds, strict=True)]
    return places, torch.cat(floats) if floats else torch.empty(0)


def _read_data(path: Path) -> Tensor:
    with path.open("rb") as file:
        head = 8 + int.from_bytes(file.read(8), "little")
        file.seek(head)
        data = torch.empty(path.stat().st_size - head, dtype=torch.uint8)
        if file.readinto(data.numpy()) != data.numel():
            raise OSError("the file became shorter")
    return data


def _pair(
    places: Mapping[str, _Place], shapes: Mapping[str, tuple[int, int]], max_rank: int
) -> dict[str, tuple[_Place, _Place]]:
    """Module -> places of A and B, if that is all there is and it fits the base."""
    rest = dict(places)
    pairs = {}
    for name in sorted({key.rsplit(".lora_", 1)[0] for key in places}):
        a, b = rest.pop(f"{name}.lora_A.weight", None), rest.pop(f"{name}.lora_B.weight", None)
        module = name.removeprefix(_PREFIX)
        if a is None or b is None or module not in shapes:
            raise AdapterRejected(f"The adapter changes `{module}`, which is no adaptable linear layer of this base.")
        _check_shapes(module, a.shape, b.shape, shapes[module], max_rank)
        pairs[module] = (a, b)
    if rest or not pairs:
        raise AdapterRejected(f"The adapter holds unexpected weights: {sorted(rest)[:3] or 'none at all'}.")
    return pairs


def _check_shapes(module: str, a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, int], max_rank: int) -> None:
    outputs, inputs = shape
    if len(a) != 2 or a[1] != inputs or b != (outputs, a[0]):
        raise AdapterRejected(
            f"`{module}`: A {a} and B {b} do not fit a layer of {inputs} inputs and {outputs} outputs. "
            "The adapter belongs to another base."
        )
    if a[0] > max_rank:
        raise AdapterRejected(f"Rank {a[0]} is above this engine's limit: {max_rank}.")


@torch.inference_mode()
def _convert(
    config: Mapping[str, Any], pairs: Mapping[str, tuple[_Place, _Place]], values: Tensor, dtype: torch.dtype
) -> HostAdapter:
    """A and B, transposed and scaled, of all modules."""
    # In its own format a number is scaled as exactly as it can be; from another, rounded once at the end.
    values = values if values.dtype == dtype else values.float()
    a_parts, b_parts = (
        [values[place.start : place.start + place.size].view(place.shape) for place in places]
        for places in zip(*pairs.values(), strict=True)
    )
    scales = [_scale(config, module, a_RK.shape[0]) for module, a_RK in zip(pairs, a_parts, strict=True)]
    scaled = torch._foreach_mul(b_parts, scales)
    factors = {
        module: (a_RK.to(dtype), b_NR.to(dtype).t()) for module, a_RK, b_NR in zip(pairs, a_parts, scaled, strict=True)
    }
    _check_finite(factors)
    rank = max(a_RK.shape[0] for a_RK in a_parts)
    return HostAdapter(rank, sum(a.nbytes + b.nbytes for a, b in factors.values()), factors)


def _check_finite(factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    largest = torch._foreach_norm([factor for pair in factors.values() for factor in pair], torch.inf)
    are_finite = torch.stack(largest).isfinite().view(-1, 2).all(1).tolist()
    for module, is_finite in zip(factors, are_finite, strict=True):
        if not is_finite:
            raise AdapterRejected(f"`{module}` has weights that are not finite numbers. Train the adapter anew.")


@torch.inference_mode()
def _pack(adapter: HostAdapter) -> HostAdapter:
    """The same adapter, every factor contiguous, all in one piece of memory."""
    found = [factor for pair in adapter.factors.values() for factor in pair]
    room = torch.empty(sum(factor.numel() for factor in found), dtype=found[0].dtype)
    parts = [
        part.view(factor.shape)
        for part, factor in zip(room.split([factor.numel() for factor in found]), found, strict=True)
    ]
    torch._foreach_copy_(parts, found)
    packed = dict(zip(adapter.factors, zip(parts[::2], parts[1::2], strict=True), strict=True))
    return HostAdapter(adapter.rank, room.nbytes, packed)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that matches the whole name, or its end after a dot."""
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)
