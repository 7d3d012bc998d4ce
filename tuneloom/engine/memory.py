"""Whether a base fits: what each part of an engine takes, against what the machine has. No tensors, no loading.

`plan_memory` is pure; `measure_room` looks at the machine. Sizes are bytes, lengths are tokens.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tuneloom.errors import InvalidRequest

Place = Literal["device", "host"]

_MIB = 1 << 20
# A limit at or above this is how a cgroup of the first version says that there is none.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class BaseSizes:
    """What a base takes once loaded. `rank_bytes`: one adapter slot, for each unit of rank. `state_bytes`: what a
    sequence takes besides its `kv_token_bytes` for each token. `step_token_bytes`: activations of one token of a step.
    `seen_token_bytes`: scratch of attention for each pair of a token of a step and a token that it sees.
    """

    weight_bytes: int
    rank_bytes: int
    kv_token_bytes: int
    vocab_size: int
    step_token_bytes: int
    seen_token_bytes: int = 0
    state_bytes: int = 0


@dataclass(frozen=True)
class Demand:
    """What an engine is asked to hold. `kv_cache_tokens` None: as many as fit, up to what its sequences can use."""

    max_sequences: int
    max_length: int
    max_step_tokens: int
    adapter_slots: int
    max_rank: int
    host_cache_bytes: int
    prefix_cache_bytes: int = 0
    kv_cache_tokens: int | None = None
    memory_share: float = 0.9


@dataclass(frozen=True)
class Room:
    """Bytes that are free. `host_bytes` None: the device computes in host memory."""

    device: str
    device_bytes: int
    host_bytes: int | None = None


@dataclass(frozen=True)
class MemoryItem:
    """`detail` says how the size comes about; `options` are those that make it smaller."""

    name: str
    place: Place
    size_bytes: int
    detail: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class MemoryPlan:
    """`kv_cache_tokens`: tokens whose keys and values all sequences together may hold."""

    items: tuple[MemoryItem, ...]
    kv_cache_tokens: int
    room: Room
    share: float

    def total_bytes(self, place: Place) -> int:
        return sum(item.size_bytes for item in self.items if item.place == place)

    def report(self) -> dict[str, Any]:
        """The plan as plain values, for people who look after the engine."""
        return {
            "kv_cache_tokens": self.kv_cache_tokens,
            "share": self.share,
            "device_bytes_planned": self.total_bytes("device"),
            "host_bytes_planned": self.total_bytes("host"),
            "room": asdict(self.room),
            "items": {item.name: item.size_bytes for item in self.items},
        }


def plan_memory(base: str, sizes: BaseSizes, demand: Demand, room: Room) -> MemoryPlan:
    """Share out the memory of a machine.

    The cache gets room for one sequence of full length at least, for all of them at most, and between those what the
    other parts leave of `memory_share`. A number in `kv_cache_tokens` stands.

    Raises:
        InvalidRequest: `base` does not fit; the message has each part, the sum, what there is, and what to lower.
    """
    host: Place = "device" if room.host_bytes is None else "host"
    items = [
        MemoryItem("weights", "device", sizes.weight_bytes, "as loaded", ("quantization", "dtype")),
        _slots(sizes, demand),
        _workspace(sizes, demand),
        MemoryItem(
            "adapters in host memory", host, demand.host_cache_bytes, "`host_cache_bytes`", ("host_cache_bytes",)
        ),
        MemoryItem("prefix cache", host, demand.prefix_cache_bytes, "`prefix_cache_bytes`", ("prefix_cache_bytes",)),
    ]
    left = int(room.device_bytes * demand.memory_share) - sum(i.size_bytes for i in items if i.place == "device")
    tokens = _cache_tokens(sizes, demand, left)
    items.append(_cache(sizes, demand, tokens))
    plan = MemoryPlan(tuple(item for item in items if item.size_bytes), tokens, room, demand.memory_share)
    _check(base, plan, sizes, demand)
    return plan


def measure_room(device_type: str) -> Room:
    """What is free on the device of this process, and on its host."""
    host_bytes = available_host_bytes()
    if device_type == "cpu":
        return Room("the host", host_bytes)
    import torch

    free_bytes, _ = torch.cuda.mem_get_info()
    return Room(torch.cuda.get_device_name(), free_bytes, host_bytes)


def available_host_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process can still get: what the machine has free, or less where a control group limits it."""
    meminfo = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    return max(0, min([available, *_cgroup_rooms(proc, cgroups)]))


