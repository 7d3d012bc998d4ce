"""Linear layers that bitsandbytes keeps in 4 or 8 bits: how they are loaded, and their product. No adapters.

Shapes: T tokens · K inputs · N outputs
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuneloom.errors import InvalidRequest

KINDS = ("none", "nf4", "int8")


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """How transformers is to quantise a base while it loads it; the head and the embeddings stay as they are."""
    from transformers import BitsAndBytesConfig

    quiet_bitsandbytes()
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quiet_bitsandbytes() -> None:
    """It warns at its import about a package that would load code from a hub, and at each product of int8 weights."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401 - whether it is there
    except ImportError as error:
        raise InvalidRequest("Quantised weights need the package `bitsandbytes`. Install it.") from error


def is_quantised(module: nn.Module) -> bool:
    # By name, so that a base without such layers does not import the package.
    return type(module).__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear)


def prepare_quantised(model: nn.Module, dtype: torch.dtype) -> int:
    """Set the quantised layers of a loaded model for products in `dtype`; returns how many there are."""
    layers = [module for module in model.modules() if is_quantised(module)]
    for layer in layers:
        if _is_4bit(layer):
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            # bitsandbytes 0.50 repacks weights at the first product where the CPU has AVX512-BF16: several times as
            # fast for few rows, but it computes in bf16, refuses some shapes, and breaks whoever saves or trains.
            is_packable = dtype == torch.bfloat16 and layer.out_features % 32 == 0 and layer.in_features % 64 == 0
            layer.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu and is_packable
    return len(layers)


class QuantisedProduct:
    """`x W^T + b` of one or more layers of the same input, some of them quantised, outputs side by side."""

    is_packed = False

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.num_inputs = linears[0].in_features
        self.num_outputs = sum(linear.out_features for linear in linears)
        self._products = [
            _Int8Product(linear) if is_quantised(linear) and not _is_4bit(linear) else linear for linear in linears
        ]

    def __call__(self, x_TK: Tensor) -> Tensor:
        parts = [product(x_TK) for product in self._products]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class _Int8Product:
    """The product of an int8 layer, in which no token's result depends on another's.

    LLM.int8 (Dettmers et al. 2022) takes input columns with an outlier out of the integer product, and which ones
    depends on all tokens of a call. Here a token with an outlier is computed by itself, with the weights restored.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._threshold = layer.state.threshold
        layer.state.threshold = 0.0

    def __call__(self, x_TK: Tensor) -> Tensor:
        y_TN = self._layer(x_TK)
        if self._threshold:
            outside_T = (x_TK.abs() > self._threshold).any(-1)
            if outside_T.any():
                y_TN[outside_T] = self._exact(x_TK[outside_T]).to(y_TN.dtype)
        return y_TN

    def _exact(self, x_TK: Tensor) -> Tensor:
        state = self._layer.state
        weight_NK = state.CB.to(x_TK.dtype) * (state.SCB / 127).to(x_TK.dtype)[:, None]
        return F.linear(x_TK, weight_NK, self._layer.bias)


def _is_4bit(layer: nn.Module) -> bool:
    from bitsandbytes.nn import Linear4bit

    return isinstance(layer, Linear4bit)
