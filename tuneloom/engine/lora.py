"""Many adapters in one batch: the linears of a model with the factors of all adapter slots. No loading.

Layers that read the same input (q, k, v; gate, up) are one pack: one base product, one update for all of them.

Shapes: T tokens · K inputs · N outputs · R rank
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tuneloom.engine.kernels import Kernels
from tuneloom.engine.linear import Product, ProductOptions, stack
from tuneloom.engine.pages import huge_pages
from tuneloom.engine.quantised import QuantisedProduct, is_quantised
from tuneloom.engine.stacks import Factors, LoraPlan, NativeStacks, Stacks, TorchStacks, plan_rows, plan_slots

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class HostAdapter:
    """An adapter in host memory: per module A (r, K) and B transposed and scaled (r, N).

    `LoraLayers.arrange` makes of it what a slot takes as it is.
    """

    rank: int
    size_bytes: int
    factors: Mapping[str, Factors]


@dataclass(frozen=True)
class PackOptions:
    """How packs are built: `num_slots` adapters of up to `max_rank` at once, computed in `dtype`."""

    num_slots: int
    max_rank: int
    product: ProductOptions
    dtype: torch.dtype

    @property
    def kernels(self) -> Kernels | None:
        return self.product.kernels


@dataclass
class LoraStep:
    """What the packs of a model read during a forward pass; the plan of the step at hand."""

    plan: LoraPlan = field(default_factory=LoraPlan)


class LoraPack:
    """The layers of one input: their product and the stacked factors of all slots."""

    def __init__(
        self, names: Sequence[str], linears: Sequence[nn.Linear], step: LoraStep, options: PackOptions
    ) -> None:
        self.names = tuple(names)
        self.parts = tuple(name.rpartition(".")[2] for name in names)
        self.outputs = [linear.out_features for linear in linears]
        self._step = step
        has_quantised = any(map(is_quantised, linears))
        self._product: Product | QuantisedProduct = (
            QuantisedProduct(linears) if has_quantised else stack(list(linears), options.product)
        )
        like = torch.empty(0, dtype=options.dtype, device=linears[0].weight.device)
        self._stacks: Stacks = (
            TorchStacks(self.num_inputs, self.outputs, options.num_slots, like)
            if options.kernels is None
            else NativeStacks(self.num_inputs, self.outputs, options.num_slots, options.max_rank, options.kernels)
        )

    @property
    def num_inputs(self) -> int:
        return self._product.num_inputs

    @property
    def is_packed(self) -> bool:
        return self._product.is_packed

    @property
    def slot_bytes(self) -> int:
        return self._stacks.slot_bytes

    def arrange(self, name: str, factors: Factors, place: Tensor) -> Factors:
        """The factors of one layer in the form of the native stacks, in `place`, which has room for `numbers`."""
        assert isinstance(self._stacks, NativeStacks)
        return self._stacks.arrange(self.names.index(name), factors, place)

    def numbers(self, name: str, rank: int) -> int:
        assert isinstance(self._stacks, NativeStacks)
        return self._stacks.numbers(self.names.index(name), rank)

    def write(self, slot: int, adapter: HostAdapter) -> None:
        self._stacks.write(slot, [adapter.factors.get(name) for name in self.names])

    def __call__(self, x_TK: Tensor) -> Tensor:
        y_TN = self._product(x_TK)
        self._stacks.add(x_TK, y_TN, self._step.plan)
        return y_TN


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

    def __init__(self, body: nn.Module, options: PackOptions, *, prefix: str) -> None:
        """Replace each `nn.Linear` below `body`; `prefix` is the name of `body` in the model that adapters know."""
        self.step = LoraStep()
        self.shapes: dict[str, tuple[int, int]] = {}
        self._options = options
        self._packs = [
            self._replace(parent, path, children)
            for path, parent in list(body.named_modules(prefix=prefix))
            for children in linear_groups(parent)
        ]

    @property
    def num_packed(self) -> int:
        return sum(pack.is_packed for pack in self._packs)

    @property
    def slot_bytes(self) -> int:
        """What one slot takes on the device; more once an adapter of a larger rank has come."""
        return sum(pack.slot_bytes for pack in self._packs)

    @property
    def uses_host_copies(self) -> bool:
        """Whether slots work on what `arrange` has made instead of a copy of it."""
        return self._options.kernels is not None

    @property
    def num_packs(self) -> int:
        return len(self._packs)

    def arrange(self, adapter: HostAdapter) -> HostAdapter:
        """Bring an adapter into the form that slots take; any thread may do that."""
        if self._options.kernels is None:
            return adapter
        packs = {name: pack for pack in self._packs for name in pack.names if name in adapter.factors}
        sizes = [pack.numbers(name, adapter.factors[name][0].shape[0]) for name, pack in packs.items()]
        place = huge_pages(sum(sizes), torch.bfloat16)
        factors = {
            name: pack.arrange(name, adapter.factors[name], part)
            for (name, pack), part in zip(packs.items(), place.split(sizes), strict=True)
        }
        return HostAdapter(adapter.rank, place.nbytes, factors)

    def plan(self, scattered: Sequence[int], runs: Sequence[tuple[int, int]], device: torch.device) -> None:
        """Set what the next forward pass uses: the slot of each of the first tokens, then runs of (slot, length)."""
        is_native = self._options.kernels is not None
        self.step.plan = plan_slots(scattered, runs) if is_native else plan_rows(scattered, runs, device)

    def write(self, slot: int, adapter: HostAdapter) -> None:
        """Put an adapter into a slot that no running sequence uses."""
        assert 1 <= slot <= self._options.num_slots
        for pack in self._packs:
            pack.write(slot, adapter)

    def _replace(self, parent: nn.Module, path: str, children: tuple[str, ...]) -> LoraPack:
        linears = [parent.get_submodule(name) for name in children]
        names = [f"{path}.{name}" for name in children]
        self.shapes |= {
            name: (linear.out_features, linear.in_features) for name, linear in zip(names, linears, strict=True)
        }
        pack = LoraPack(names, linears, self.step, self._options)
        shared: dict[str, Tensor] = {}
        for part, name in enumerate(children):
            setattr(parent, name, PackPart(pack, part, shared))
        return pack


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer, quantised or not, to which adapters can add."""
    return type(module) is nn.Linear or is_quantised(module)


def linear_groups(parent: nn.Module) -> list[tuple[str, ...]]:
    """The linear children of a module, those of one input together."""
    linears = {name: child for name, child in parent.named_children() if is_linear(child)}
    groups = []
    for group in FUSED:
        if all(name in linears for name in group):
            groups.append(group)
            for name in group:
                del linears[name]
    return [*groups, *((name,) for name in linears)]