def _slots(sizes: BaseSizes, demand: Demand) -> MemoryItem:
    # Slots grow by powers of two to the largest rank that came; slot 0 is no adapter.
    rank = 1 << (demand.max_rank - 1).bit_length()
    slots = demand.adapter_slots + 1
    detail = f"{slots} slots of rank {rank}"
    return MemoryItem("adapter slots", "device", slots * rank * sizes.rank_bytes, detail, ("adapter_slots", "max_rank"))


def _workspace(sizes: BaseSizes, demand: Demand) -> MemoryItem:
    """Logits of the rows that sample, as they come, in fp32 and adjusted; activations and masks of a step."""
    rows = min(demand.max_sequences, demand.max_step_tokens)
    logits = rows * sizes.vocab_size * 4 * 3
    tokens = demand.max_step_tokens
    activations = tokens * (sizes.step_token_bytes + demand.max_length * sizes.seen_token_bytes)
    detail = f"logits of {rows} rows, activations of {tokens} tokens"
    return MemoryItem("workspace", "device", logits + activations, detail, ("max_step_tokens", "max_sequences"))


def _cache_tokens(sizes: BaseSizes, demand: Demand, left: int) -> int:
    if demand.kv_cache_tokens is not None:
        return demand.kv_cache_tokens
    most = demand.max_sequences * demand.max_length
    if not sizes.kv_token_bytes:
        return most
    fitting = (left - demand.max_sequences * sizes.state_bytes) // sizes.kv_token_bytes
    return max(min(demand.max_length, most), min(most, fitting))


def _cache(sizes: BaseSizes, demand: Demand, tokens: int) -> MemoryItem:
    size = tokens * sizes.kv_token_bytes + demand.max_sequences * sizes.state_bytes
    detail = f"{tokens} tokens of {sizes.kv_token_bytes / 1024:.1f} KiB"
    options = ("max_length", "kv_cache_tokens") if demand.kv_cache_tokens is None else ("kv_cache_tokens",)
    return MemoryItem("keys and values", "device", size, detail, options)


def _check(base: str, plan: MemoryPlan, sizes: BaseSizes, demand: Demand) -> None:
    room = plan.room
    places: list[tuple[Place, str, int]] = [("device", room.device, room.device_bytes)]
    if room.host_bytes is not None:
        places.append(("host", "the host", room.host_bytes))
    for place, name, free_bytes in places:
        usable, needed = int(free_bytes * plan.share), plan.total_bytes(place)
        if needed > usable:
            items = sorted((i for i in plan.items if i.place == place), key=lambda item: -item.size_bytes)
            terms = " + ".join(f"{item.name} {_mib(item.size_bytes)} ({item.detail})" for item in items)
            options = ", ".join(f"`{option}`" for item in items for option in item.options)
            raise InvalidRequest(
                f"The base {base} does not fit into {name}: {terms} = {_mib(needed)}, and there are {_mib(usable)} "
                f"({plan.share:g} of {_mib(free_bytes)} free). Change one of {options}"
                f"{_fitting_length(sizes, demand, needed - usable, place)}, or use a larger machine.",
                code="out_of_memory",
            )


def _fitting_length(sizes: BaseSizes, demand: Demand, missing: int, place: Place) -> str:
    """The context that would fit, if only the context is too long."""
    token_bytes = sizes.kv_token_bytes + demand.max_step_tokens * sizes.seen_token_bytes
    if place == "host" or demand.kv_cache_tokens is not None or not token_bytes:
        return ""
    length = demand.max_length - -(-missing // token_bytes)
    return f" (`max_length` {length} would fit)" if length >= 16 else ""


def _cgroup_rooms(proc: Path, cgroups: Path) -> Iterator[int]:
    """What the limits of this process's control groups, and of those above them, leave."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            yield from _room_of(root.joinpath(*parts[:depth]), *names)


def _room_of(group: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines() if " " in line)
    except OSError:
        return
    if limit != "max" and int(limit) < _NO_LIMIT:
        # The kernel gives file pages back before it refuses memory.
        yield int(limit) - usage + int(stat.get(cache_name, 0))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:,.0f} MiB"
