"""What a run holds in memory at most: by the base's shapes and the plan, against what is free. No torch, no loading.

The parts are sums over what autograd keeps for LoRA on a Llama. On a CPU the sum was 0.9 to 1.3 times what runs held
(a Llama of 8 layers in fp32, bf16, NF4 and int8, with activations computed again; SmolLM2-135M in fp32 and bf16).
"""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tuneloom.bases import Base, linear_shapes
from tuneloom.bases.catalogue import read_header
from tuneloom.engine.memory import Room, measure_room
from tuneloom.errors import InvalidRequest
from tuneloom.train.failure import BaseUnreadable
from tuneloom.train.plan import Plan

# Share of the free memory that a run may plan with.
MEMORY_SHARE = 0.9
# Numbers of logits that are held at once, as `answers` computes them.
LOGITS_AT_ONCE = 8 << 20
# Bytes of one weight: four bits, with one byte for each 64 weights and one number for each 256 of those; eight bits.
QUANTISED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
# Python with torch, transformers and TRL, before anything is loaded; and what they set up at the first step.
PROGRAM_BYTES = 600 << 20
FIRST_STEP_BYTES = 150 << 20
# PEFT's layers over bitsandbytes keep copies of their products: measured 1.9 to 2.0 times (CPU, a Llama of 8 layers).
QUANTISED_KEEPS = 2
# Layers whose activations are there at once while they are computed again, with their gradients.
LAYERS_AGAIN = 3


@dataclass(frozen=True)
class MemoryItem:
    """`detail` says how the size comes about."""

    name: str
    size_bytes: int
    detail: str


@dataclass(frozen=True)
class MemoryPlan:
    items: tuple[MemoryItem, ...]

    @property
    def total_bytes(self) -> int:
        return sum(item.size_bytes for item in self.items)

    @property
    def process_bytes(self) -> int:
        """What the process holds on a machine whose device is its host: the program is there, too."""
        return PROGRAM_BYTES + self.total_bytes


@dataclass(frozen=True)
class _Sizes:
    """A base by its shapes. `linears` are (out, in) by module name; `kept` counts the numbers that a token leaves in
    all its linear layers for the backward pass, `adapted` those beside each unit of rank.
    """

    linears: dict[str, tuple[int, int]]
    num_weights: int
    num_linear_weights: int
    largest_linear: int
    hidden: int
    num_layers: int
    kept: int
    vocab_size: int


def plan_memory(base: Base, plan: Plan) -> MemoryPlan:
    """The most that a run of `plan` on `base` holds at once, by parts."""
    sizes = _sizes(base)
    tokens = plan.micro_size * plan.longest_row * (2 if plan.method == "dpo" else 1)
    items = (
        _weights(sizes, plan),
        _adapter(sizes, plan),
        _activations(sizes, plan, tokens),
        _head(sizes, plan, tokens),
        MemoryItem("libraries", FIRST_STEP_BYTES, "what they set up at the first step"),
    )
    return MemoryPlan(items)


def check_fits(base: Base, plan: Plan, room: Room) -> None:
    """Raises InvalidRequest if there is less free than a run needs; the message has the arithmetic."""
    memory = plan_memory(base, plan)
    if fits(memory, room):
        return
    terms = " + ".join(f"{item.name} {gigabytes(item.size_bytes)} ({item.detail})" for item in memory.items)
    quantise = "`tuneloom.quantization` `nf4`, " if plan.quantization == "none" else ""
    raise InvalidRequest(
        f"The run does not fit into the memory of {room.device}: {terms} = {gigabytes(memory.total_bytes)}, and there "
        f"are {gigabytes(int(room.device_bytes * MEMORY_SHARE))} ({MEMORY_SHARE:g} of {gigabytes(room.device_bytes)} "
        f"free). Use shorter rows (`tuneloom.max_length`), {quantise}a smaller base than `{base.id}`, or a larger "
        "machine.",
        code="out_of_memory",
    )


def fits(memory: MemoryPlan, room: Room) -> bool:
    return memory.total_bytes <= room.device_bytes * MEMORY_SHARE


def gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"


def free_room(*, use_gpu: bool, limit_bytes: int | None) -> Room:
    """What this process may still take of the device that it trains on."""
    room = measure_room("cuda" if use_gpu else "cpu")
    if limit_bytes is None or limit_bytes >= room.device_bytes:
        return room
    return Room("a job", limit_bytes)


