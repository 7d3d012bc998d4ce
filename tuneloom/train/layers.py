"""The layers of a frozen base with LoRA, computed with less: the same numbers to rounding, fewer passes over memory.

PEFT multiplies fp32 factors with fp32 copies of bf16 activations, or casts at every step of a product; transformers
keeps four tensors of a gated layer and two of a norm for the gradient. Here the factors stay fp32 and are multiplied in
the activations' precision, the base's weights get no gradient at all, and what is cheap is computed again.
"""

# Shapes: T tokens of all rows · I inputs · O outputs · R rank · D model width

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
}


def speed_up(model: nn.Module) -> bool:
    """Replace the forward of every layer whose form is known; whether all LoRA layers are among them.

    Norms and gated layers are tried first: what computes anything else than expected stays as it is.
    """
    loras = [module for module in model.modules() if isinstance(module, LoraLinear)]
    known = [module for module in loras if _is_plain(module)]
    for lora in known:
        lora.forward = types.MethodType(_lora_forward, lora)
    kinds: dict[tuple[type, int], Callable[..., Tensor] | None] = {}
    for module in model.modules():
        if not (type(module).__name__.endswith("RMSNorm") or hasattr(module, "gate_proj")):
            continue
        kind = (type(module), getattr(getattr(module, "weight", None), "numel", int)())
        if kind not in kinds:
            kinds[kind] = _known_norm(module) or _known_gate(module)
        if (forward := kinds[kind]) is not None:
            module.forward = types.MethodType(forward, module)
    return len(known) == len(loras)


def _is_plain(lora: LoraLinear) -> bool:
    return not lora.lora_variant and not lora.lora_bias.get("default", False) and not lora.fan_in_fan_out


