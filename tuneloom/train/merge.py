"""An adapter merged into its base's weights: a folder for plain transformers, checked before it is handed over.

The merge is computed in fp32 on the base as it was added, never on a quantised copy of it.
"""

import contextlib
import gc
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tuneloom.bases import Base
from tuneloom.bases.catalogue import read_header
from tuneloom.bases.intake import TEXT_FILES
from tuneloom.errors import InvalidRequest, TuneloomError

Dtype = Literal["bf16", "fp32"]

SHARD_SIZE = "4GB"
# Largest difference of a logit, as a share of the largest logit, that a merge may bring. Measured on SmolLM2-135M with
# adapters of rank 16 that move logits by 0.8 to 21 %: 3e-6 in fp32; 0.3 to 1.1 % in bf16, where each weight is rounded.
# Tiny random models of nine architectures with adapters that turn all logits around: 4e-6 and 0.3 to 7 %.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.1}
_PROBE_SHAPE = (4, 48)
# Sets of logits that are held at once: of the base, wanted, rounded, written, and what their distance takes.
MAX_LOGITS = 6
# Written by transformers, or about the base alone.
_NOT_COPIED = frozenset({"config.json", "model.safetensors.index.json", "README.md"})
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Merged:
    """What a merge has made. `difference` is the largest of a logit from base with adapter, `effect` the largest that
    the adapter makes on the base; both as shares of the largest logit.
    """

    dtype: str
    size_bytes: int
    difference: float
    effect: float
    tolerance: float


def memory_needed(base: Base) -> int:
    """Bytes that a merge holds at its peak: all weights in fp32, what a forward pass takes besides, and the logits that
    are compared.
    """
    headers = [read_header(path) for path in base.path.glob("*.safetensors")]
    weights = sum(math.prod(entry["shape"]) for header in headers for entry in header.values())
    return int(4 * weights * 1.1) + (256 << 20) + MAX_LOGITS * 4 * math.prod(_PROBE_SHAPE) * base.vocab_size


def merge(
    base: Base, adapter: Path, folder: Path, *, dtype: Dtype | None = None, say: Callable[[str], None] = lambda _: None
) -> Merged:
    """Write the merged checkpoint, tokenizer and template into the empty `folder`; None: in the base's own dtype.

    Raises:
        InvalidRequest: the base is stored quantised, so that there are no weights to merge into.
        TuneloomError: what was written does not compute what base and adapter do.
    """
    config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise InvalidRequest(
            f"The base `{base.id}` is stored quantised, and merging into rounded weights would lose accuracy. "
            "Export the adapter instead, without `--merged`."
        )
    stored = _DTYPES[dtype] if dtype else _dtype_of(base)
    with _quiet():
        say(f"loading {base.id} in fp32")
        model = _load(base.path)
        plain = _logits(model, base)
        tuned = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
        wanted = _logits(tuned, base)
        say("merging")
        model = tuned.merge_and_unload(safe_merge=True)
        _check(_distance(_logits(model, base), wanted), torch.float32)
        say(f"writing {_name(stored)} weights")
        _cast(model, stored)
        _save(model, base, folder)
        _cast(model, torch.float32)
        rounded = _logits(model, base)
        del model, tuned
        gc.collect()
        say("comparing what was written with base and adapter")
        written = _logits(_load(folder), base)
        # What the rounding of weights may do would hide a wrong one.
        _check(_distance(written, rounded), torch.float32)
        difference = _check(_distance(written, wanted), stored)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Merged(_name(stored), size, difference, _distance(plain, wanted), TOLERANCE[stored])


def _load(folder: Path) -> PreTrainedModel:
    """In fp32 whatever is stored: comparisons then see the weights' rounding and not that of the products."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    return model.eval()


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the weights alone: tables of positions stay exact, as they are when a model is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _save(model: PreTrainedModel, base: Base, folder: Path) -> None:
    # The base's own file is copied as it is: transformers refuses to write some that it reads.
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in base.path.iterdir():
        if path.name in TEXT_FILES - _NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    for path in folder.iterdir():
        # transformers writes weights that only their owner may read.
        path.chmod(0o644)


@torch.no_grad()
def _logits(model: torch.nn.Module, base: Base) -> Tensor:
    """For the same random tokens at each call: 4 rows of 48, or as many as the context takes."""
    generator = torch.Generator().manual_seed(0)
    rows, length = _PROBE_SHAPE
    ids = torch.randint(base.vocab_size, (rows, min(length, base.context_length)), generator=generator)
    return model(input_ids=ids, use_cache=False).logits


def _distance(found: Tensor, wanted: Tensor) -> float:
    # NaN in either must not pass as small.
    return float((found - wanted).abs().max().nan_to_num(math.inf) / wanted.abs().max().clamp(min=1e-9))


def _check(distance: float, dtype: torch.dtype) -> float:
    if not distance <= TOLERANCE[dtype]:
        raise TuneloomError(
            f"The merged model is not what base and adapter are: its logits differ by {distance:.2g} of the largest, "
            f"where {TOLERANCE[dtype]:g} is allowed in {_name(dtype)}. Nothing was written. "
            + ("Export it with `--dtype fp32`." if dtype != torch.float32 else "Export the adapter without `--merged`.")
        )
    return distance


def _dtype_of(base: Base) -> torch.dtype:
    """That of the weights: of the most bytes, where a checkpoint mixes them."""
    sizes: dict[str, int] = {}
    for path in base.path.glob("*.safetensors"):
        for entry in read_header(path).values():
            begin, end = entry["data_offsets"]
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
    known = {"BF16": torch.bfloat16, "F16": torch.float16}
    return known.get(max(sizes, key=lambda name: sizes[name]), torch.float32)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers 5.23 and peft 0.21 warn of their own calls of each other, and draw bars."""
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
