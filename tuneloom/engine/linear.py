"""Base linear layers: the plain product, packed for the machine where that is faster.

Shapes: T tokens · K inputs · N outputs
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuneloom.engine.kernels import Kernels

logger = logging.getLogger(__name__)

# Rows that oneDNN lays the weight out for; the layout serves any number of rows.
_PACKED_FOR_ROWS = 32
_PACKED_TOLERANCE = 2e-2


@dataclass(frozen=True)
class ProductOptions:
    """How weights are laid out: `prepack` for the CPU's matrix units, by our own kernels if there are `kernels`."""

    prepack: bool
    kernels: Kernels | None


Multiply = Callable[[Tensor], Tensor]


class Product:
    """`x W^T + b` for a weight that never changes.

    On a CPU, bf16 weights are reordered once: for our kernels, or else for oneDNN by operators that are private to
    torch. Both are faster than the plain product, most at few rows. The result is compared with `F.linear` first;
    where a form is missing or differs, the next one serves. A packed weight replaces the plain one.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, options: ProductOptions) -> None:
        self.num_outputs, self.num_inputs = weight_NK.shape
        packed = _pack(weight_NK, bias_N, options)
        self.is_packed = packed is not None
        self._multiply = packed or functools.partial(F.linear, weight=weight_NK, bias=bias_N)

    def __call__(self, x_TK: Tensor) -> Tensor:
        return self._multiply(x_TK)


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear` that no adapter touches, such as the head."""

    def __init__(self, linear: nn.Linear, options: ProductOptions) -> None:
        super().__init__()
        self.product = Product(linear.weight.detach(), _detached(linear.bias), options)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.product.num_inputs)
        return self.product(rows).view(*x.shape[:-1], self.product.num_outputs)


def stack(linears: list[nn.Linear], options: ProductOptions) -> Product:
    """One product that gives the outputs of several layers of the same input, side by side."""
    weight = (
        torch.cat([linear.weight.detach() for linear in linears]) if len(linears) > 1 else linears[0].weight.detach()
    )
    biases = [_detached(linear.bias) for linear in linears]
    if all(bias is None for bias in biases):
        return Product(weight, None, options)
    rows = [
        weight.new_zeros(linear.out_features) if bias is None else bias
        for linear, bias in zip(linears, biases, strict=True)
    ]
    return Product(weight, torch.cat(rows), options)


def _pack(weight: Tensor, bias: Tensor | None, options: ProductOptions) -> Multiply | None:
    """The first packed form that gives the plain product."""
    if not options.prepack or weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    probe = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=torch.float32).view(2, -1).to(weight.dtype)
    expected = F.linear(probe, weight, bias).float()
    # oneDNN uses the tiles of a CPU that has them: three times our kernels at 32 rows, seven times at 256.
    forms = (_for_onednn, _for_kernels) if torch.cpu._is_amx_tile_supported() else (_for_kernels, _for_onednn)
    for form in forms:
        multiply = form(weight, bias, options)
        if multiply is None:
            continue
        if (multiply(probe).float() - expected).norm() <= _PACKED_TOLERANCE * expected.norm():
            return multiply
        logger.warning("a packed product differs from the plain one and is not used: %s", form.__name__)
    return None


def _for_kernels(weight: Tensor, bias: Tensor | None, options: ProductOptions) -> Multiply | None:
    native = options.kernels
    if native is None or weight.shape[1] % 2:
        return None
    return functools.partial(native.linear, packed=native.pack_linear(weight), bias_N=bias, num_outputs=weight.shape[0])


def _for_onednn(weight: Tensor, bias: Tensor | None, options: ProductOptions) -> Multiply | None:
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
        operator = torch.ops.mkldnn._linear_pointwise.default
        operator(weight[:1], packed, bias, "none", [], "")
    except (RuntimeError, AttributeError, TypeError) as error:
        logger.warning("weights stay unpacked, the operator failed: %s", error)
        return None
    return lambda x_TK: operator(x_TK, packed, bias, "none", [], "")


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
