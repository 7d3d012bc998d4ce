"""The stacked low-rank factors of one pack of linears, and the product of a batch with them. No modules, no loading.

Slot 0 is no adapter and stays empty. The scale is folded into B, shorter ranks are padded with zeros. `TorchStacks`
runs on any device; `NativeStacks` does the same by the CPU kernel.

Shapes: T tokens · K inputs · N outputs · S adapter slots · R rank of a stack · G adapters of a group
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tuneloom.engine.kernels import Kernels, SlotRuns
from tuneloom.engine.pages import lazy_zeros

_FIRST_RANK = 8

# A and B of one linear for one adapter, B transposed and scaled.
Factors = tuple[Tensor, Tensor]


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
    """Who uses which slot in one batch, in the form that the stacks of this engine read."""

    runs: tuple[Run, ...] = ()
    group: Group | None = None
    by_slot: SlotRuns | None = None


def plan_rows(scattered: Sequence[int], runs: Sequence[tuple[int, int]], device: torch.device) -> LoraPlan:
    """Plan a batch for `TorchStacks`: one slot for each of the first tokens, then runs of (slot, length).

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


def plan_slots(scattered: Sequence[int], runs: Sequence[tuple[int, int]]) -> LoraPlan:
    """Plan a batch for `NativeStacks`, whose kernel takes the tokens of a slot wherever they are."""
    rows: dict[int, list[int]] = defaultdict(list)
    for row, slot in enumerate(scattered):
        rows[slot].append(row)
    at = len(scattered)
    for slot, length in runs:
        rows[slot] += range(at, at + length)
        at += length
    rows.pop(0, None)
    return LoraPlan(by_slot=SlotRuns(rows)) if rows else LoraPlan()


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


class Stacks(Protocol):
    """The factors of one pack for all slots, and the product with them."""

    @property
    def slot_bytes(self) -> int: ...

    def write(self, slot: int, factors: Sequence[Factors | None]) -> None:
        """Fill a slot with each part's factors; None: the adapter leaves that part alone."""
        ...

    def add(self, x_TK: Tensor, y_TN: Tensor, plan: LoraPlan) -> None:
        """Add each token's update to `y_TN` in place."""
        ...


class TorchStacks:
    """By torch's own operators, on any device. All parts in one product: A side by side, B block-diagonal."""

    def __init__(self, num_inputs: int, outputs: Sequence[int], num_slots: int, like: Tensor) -> None:
        self._num_inputs, self._outputs, self._num_slots = num_inputs, outputs, num_slots
        self._dtype, self._device = like.dtype, like.device
        self._rank = 0
        self._gathered: tuple[tuple[int, ...], Tensor, Tensor] | None = None
        self._grow(_FIRST_RANK)

    @property
    def slot_bytes(self) -> int:
        return self._a_SRK[0].nbytes + self._b_SRN[0].nbytes

    def write(self, slot: int, factors: Sequence[Factors | None]) -> None:
        largest = max((pair[0].shape[0] for pair in factors if pair is not None), default=0)
        if largest > self._rank:
            self._grow(1 << (largest - 1).bit_length())
        a_RK, b_RN = self._a_SRK[slot], self._b_SRN[slot]
        a_RK.zero_()
        b_RN.zero_()
        column = 0
        for part, (pair, outputs) in enumerate(zip(factors, self._outputs, strict=True)):
            if pair is not None:
                rows = slice(part * self._rank, part * self._rank + pair[0].shape[0])
                a_RK[rows].copy_(pair[0], non_blocking=True)
                b_RN[rows, column : column + outputs].copy_(pair[1], non_blocking=True)
            column += outputs
        self._gathered = None

    def add(self, x_TK: Tensor, y_TN: Tensor, plan: LoraPlan) -> None:
        for run in plan.runs:
            hidden = x_TK[run.start : run.end] @ self._a_SRK[run.slot].t()
            y_TN[run.start : run.end].addmm_(hidden, self._b_SRN[run.slot])
        if plan.group is not None:
            self._add_group(plan.group, x_TK, y_TN)

    def _grow(self, rank: int) -> None:
        """Make room for adapters of `rank`; what the slots hold stays."""
        parts, old = len(self._outputs), self._rank
        shape = (self._num_slots + 1, parts * rank)
        a_SRK = lazy_zeros(*shape, self._num_inputs, dtype=self._dtype, device=self._device)
        b_SRN = lazy_zeros(*shape, sum(self._outputs), dtype=self._dtype, device=self._device)
        for part in range(parts if old else 0):
            new, kept = slice(part * rank, part * rank + old), slice(part * old, (part + 1) * old)
            a_SRK[:, new] = self._a_SRK[:, kept]
            b_SRN[:, new] = self._b_SRN[:, kept]
        self._a_SRK, self._b_SRN, self._rank, self._gathered = a_SRK, b_SRN, rank, None

    def _add_group(self, group: Group, x_TK: Tensor, y_TN: Tensor) -> None:
        a_GRK, b_GRN = self._active(group)
        count = len(group.slots)
        padded = x_TK.new_zeros(count * group.num_rows, self._num_inputs)
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


