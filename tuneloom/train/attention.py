"""Causal attention over rows that stand end to end, each on its own. Tensors in; no model, no trainer.

torch's own attention on a CPU is quick forward and slow backward: for rows of 64 tokens its gradient takes twenty times
as long as its result. Here the gradient is five matrix products over all heads, from the normaliser that the forward
pass leaves.
"""

# Shapes: T tokens of all rows · H heads of queries · K heads of keys and values · D head width
# of one group: N rows of the same length · L tokens of a row · Q queries of a block times H/K

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries of a row that the gradient takes at once: later keys are left out, and no (L, L) is kept.
_BLOCK = 256


class Group(NamedTuple):
    """Neighbouring rows of one length."""

    start: int
    rows: int
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.rows * self.length)


def groups_of(borders: list[int]) -> list[Group]:
    """`borders`: where each row starts, and the end of the last."""
    groups: list[Group] = []
    for start, end in itertools.pairwise(borders):
        last = groups[-1] if groups else None
        if last is not None and last.length == end - start:
            groups[-1] = last._replace(rows=last.rows + 1)
        else:
            groups.append(Group(start, 1, end - start))
    return groups


def attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, groups: list[Group], *, scale: float, window: int | None = None
) -> Tensor:
    """What each token takes from itself and those before it in its row, at most `window` in all; (T, H, D)."""
    is_plain = q_THD.device.type == "cpu" and q_THD.shape[-1] == k_TKD.shape[-1] == v_TKD.shape[-1]
    if is_plain and (window is None or all(group.length <= window for group in groups)):
        return _Attention.apply(q_THD, k_TKD, v_TKD, groups, scale)
    parts = [_attend_by_torch(q_THD[g.tokens], k_TKD[g.tokens], v_TKD[g.tokens], g, scale, window) for g in groups]
    return torch.cat(parts)


def _attend_by_torch(q: Tensor, k: Tensor, v: Tensor, group: Group, scale: float, window: int | None) -> Tensor:
    def split(x: Tensor) -> Tensor:
        x = x.view(group.rows, group.length, *x.shape[1:]).transpose(1, 2)
        return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)

    mask = None
    if window is not None and group.length > window:
        order = torch.arange(group.length, device=q.device)
        behind = order[:, None] - order[None, :]
        mask = (behind >= 0) & (behind < window)
    out = F.scaled_dot_product_attention(split(q), split(k), split(v), mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


class _Attention(torch.autograd.Function):
    """Forward by torch's flash attention for CPUs, group by group."""

    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, groups: list[Group], scale: float) -> Tensor:
        heads, out_THD, normalisers = q_THD.shape[1], torch.empty_like(q_THD, memory_format=torch.contiguous_format), []

        def split(x: Tensor, group: Group) -> Tensor:
            x_NLHD = x[group.tokens].unflatten(0, (group.rows, group.length))
            return x_NLHD.repeat_interleave(heads // x.shape[1], dim=2).transpose(1, 2)

        for group in groups:
            out, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                split(q_THD, group), split(k_TKD, group), split(v_TKD, group), 0.0, True, scale=scale
            )
            out_THD[group.tokens] = out.transpose(1, 2).flatten(0, 1)
            normalisers.append(normaliser.reshape(group.rows, heads, group.length))
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, *normalisers)
        ctx.groups, ctx.scale = groups, scale
        return out_THD

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, *normalisers = ctx.saved_tensors
        delta_TH = (grad_THD * out).sum(-1, dtype=torch.float32)
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for group, normaliser in zip(ctx.groups, normalisers, strict=True):
            _GroupGradient(group, k, v, ctx.scale).write(q, grad_THD, delta_TH, normaliser, grads)
        return *grads, None, None


class _GroupGradient:
    """The gradient of one group. Heads that share keys are one matrix: N·K of (Q, D) against (L, D)."""

    def __init__(self, group: Group, k_TKD: Tensor, v_TKD: Tensor, scale: float) -> None:
        self._group, self._scale, self._kv_heads = group, scale, k_TKD.shape[1]
        self._k, self._v = self._by_head(k_TKD), self._by_head(v_TKD)

    def write(
        self, q: Tensor, grad: Tensor, delta_TH: Tensor, normaliser_NHL: Tensor, out: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Fill the rows of the group in the gradients of q, k and v."""
        length, is_whole = self._group.length, self._group.length <= _BLOCK
        grad_k = grad_v = None
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            of_q, of_k, of_v = self._block(
                *(self._queries(x, start, end) for x in (q, grad)),
                self._queries(delta_TH[..., None], start, end),
                self._shared(normaliser_NHL[:, :, start:end, None]),
                start,
                end,
            )
            self._rows(out[0])[:, start:end] = self._unshared(of_q, end - start)
            if is_whole:
                grad_k, grad_v = of_k, of_v
                continue
            if grad_k is None or grad_v is None:
                grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (self._k, self._v))
            grad_k[:, :end] += of_k
            grad_v[:, :end] += of_v
        for target, found in ((out[1], grad_k), (out[2], grad_v)):
            self._rows(target).copy_(found.unflatten(0, (-1, self._kv_heads)).transpose(1, 2))  # type: ignore[union-attr]

    def _block(
        self, q: Tensor, grad: Tensor, delta: Tensor, normaliser: Tensor, start: int, end: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the queries `start` to `end` of each row: gradients of those, and of the keys and values up to `end`."""
        k, v = self._k[:, :end], self._v[:, :end]
        p = torch.bmm(q, k.transpose(1, 2)).float().mul_(self._scale).sub_(normaliser).exp_()
        # In place on the shape with a query a row: what comes after a token gives it nothing.
        p.view(len(p), -1, end - start, end).tril_(start)
        weights = p.to(q.dtype)
        of_v = torch.bmm(weights.transpose(1, 2), grad)
        of_scores = torch.bmm(grad, v.transpose(1, 2)).float().sub_(delta).mul_(p).mul_(self._scale).to(q.dtype)
        return torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q), of_v

    def _rows(self, x: Tensor) -> Tensor:
        return x[self._group.tokens].view(self._group.rows, self._group.length, *x.shape[1:])

    def _by_head(self, x_TKD: Tensor) -> Tensor:
        return self._rows_of(x_TKD).transpose(1, 2).flatten(0, 1)

    def _rows_of(self, x: Tensor) -> Tensor:
        return x[self._group.tokens].unflatten(0, (self._group.rows, self._group.length))

    def _queries(self, x_THX: Tensor, start: int, end: int) -> Tensor:
        return self._shared(self._rows_of(x_THX)[:, start:end].transpose(1, 2))

    def _shared(self, x_NHQX: Tensor) -> Tensor:
        """(N, H, Q, X) to (N K, H/K Q, X)."""
        num_rows, heads, queries, width = x_NHQX.shape
        return x_NHQX.reshape(num_rows * self._kv_heads, heads // self._kv_heads * queries, width)

    def _unshared(self, x: Tensor, queries: int) -> Tensor:
        """(N K, H/K Q, D) to (N, Q, H, D)."""
        return x.view(self._group.rows, -1, queries, x.shape[-1]).transpose(1, 2)
