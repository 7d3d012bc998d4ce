"""Modules of a model by few CPU kernels each: norms, gated MLPs, attention. Only where the result is the module's own.

What a module computes is not read from its name: each candidate is tried on random rows against the module that it
would replace, and takes its place only if they agree.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuneloom.engine.attention import StepAttention
from tuneloom.engine.kernels import Kernels
from tuneloom.engine.kv_cache import CacheBatch, Chunk, KVCache
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
        self.num_inputs = gate_up.num_inputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = self._kernels.silu_mul(self._gate_up(x.reshape(-1, self.num_inputs)))
        return self._down(hidden).view(*x.shape[:-1], -1)


class FusedAttention(nn.Module):
    """Attention with rotary positions on the packs of its layers; `call` is what the original asks of the cache."""

    def __init__(self, qkv: LoraPack, out: LoraPack, kernels: Kernels, call: "AttentionCall") -> None:
        super().__init__()
        self._qkv, self._out, self._kernels, self._call = qkv, out, kernels, call

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        tuneloom: StepAttention,
        **_: Any,
    ) -> tuple[Tensor, None]:
        call = self._call
        y_TN = self._qkv(hidden_states.reshape(-1, self._qkv.num_inputs))
        cos_TD, sin_TD = (each.reshape(-1, call.width).contiguous() for each in position_embeddings)
        self._kernels.rotate(y_TN, cos_TD, sin_TD, call.heads + call.groups)
        split = y_TN.view(len(y_TN), -1, call.width).transpose(0, 1).split([call.heads, call.groups, call.groups])
        seen_THD = tuneloom.attend(call.layer, *split, scaling=call.scaling, window=call.window)
        return self._out(seen_THD.view(len(y_TN), -1)).view(hidden_states.shape), None


@dataclass(frozen=True)
class AttentionCall:
    layer: int
    heads: int
    groups: int
    width: int
    scaling: float | None
    window: int | None


class _Listener(StepAttention):
    """A step in which one layer attends, and what it asks for."""

    call: AttentionCall | None = None

    def attend(self, layer: int, query_HTD: Tensor, key_CTD: Tensor, value_CTD: Tensor, **how: Any) -> Tensor:
        heads, _, width = query_HTD.shape
        self.call = AttentionCall(layer, heads, key_CTD.shape[0], width, **how)
        return super().attend(layer, query_HTD, key_CTD, value_CTD, **how)


def fuse(body: nn.Module, kernels: Kernels, cache: KVCache) -> int:
    """Replace what can be replaced below `body`, whose linears are packs already; returns how many modules were."""
    count = 0
    for parent in list(body.modules()):
        for name, child in list(parent.named_children()):
            fused = next((each for each in _candidates(child, kernels) if _agree(child, each)), None)
            fused = fused or _attention(child, kernels, cache)
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
    if packs := _packs(children, ("gate_proj", "up_proj"), "down_proj"):
        yield FusedMLP(*packs, kernels)


def _packs(children: Mapping[str, nn.Module], inputs: tuple[str, ...], output: str) -> tuple[LoraPack, LoraPack] | None:
    """The pack of the layers `inputs` and that of `output`, if these are the linears of a module and all are packs."""
    parts = [children.get(name) for name in (*inputs, output)]
    if not all(isinstance(part, PackPart) for part in parts):
        return None
    first, last = parts[0].pack, parts[-1].pack
    return (first, last) if first.parts == inputs and last.parts == (output,) else None


def _agree(module: nn.Module, fused: nn.Module) -> bool:
    width = module.weight.shape[0] if isinstance(fused, FusedNorm) else fused.num_inputs
    return _is_near(fused(x := _trial_rows(width)), module(x))


def _attention(module: nn.Module, kernels: Kernels, cache: KVCache) -> nn.Module | None:
    """The fused form of an attention module, if it gives the same on a few tokens with any angles."""
    packs = _packs(dict(module.named_children()), ("q_proj", "k_proj", "v_proj"), "o_proj")
    slot = cache.acquire(_TRIAL_ROWS) if packs else None
    if packs is None or slot is None:
        return None
    batch = CacheBatch([], [], [Chunk(slot, 0, _TRIAL_ROWS, 0)], torch.device("cpu"))
    x = _trial_rows(packs[0].num_inputs)
    width = cache.shape.width
    angles = torch.arange(_TRIAL_ROWS * width // 2).view(1, _TRIAL_ROWS, -1).repeat(1, 1, 2)
    arguments = {"hidden_states": x, "position_embeddings": (angles.cos().bfloat16(), angles.sin().bfloat16())}
    try:
        listener = _Listener(cache, batch)
        expected = module(**arguments, attention_mask=None, tuneloom=listener)[0]
        if listener.call is None or listener.call.width != width or width % 32:
            return None
        fused = FusedAttention(*packs, kernels, listener.call)
        return fused if _is_near(fused(**arguments, tuneloom=StepAttention(cache, batch))[0], expected) else None
    except (TypeError, ValueError, RuntimeError):
        # Its forward wants something else: it is another kind of module.
        return None
    finally:
        cache.release(slot, length=_TRIAL_ROWS, is_clean=False)


def _trial_rows(width: int) -> Tensor:
    return (torch.randn(1, _TRIAL_ROWS, width, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()


def _is_near(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.float(), expected.float()
    return found.shape == expected.shape and bool((found - expected).norm() <= _TOLERANCE * expected.norm())
