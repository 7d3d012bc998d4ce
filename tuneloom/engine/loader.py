"""Loads a base for the engine: device, number format, quantised weights. No batching.

Checkpoints are safetensors on local disk; no code of a base is run.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tuneloom.engine.checkpoint import Checkpoint
from tuneloom.engine.quantised import prepare_quantised, quantization_config, quiet_bitsandbytes
from tuneloom.errors import InvalidRequest

logger = logging.getLogger(__name__)

_TRIAL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class LoadedModel:
    """`num_quantised`: linear layers of 4 or 8 bits. `trial_tolerance`: the relative error between logits that were
    computed in two ways, up to which they count as the same.
    """

    model: PreTrainedModel
    body: nn.Module
    body_name: str
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    num_quantised: int
    trial_tolerance: float


def load_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, quantization: str = "none"
) -> LoadedModel:
    """Load a base; `quantization` `nf4` or `int8` quantises plain weights on the way.

    Weights of other formats become `dtype`: fp16 too, which CPUs multiply slowly and in which sums overflow.

    Raises:
        InvalidRequest: its weights do not make up the base.
    """
    started = time.monotonic()
    options: dict[str, Any] = {}
    if checkpoint.quantization != "none":
        quiet_bitsandbytes()
    elif quantization != "none":
        options["quantization_config"] = quantization_config(quantization, dtype)
    if options or checkpoint.quantization != "none" or device.type != "cpu":
        # Straight to the device, where they are quantised too; the host never holds all of it.
        options["device_map"] = {"": device}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            # Reported below, by name.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InvalidRequest(f"The base in {checkpoint.folder.name} cannot be loaded: {error}") from error
    check_whole(checkpoint.folder.name, report)
    model = model.eval().requires_grad_(False)
    num_quantised = prepare_quantised(model, dtype)
    body = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is body)
    elapsed_s = time.monotonic() - started
    logger.info("base loaded: %s as %s on %s in %.1f s", checkpoint.folder.name, dtype, device, elapsed_s)
    # Products of int8 weights round their inputs: a last bit of those moves a step of 1/127 of the largest.
    is_int8 = "int8" in (quantization, checkpoint.quantization)
    return LoadedModel(
        model,
        body,
        name,
        device,
        dtype,
        checkpoint.text_config.vocab_size,
        num_quantised,
        trial_tolerance=0.1 if is_int8 else _TRIAL_TOLERANCE[dtype],
    )


def check_whole(base: str, report: dict[str, Any]) -> None:
    """Refuse what transformers, by its `output_loading_info`, did not find in the files: it put random numbers there.

    Raises:
        InvalidRequest: it names the weights.
    """
    faults = [f"`{name}` is missing" for name in sorted(report["missing_keys"])]
    mismatched = sorted(report["mismatched_keys"])
    faults += [f"`{name}` is {list(found)}, not {list(wanted)}" for name, found, wanted in mismatched]
    if faults:
        more = f", and {len(faults) - 3} more are missing or do not fit" if len(faults) > 3 else ""
        raise InvalidRequest(
            f"The weights of the base in {base} do not make up what its `config.json` describes: "
            f"{', '.join(faults[:3])}{more}. Add the whole checkpoint."
        )


def pick_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """bf16 where the machine multiplies it faster than fp32."""
    if dtype != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32