def _lora_forward(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _is_active(self):
        return LoraLinear.forward(self, x, *args, **kwargs)
    if _is_one_product(self, x.dtype):
        return _Linear.apply(x, self.base_layer.weight, self.base_layer.bias, *_factors(self))
    return self.base_layer(x) + _Update.apply(self.lora_dropout["default"](x), *_factors(self))


def _is_active(lora: LoraLinear) -> bool:
    return not lora.disable_adapters and not lora.merged and lora.active_adapters == ["default"]


def _is_one_product(lora: LoraLinear, dtype: torch.dtype) -> bool:
    """Whether base and adapter see the same input, and the base is a plain frozen matrix of this precision."""
    base, dropout = lora.base_layer, lora.lora_dropout["default"]
    has_dropout = lora.training and not isinstance(dropout, nn.Identity)
    return not has_dropout and type(base) is nn.Linear and not base.weight.requires_grad and base.weight.dtype == dtype


def _factors(lora: LoraLinear) -> tuple[Tensor, Tensor, float]:
    return lora.lora_A["default"].weight, lora.lora_B["default"].weight, lora.scaling["default"]


class _Factors:
    """One LoRA pair in the precision of the activations, and its part of a layer's gradient."""

    @staticmethod
    def cast(x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return a_RI.to(x.dtype), (b_OR * scale).to(x.dtype)

    @staticmethod
    def gradient(
        grad_TO: Tensor, x_TI: Tensor, low_TR: Tensor, b_OR: Tensor, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of `low_TR`, of A, of B; `b_OR` holds the scale already."""
        grad_low_TR = grad_TO @ b_OR
        return grad_low_TR, (grad_low_TR.T @ x_TI).to(dtype), (grad_TO.T @ low_TR).to(dtype).mul_(scale)


class _Linear(torch.autograd.Function):
    """x W^T + bias + scale x A^T B^T, with W frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        a, b = _Factors.cast(x, a_RI, b_OR, scale)
        low_TR = x_TI @ a.T
        out_TO = F.linear(x_TI, weight_OI, bias_O).addmm_(low_TR, b.T)
        ctx.save_for_backward(x_TI, low_TR, weight_OI, a, b)
        ctx.scale, ctx.dtype = scale, a_RI.dtype
        return out_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x_TI, low_TR, weight_OI, a, b = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_low_TR, grad_a, grad_b = _Factors.gradient(grad_TO, x_TI, low_TR, b, ctx.scale, ctx.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TO @ weight_OI).addmm_(grad_low_TR, a).view(*grad.shape[:-1], -1)
        return grad_x, None, None, grad_a, grad_b, None


class _Update(torch.autograd.Function):
    """scale x A^T B^T: beside a base layer that multiplies in its own way, or sees another x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        a, b = _Factors.cast(x, a_RI, b_OR, scale)
        low_TR = x_TI @ a.T
        ctx.save_for_backward(x_TI, low_TR, a, b)
        ctx.scale, ctx.dtype = scale, a_RI.dtype
        return (low_TR @ b.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x_TI, low_TR, a, b = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_low_TR, grad_a, grad_b = _Factors.gradient(grad_TO, x_TI, low_TR, b, ctx.scale, ctx.dtype)
        grad_x = (grad_low_TR @ a).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return grad_x, grad_a, grad_b, None


def _known_norm(module: nn.Module) -> Callable[..., Tensor] | None:
    """The forward for an RMS norm: with its weight as factor, or with 1 + weight as in Gemma."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or epsilon is None or weight.requires_grad:
        return None
    x = _sample(len(weight), weight)
    with torch.no_grad():
        expected = module(x)
        for plus in (0.0, 1.0):
            if _is_close(_Norm.apply(x, weight, plus, epsilon), expected):
                return lambda self, x: _Norm.apply(x, self.weight, plus, epsilon)
    return None


class _Norm(torch.autograd.Function):
    """x / rms(x) times (plus + weight), in fp32 within."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, plus: float, epsilon: float) -> Tensor:
        factor_D = weight_D.float().add(plus)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = size.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, inverse, factor_D)
        return (x.float() * inverse).mul_(factor_D).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, inverse, factor_D = ctx.saved_tensors
        unit = x.float() * inverse
        through = grad.float() * factor_D
        along = (through * unit).mean(-1, keepdim=True)
        return through.sub_(unit.mul_(along)).mul_(inverse).to(grad.dtype), None, None, None


def _known_gate(module: nn.Module) -> Callable[..., Tensor] | None:
    """The forward for down(activation(gate(x)) * up(x))."""
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    name = next((name for name, (forward, _) in _ACTIVATIONS.items() if _is_same(module, forward)), None)
    if name is None or not all(isinstance(layer, nn.Linear | LoraLinear) for layer in layers):
        return None
    forward = _gated(name)
    x = _sample(layers[0].in_features, next(module.parameters()))  # type: ignore[union-attr]
    with torch.no_grad():
        return forward if _is_close(forward(module, x), module(x)) else None


def _is_same(module: nn.Module, activation: Callable[[Tensor], Tensor]) -> bool:
    act = getattr(module, "act_fn", None)
    x = torch.linspace(-4, 4, 33)
    return callable(act) and torch.allclose(act(x), activation(x), atol=1e-6)


def _gated(name: str) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        if isinstance(down, LoraLinear) and _is_plain(down) and _is_active(down) and _is_one_product(down, gate.dtype):
            return _GatedLinear.apply(gate, up, name, down.base_layer.weight, down.base_layer.bias, *_factors(down))
        return down(_Gate.apply(gate, up, name))

    return forward


class _GatedLinear(torch.autograd.Function):
    """`_Linear` of activation(gate) * up, which is not kept: its gradient needs the activation again anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        name: str,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        x_TI = _ACTIVATIONS[name][0](gate).mul_(up).flatten(0, -2)
        a, b = _Factors.cast(gate, a_RI, b_OR, scale)
        low_TR = x_TI @ a.T
        ctx.save_for_backward(gate, up, low_TR, weight_OI, a, b)
        ctx.name, ctx.scale, ctx.dtype = name, scale, a_RI.dtype
        return F.linear(x_TI, weight_OI, bias_O).addmm_(low_TR, b.T).view(*gate.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, low_TR, weight_OI, a, b = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        activated = _ACTIVATIONS[ctx.name][0](gate)
        x_TI = (activated * up).flatten(0, -2)
        grad_low_TR, grad_a, grad_b = _Factors.gradient(grad_TO, x_TI, low_TR, b, ctx.scale, ctx.dtype)
        grad_x = (grad_TO @ weight_OI).addmm_(grad_low_TR, a).view_as(gate)
        grad_gate = _ACTIVATIONS[ctx.name][1](grad_x * up, gate)
        return grad_gate, activated.mul_(grad_x), None, None, None, grad_a, grad_b, None


class _Gate(torch.autograd.Function):
    """activation(gate) * up, which keeps its two inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return _ACTIVATIONS[name][0](gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        forward, backward = _ACTIVATIONS[ctx.name]
        return backward(grad * up, gate), forward(gate).mul_(grad), None


def _sample(width: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    dtype = like.dtype if like.dtype.is_floating_point else torch.get_default_dtype()
    return torch.randn(1, 3, width, generator=generator).to(like.device, dtype)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2e-2
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