def _weights(sizes: _Sizes, plan: Plan) -> MemoryItem:
    width = _width(plan)
    if plan.quantization == "none":
        return MemoryItem("base", sizes.num_weights * width, f"{sizes.num_weights:,} weights in {plan.precision}")
    quantised = int(sizes.num_linear_weights * QUANTISED_BYTES[plan.quantization])
    plain = (sizes.num_weights - sizes.num_linear_weights) * width
    # A product restores the weights of its layer.
    restored = sizes.largest_linear * width
    detail = f"{sizes.num_linear_weights:,} weights in {plan.quantization}, the others in {plan.precision}"
    return MemoryItem("base", quantised + plain + restored, detail)


def _adapter(sizes: _Sizes, plan: Plan) -> MemoryItem:
    """A weight of an adapter is fp32, with a gradient and AdamW's two moments."""
    sides = sum(sum(shape) for name, shape in sizes.linears.items() if _is_target(name, plan))
    return MemoryItem("adapter", 16 * plan.rank * sides, f"rank {plan.rank}, with gradients and AdamW's moments")


def _activations(sizes: _Sizes, plan: Plan, tokens: int) -> MemoryItem:
    """What a forward pass keeps for its backward pass, and the gradients of one layer."""
    width, layers = _width(plan), sizes.num_layers
    kept = sizes.kept * width + layers * sizes.hidden * (8 if width == 4 else 16)
    ranks = sum(1 for name in sizes.linears if _is_target(name, plan)) * plan.rank * width
    dropped = sum(shape[1] for name, shape in sizes.linears.items() if _is_target(name, plan)) * (width + 2)
    a_token = kept + ranks + (dropped if plan.dropout else 0)
    if plan.quantization != "none":
        a_token *= QUANTISED_KEEPS
    a_layer = a_token / layers
    if plan.gradient_checkpointing:
        a_token = layers * sizes.hidden * width + (min(LAYERS_AGAIN, layers) - 1) * a_layer
    # Masks of attention, as truth values and as numbers.
    masks = tokens * plan.longest_row * (1 + width)
    size = tokens * (a_token + a_layer) + masks
    detail = f"{tokens:,} tokens at once"
    return MemoryItem("activations", int(size), detail + (", kept by layer" if plan.gradient_checkpointing else ""))


def _head(sizes: _Sizes, plan: Plan, tokens: int) -> MemoryItem:
    """Logits, their logarithms, probabilities and a product of these, for a part of the positions at a time."""
    logits = min(tokens * sizes.vocab_size, max(LOGITS_AT_ONCE, sizes.vocab_size))
    size = 16 * logits + tokens * sizes.hidden * (4 + _width(plan))
    return MemoryItem("logits", size, f"{logits:,} at once")


def _width(plan: Plan) -> int:
    return 4 if plan.precision == "fp32" else 2


def _is_target(name: str, plan: Plan) -> bool:
    return plan.target_modules is None or name.rpartition(".")[2] in plan.target_modules


@functools.lru_cache(maxsize=16)
def _sizes(base: Base) -> _Sizes:
    """Raises BaseUnreadable if its files are not whole."""
    tensors: dict[str, Any] = {}
    try:
        for file in sorted(base.path.glob("*.safetensors")):
            tensors |= read_header(file)
        linears = linear_shapes(base)
    except (OSError, InvalidRequest) as error:
        raise BaseUnreadable.of(base.id, str(error).replace(str(base.path), base.id)) from error
    counts = {name: _count(entry["shape"]) for name, entry in tensors.items()}
    layer_counts = [out * inner for out, inner in linears.values()]
    # Most layers read what the trunk carries.
    hidden = Counter(inner for _, inner in linears.values()).most_common(1)[0][0] if linears else 0
    widest: dict[str, int] = {}
    for name, (out, _) in linears.items():
        layer = _layer_of(name)
        widest[layer] = max(widest.get(layer, 0), out)
    outputs = sum(out for out, _ in linears.values())
    inputs = sum(inner for _, inner in linears.values() if inner != hidden)
    return _Sizes(
        linears=linears,
        num_weights=sum(counts.values()),
        num_linear_weights=sum(layer_counts),
        largest_linear=max(layer_counts, default=0),
        hidden=hidden,
        num_layers=max(1, len(widest)),
        # Inputs and outputs of products, and of the activation function between them.
        kept=outputs + inputs + sum(widest.values()),
        vocab_size=base.vocab_size,
    )


def _layer_of(name: str) -> str:
    """`model.layers.0.mlp.up_proj` -> `model.layers.0`."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=0)
    return ".".join(parts[: last + 1])


def _count(shape: list[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)
