"""Many adapters in one batch: stacked low-rank factors per linear, and which of them each token uses. No loading.

Shapes: T tokens · K inputs · N outputs · S adapter slots · R rank of a stack · G adapters of a group · M rows of each

Slot 0 is no adapter and stays zero. Layers that read the same input (q, k, v; gate, up) are one pack: one base product,
one shrink and one expand with a block-diagonal B. The scale is folded into B, shorter ranks are padded with zeros.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tuneloom.engine.linear import Product, lazy_zeros, stack

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_FIRST_RANK = 8


@dataclass(frozen=True)
class HostAdapter:
    """An adapter in host memory, ready to copy: per module A (r, K) and B transposed and scaled (r, N)."""

    rank: int
    size_bytes: int
    factors: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Run:
    """Tokens `start` to `end` that use one slot."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True)
class Group:
    """Scattered tokens of several slots, padded to the same number of rows each.

    `rows`: their places in the batch, `places`: their places among the G * M padded rows.
    """

    slots: tuple[int, ...]
    num_rows: int
    rows: Tensor
    places: Tensor
    index: Tensor

    @property
    def is_first_slots(self) -> bool:
        return self.slots == tuple(range(1, len(self.slots) + 1))


@dataclass(frozen=True)
class LoraPlan:
    runs: tuple[Run, ...] = ()
    group: Group | None = None


@dataclass
class LoraStep:
    """What the packs of a model read during a forward pass; the plan of the step at hand."""

    plan: LoraPlan = field(default_factory=LoraPlan)


def plan_rows(scattered: Sequence[int], runs: Sequence[tuple[int, int]], device: torch.device) -> LoraPlan:
    """Plan a batch: one slot for each of the first tokens, then runs of (slot, length).

    Few long runs are best served by a plain product each, scattered rows by one padded batch product.
    """
    found = []
    at = len(scattered)
    for slot, length in runs:
        if slot:
            found.append(Run(slot, at, at + length))
        at += length
    used = sorted({slot for slot in scattered if slot})
    if len(used) == 1 and all(scattered):
        return LoraPlan((Run(used[0], 0, len(scattered)), *found))
    return LoraPlan(tuple(found), _group(scattered, used, device) if used else None)


def _group(scattered: Sequence[int], used: Sequence[int], device: torch.device) -> Group:
    rows, order, counts = [], [], defaultdict(int)
    for row, slot in enumerate(scattered):
        if slot:
            rows.append(row)
            order.append((used.index(slot), counts[slot]))
            counts[slot] += 1
    most = max(counts.values())
    return Group(
        slots=tuple(used),
        num_rows=most,
        rows=torch.tensor(rows, device=device),
        places=torch.tensor([group * most + place for group, place in order], device=device),
        index=torch.tensor(used, device=device),
    )


class LoraPack:
    """The layers of one input with the stacked factors of all slots."""

    def __init__(
        self, names: Sequence[str], linears: Sequence[nn.Linear], step: LoraStep, *, num_slots: int, prepack: bool
    ) -> None:
        self.names = tuple(names)
        self.outputs = [linear.out_features for linear in linears]
        self._step = step
        weight = linears[0].weight
        self._dtype, self._device = weight.dtype, weight.device
        self._num_slots = num_slots
        self._product: Product = stack(list(linears), prepack=prepack)
        self._rank = 0
        self._gathered: tuple[tuple[int, ...], Tensor, Tensor] | None = None
        self.grow(_FIRST_RANK)

    @property
    def num_inputs(self) -> int:
        return self._product.num_inputs

    @property
    def is_packed(self) -> bool:
        return self._product.is_packed

    @property
    def slot_bytes(self) -> int:
        return self._a_SRK[0].nbytes + self._b_SRN[0].nbytes

    def grow(self, rank: int) -> None:
        """Make room for adapters of `rank`; what the slots hold stays."""
        parts, old = len(self.names), self._rank
        shape = (self._num_slots + 1, parts * rank)
        a_SRK = lazy_zeros(*shape, self.num_inputs, dtype=self._dtype, device=self._device)
        b_SRN = lazy_zeros(*shape, self._product.num_outputs, dtype=self._dtype, device=self._device)
        for part in range(parts if old else 0):
            new, kept = slice(part * rank, part * rank + old), slice(part * old, (part + 1) * old)
            a_SRK[:, new] = self._a_SRK[:, kept]
            b_SRN[:, new] = self._b_SRN[:, kept]
        self._a_SRK, self._b_SRN, self._rank, self._gathered = a_SRK, b_SRN, rank, None

    def write(self, slot: int, adapter: HostAdapter) -> None:
        a_RK, b_RN = self._a_SRK[slot], self._b_SRN[slot]
        a_RK.zero_()
        b_RN.zero_()
        column = 0
        for part, (name, outputs) in enumerate(zip(self.names, self.outputs, strict=True)):
            if name in adapter.factors:
                a, b = adapter.factors[name]
                rows = slice(part * self._rank, part * self._rank + a.shape[0])
                a_RK[rows].copy_(a, non_blocking=True)
                b_RN[rows, column : column + outputs].copy_(b, non_blocking=True)
            column += outputs
        self._gathered = None

    def __call__(self, x_TK: Tensor) -> Tensor:
        y_TN = self._product(x_TK)
        plan = self._step.plan
        for run in plan.runs:
            hidden = x_TK[run.start : run.end] @ self._a_SRK[run.slot].t()
            y_TN[run.start : run.end].addmm_(hidden, self._b_SRN[run.slot])
        if plan.group is not None:
            self._add_group(plan.group, x_TK, y_TN)
        return y_TN

    def _add_group(self, group: Group, x_TK: Tensor, y_TN: Tensor) -> None:
        a_GRK, b_GRN = self._active(group)
        count = len(group.slots)
        padded = x_TK.new_zeros(count * group.num_rows, self.num_inputs)
        padded.index_copy_(0, group.places, x_TK.index_select(0, group.rows))
        delta = torch.bmm(torch.bmm(padded.view(count, group.num_rows, -1), a_GRK.transpose(1, 2)), b_GRN)
        y_TN.index_add_(0, group.rows, delta.view(count * group.num_rows, -1).index_select(0, group.places))

    def _active(self, group: Group) -> tuple[Tensor, Tensor]:
        """The factors of a group's slots; copied together once, until the set of slots or their content changes."""
        if group.is_first_slots:
            count = len(group.slots)
            return self._a_SRK[1 : count + 1], self._b_SRN[1 : count + 1]
        if self._gathered is None or self._gathered[0] != group.slots:
            index = group.index
            self._gathered = (group.slots, self._a_SRK.index_select(0, index), self._b_SRN.index_select(0, index))
        return self._gathered[1], self._gathered[2]