class NativeStacks:
    """By the CPU kernel: only what an adapter has is read and multiplied, and that from where it was loaded.

    A slot holds no copy but the addresses and ranks of an adapter's factors. They have the kernel's form: A (rank, K)
    and B (rank / 2, N, 2), the order in which one instruction takes two ranks. `rank` is filled up to a multiple of 4.
    """

    def __init__(
        self, num_inputs: int, outputs: Sequence[int], num_slots: int, max_rank: int, kernels: Kernels
    ) -> None:
        self._kernels, self._num_inputs, self._outputs = kernels, num_inputs, outputs
        self._columns = torch.tensor([0, *itertools.accumulate(outputs)])
        self._max_rank = _round_up(max_rank)
        self._factors = torch.zeros(num_slots + 1, len(outputs), 3, dtype=torch.long)
        # The factors live as long as a slot points to them.
        self._held: dict[int, Sequence[Factors | None]] = {}

    @property
    def slot_bytes(self) -> int:
        """Nothing beside the host's copy."""
        return 0

    def numbers(self, part: int, rank: int) -> int:
        """How many numbers the factors of a part take."""
        return _round_up(rank) * (self._num_inputs + self._outputs[part])

    def arrange(self, part: int, factors: Factors, place: Tensor) -> Factors:
        """Write factors (r, K) and (r, N) into `place`, which has room for `numbers`, in the kernel's form."""
        a_rK, b_rN = factors
        rank, padded, outputs = a_rK.shape[0], _round_up(a_rK.shape[0]), self._outputs[part]
        a_RK, b_RN2 = place.split([padded * self._num_inputs, padded * outputs])
        a_RK, b_RN2 = a_RK.view(padded, -1), b_RN2.view(padded // 2, outputs, 2)
        if rank < padded:
            place.zero_()
        a_RK[:rank] = a_rK
        whole = rank // 2
        b_RN2[:whole].transpose(1, 2).copy_(b_rN[: 2 * whole].view(whole, 2, outputs))
        if rank % 2:
            b_RN2[whole, :, 0] = b_rN[-1]
        return a_RK, b_RN2

    def write(self, slot: int, factors: Sequence[Factors | None]) -> None:
        self._held[slot] = factors
        rows = [(0, 0, 0) if pair is None else (*(f.data_ptr() for f in pair), pair[0].shape[0]) for pair in factors]
        self._factors[slot] = torch.tensor(rows)

    def add(self, x_TK: Tensor, y_TN: Tensor, plan: LoraPlan) -> None:
        if plan.by_slot is not None:
            self._kernels.add_lora(x_TK, y_TN, self._columns, self._factors, plan.by_slot, self._max_rank)


def _round_up(rank: int) -> int:
    return -(-rank // 4) * 4
