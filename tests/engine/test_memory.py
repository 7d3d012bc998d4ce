"""The plan of memory: arithmetic that can be checked by hand, and what the machine says it has."""

from dataclasses import replace
from pathlib import Path

import pytest

from tuneloom.engine.memory import (
    BaseSizes,
    Demand,
    MemoryPlan,
    Room,
    available_host_bytes,
    measure_room,
    plan_memory,
)
from tuneloom.errors import InvalidRequest

MIB = 1 << 20
SIZES = BaseSizes(
    weight_bytes=300 * MIB, rank_bytes=MIB // 64, kv_token_bytes=MIB // 64, vocab_size=0, step_token_bytes=0
)
DEMAND = Demand(
    max_sequences=4,
    max_length=1024,
    max_step_tokens=64,
    adapter_slots=7,
    max_rank=16,
    host_cache_bytes=20 * MIB,
    prefix_cache_bytes=10 * MIB,
    memory_share=0.5,
)
# weights 300, slots 8 x 16 / 64 = 2, host copies 20, prefixes 10; a sequence of full length takes 16.
FIXED_MIB = 332


def plan(sizes: BaseSizes = SIZES, room_mib: int = 2000, host_mib: int | None = None, **demand: object) -> MemoryPlan:
    room = Room("the host", room_mib * MIB, None if host_mib is None else host_mib * MIB)
    return plan_memory("tiny/llama", sizes, replace(DEMAND, **demand), room)


def test_the_cache_gets_all_that_its_sequences_can_use_where_there_is_room():
    found = plan()
    assert found.kv_cache_tokens == 4 * 1024
    assert found.total_bytes("device") == (FIXED_MIB + 4 * 16) * MIB


def test_the_cache_gets_what_is_left_where_there_is_less():
    found = plan(room_mib=2 * (FIXED_MIB + 30))
    assert found.kv_cache_tokens == 30 * 64
    assert found.total_bytes("device") <= found.room.device_bytes * 0.5


def test_a_number_of_tokens_that_is_asked_for_stands():
    assert plan(kv_cache_tokens=100).kv_cache_tokens == 100
    with pytest.raises(InvalidRequest, match=r"keys and values 1,562 MiB \(100000 tokens of 16.0 KiB\)"):
        plan(kv_cache_tokens=100_000)


def test_a_base_that_does_not_fit_is_refused_with_the_arithmetic():
    with pytest.raises(InvalidRequest) as refusal:
        plan(room_mib=600)
    message = refusal.value.message
    assert refusal.value.code == "out_of_memory"
    assert (
        "tiny/llama does not fit into the host: weights 300 MiB (as loaded) + adapters in host memory 20 MiB" in message
    )
    assert "keys and values 16 MiB (1024 tokens of 16.0 KiB)" in message
    assert "adapter slots 2 MiB (8 slots of rank 16) = 348 MiB, and there are 300 MiB (0.5 of 600 MiB free)" in message
    assert "Change one of `quantization`, `dtype`, `host_cache_bytes`" in message


def test_a_context_that_is_too_long_is_told_which_would_fit():
    with pytest.raises(InvalidRequest, match=r"`max_length` 256 would fit"):
        plan(room_mib=2 * (FIXED_MIB + 4))
    assert plan(room_mib=2 * (FIXED_MIB + 4), max_length=256).kv_cache_tokens == 256


def test_device_and_host_are_counted_apart_where_they_are_two():
    found = plan(host_mib=80)
    assert found.total_bytes("device") == (302 + 64) * MIB
    assert found.total_bytes("host") == 30 * MIB
    with pytest.raises(InvalidRequest, match=r"does not fit into the host: adapters .* = 30 MiB, and there are 20 MiB"):
        plan(host_mib=40)


def test_the_workspace_counts_logits_activations_and_masks():
    sizes = replace(SIZES, vocab_size=1000, step_token_bytes=500, seen_token_bytes=2)
    [workspace] = [item for item in plan(sizes).items if item.name == "workspace"]
    assert workspace.size_bytes == 4 * 1000 * 4 * 3 + 64 * (500 + 1024 * 2)


def test_a_base_without_keys_and_values_counts_the_state_of_each_sequence():
    sizes = replace(SIZES, kv_token_bytes=0, state_bytes=3 * MIB)
    found = plan(sizes)
    assert found.kv_cache_tokens == 4 * 1024
    assert found.total_bytes("device") == (FIXED_MIB + 4 * 3) * MIB


def test_ranks_are_counted_as_the_slots_grow():
    assert plan(max_rank=48).total_bytes("device") == plan(max_rank=64).total_bytes("device")


def test_the_report_names_every_part():
    report = plan().report()
    assert report["items"]["adapter slots"] == 2 * MIB
    assert sum(report["items"].values()) == report["device_bytes_planned"] == (FIXED_MIB + 64) * MIB
    assert report["kv_cache_tokens"] == 4096 and report["room"]["device"] == "the host"


def make_machine(root: Path, *, available_kib: int, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    proc, groups = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable:   {available_kib} kB\nHugePages_Free: 0\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = groups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, groups


def group(name: str, limit: str, usage: int, cache: int = 0) -> dict[str, str]:
    return {
        f"{name}/memory.max": f"{limit}\n",
        f"{name}/memory.current": f"{usage}\n",
        f"{name}/memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


def test_the_host_has_what_the_kernel_says_is_available(tmp_path: Path):
    machine = make_machine(tmp_path, available_kib=1000, cgroup="0::/\n", files={})
    assert available_host_bytes(*machine) == 1000 * 1024


def test_the_tightest_limit_of_a_control_group_counts_without_its_file_pages(tmp_path: Path):
    files = {**group("pod", "500000", 400000, 50000), **group("pod/main", "max", 1)}
    machine = make_machine(tmp_path, available_kib=1000, cgroup="0::/pod/main\n", files=files)
    assert available_host_bytes(*machine) == 150000


def test_limits_of_the_first_version_of_control_groups_count_too(tmp_path: Path):
    files = {
        "memory/box/memory.limit_in_bytes": "300000\n",
        "memory/box/memory.usage_in_bytes": "100000\n",
        "memory/box/memory.stat": "total_inactive_file 1000\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "1\n",
        "memory/memory.stat": "\n",
    }
    cgroup = "5:cpu,cpuacct:/box\n4:memory:/box\n0::/\n"
    machine = make_machine(tmp_path, available_kib=1000, cgroup=cgroup, files=files)
    assert available_host_bytes(*machine) == 201000


def test_this_machine_has_room():
    assert measure_room("cpu").device_bytes > 64 * MIB
