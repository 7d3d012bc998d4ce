"""Base linear layers and memory for tensors: the plain product, packed for the machine where that is faster.

Shapes: T tokens · K inputs · N outputs
"""

import contextlib
import logging
import math
import mmap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_HUGE_PAGE = 2 << 20
# Rows that oneDNN lays the weight out for; the layout serves any number of rows.
_PACKED_FOR_ROWS = 32
_PACKED_TOLERANCE = 2e-2
# Of Linux; Python's `mmap` module names it from 3.13 on.
_MAP_NORESERVE = 0x4000


class Product:
    """`x W^T + b` for a weight that never changes.

    On a CPU, bf16 weights are reordered once for oneDNN, which is 1.5 to 2 times as fast at up to eight rows. The
    operators are private to torch, so the result is compared with `F.linear` first; where they are missing or
    differ, the plain product serves. A packed weight replaces the plain one.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, *, prepack: bool) -> None:
        self.num_outputs, self.num_inputs = weight_NK.shape
        self._bias = bias_N
        packed = _pack(weight_NK, bias_N) if prepack else None
        self.is_packed = packed is not None
        self._weight = weight_NK if packed is None else packed

    def __call__(self, x_TK: Tensor) -> Tensor:
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise.default(x_TK, self._weight, self._bias, "none", [], "")
        return F.linear(x_TK, self._weight, self._bias)


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear` that no adapter touches, such as the head."""

    def __init__(self, linear: nn.Linear, *, prepack: bool) -> None:
        super().__init__()
        self.product = Product(linear.weight.detach(), _detached(linear.bias), prepack=prepack)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.product.num_inputs)
        return self.product(rows).view(*x.shape[:-1], self.product.num_outputs)


def stack(linears: list[nn.Linear], *, prepack: bool) -> Product:
    """One product that gives the outputs of several layers of the same input, side by side."""
    weight = (
        torch.cat([linear.weight.detach() for linear in linears]) if len(linears) > 1 else linears[0].weight.detach()
    )
    biases = [_detached(linear.bias) for linear in linears]
    if all(bias is None for bias in biases):
        return Product(weight, None, prepack=prepack)
    rows = [
        weight.new_zeros(linear.out_features) if bias is None else bias
        for linear, bias in zip(linears, biases, strict=True)
    ]
    return Product(weight, torch.cat(rows), prepack=prepack)


def lazy_zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost no memory until they are written: on a CPU the pages come from the kernel on first touch."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    # Straight from the kernel: the C allocator hands out recycled memory, and writes zeros over it.
    # Not reserved: the kernel refuses a single mapping above all of the memory, even if little of it gets used.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def huge_pages(count: int, dtype: torch.dtype) -> Tensor:
    """Memory of the CPU for `count` numbers that will all be written: in large pages, which are found faster."""
    size = (count * dtype.itemsize // _HUGE_PAGE + 1) * _HUGE_PAGE
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)[:count]


def _pack(weight: Tensor, bias: Tensor | None) -> Tensor | None:
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
        probe = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=torch.float32).view(2, -1).to(weight.dtype)
        found = torch.ops.mkldnn._linear_pointwise.default(probe, packed, bias, "none", [], "").float()
    except (RuntimeError, AttributeError, TypeError) as error:
        logger.warning("weights stay unpacked, the operator failed: %s", error)
        return None
    expected = F.linear(probe, weight, bias).float()
    if not (found - expected).norm() <= _PACKED_TOLERANCE * expected.norm():
        logger.warning("weights stay unpacked, the packed product differs from the plain one")
        return None
    return packed


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
