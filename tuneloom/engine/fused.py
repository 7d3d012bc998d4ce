"""Small modules of a model by one CPU kernel each: RMS norms, gated MLPs. Only where the result is the module's own.

What a module computes is not read from its name: each candidate is tried on random rows against the module that it
would replace, and takes its place only if they agree.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tuneloom.engine.kernels import Kernels
from tuneloom.engine.lora import LoraPack, PackPart

_TOLERANCE = 1e-2
_TRIAL_ROWS = 5


class FusedNorm(nn.Module):
    """`x / rms(x) * (offset + weight)`."""

    def __init__(self, norm: nn.Module, kernels: Kernels, *, eps: float, offset: float, rounds: bool) -> None:
        super().__init__()
        self._kernels = kernels
        self._weight = norm.weight.detach()
        self._form = {"eps": eps, "offset": offset, "rounds": rounds}

    def forward(self, x: Tensor) -> Tensor:
        return self._kernels.rms_norm(x, self._weight, **self._form)


class FusedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` on the packs of the three layers."""

    def __init__(self, gate_up: LoraPack, down: LoraPack, kernels: Kernels) -> None:
        super().__init__()
        self._gate_up, self._down, self._kernels = gate_up, down, kernels

    def forward(self, x: Tensor) -> Tensor:
        hidden = self._kernels.silu_mul(self._gate_up(x.reshape(-1, self._gate_up.num_inputs)))
        return self._down(hidden).view(*x.shape[:-1], -1)


def fuse(body: nn.Module, kernels: Kernels) -> int:
    """Replace what can be replaced below `body`, whose linears are packs already; returns how many modules were."""
    count = 0
    for parent in list(body.modules()):
        for name, child in list(parent.named_children()):
            fused = next((each for each in _candidates(child, kernels) if _agree(child, each)), None)
            if fused is not None:
                setattr(parent, name, fused)
                count += 1
    return count


def _candidates(module: nn.Module, kernels: Kernels) -> Iterator[nn.Module]:
    children = dict(module.named_children())
    weight = getattr(module, "weight", None)
    if not children and isinstance(weight, nn.Parameter) and weight.dim() == 1 and weight.dtype == torch.bfloat16:
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        if isinstance(eps, float):
            for offset, rounds in ((0.0, True), (0.0, False), (1.0, False)):
                yield FusedNorm(module, kernels, eps=eps, offset=offset, rounds=rounds)
    gate, up, down = (children.get(name) for name in ("gate_proj", "up_proj", "down_proj"))
    if all(isinstance(part, PackPart) for part in (gate, up, down)) and gate.pack is up.pack:
        yield FusedMLP(gate.pack, down.pack, kernels)


def _agree(module: nn.Module, fused: nn.Module) -> bool:
    width = module.weight.shape[0] if isinstance(fused, FusedNorm) else fused._gate_up.num_inputs
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, _TRIAL_ROWS, width, generator=generator) * 3).bfloat16()
    expected, found = module(x).float(), fused(x).float()
    return expected.shape == found.shape and bool((found - expected).norm() <= _TOLERANCE * expected.norm())