class PackPart(nn.Module):
    """Stands in for one layer of a pack. The first to see an input computes for all, the others take their share."""

    def __init__(self, pack: LoraPack, part: int, shared: dict[str, Tensor]) -> None:
        super().__init__()
        self.pack = pack
        self.shared = shared
        self.is_last = part == len(pack.names) - 1
        self.start = sum(pack.outputs[:part])
        self.size = pack.outputs[part]

    def forward(self, x: Tensor) -> Tensor:
        if self.shared.get("x") is not x:
            rows = x.reshape(-1, self.pack.num_inputs)
            self.shared["y"] = self.pack(rows).view(*x.shape[:-1], -1)
            self.shared["x"] = x
        y = self.shared["y"].narrow(-1, self.start, self.size)
        if self.is_last:
            self.shared.clear()
        return y


class LoraLayers:
    """All packs of a model and their slots, 1 to `num_slots`."""

    def __init__(self, body: nn.Module, *, prefix: str, num_slots: int, prepack: bool) -> None:
        """Replace each `nn.Linear` below `body`; `prefix` is the name of `body` in the model that adapters know."""
        self.step = LoraStep()
        self.num_slots = num_slots
        self.shapes: dict[str, tuple[int, int]] = {}
        self._rank = _FIRST_RANK
        self._packs = [
            self._replace(parent, path, children, prepack=prepack)
            for path, parent in list(body.named_modules(prefix=prefix))
            for children in _groups(parent)
        ]

    @property
    def num_packed(self) -> int:
        return sum(pack.is_packed for pack in self._packs)

    @property
    def slot_bytes(self) -> int:
        """What one slot takes on the device; more once an adapter of a larger rank has come."""
        return sum(pack.slot_bytes for pack in self._packs)

    @property
    def num_packs(self) -> int:
        return len(self._packs)

    def write(self, slot: int, adapter: HostAdapter) -> None:
        """Put an adapter into a slot that no running sequence uses."""
        assert 1 <= slot <= self.num_slots
        if adapter.rank > self._rank:
            self._rank = 1 << (adapter.rank - 1).bit_length()
            for pack in self._packs:
                pack.grow(self._rank)
        for pack in self._packs:
            pack.write(slot, adapter)

    def _replace(self, parent: nn.Module, path: str, children: tuple[str, ...], *, prepack: bool) -> LoraPack:
        linears = [parent.get_submodule(name) for name in children]
        names = [f"{path}.{name}" for name in children]
        self.shapes |= {
            name: (linear.out_features, linear.in_features) for name, linear in zip(names, linears, strict=True)
        }
        pack = LoraPack(names, linears, self.step, num_slots=self.num_slots, prepack=prepack)
        shared: dict[str, Tensor] = {}
        for part, name in enumerate(children):
            setattr(parent, name, PackPart(pack, part, shared))
        return pack


def _groups(parent: nn.Module) -> list[tuple[str, ...]]:
    """The linear children of a module, those of one input together."""
    linears = {name: child for name, child in parent.named_children() if type(child) is nn.Linear}
    groups = []
    for group in FUSED:
        if all(name in linears for name in group):
            groups.append(group)
            for name in group:
                del linears[name]
    return [*groups, *((name,) for name in linears)]
