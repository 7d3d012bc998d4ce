"""The time of the device is shared out without a rest: by tokens computed, to whoever was in the step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.conftest import GREEDY, Harness, OpenCore, ref_of, request
from tests.engine.models import COMMON, make_model
from tuneloom.engine.base import SequenceRequest


def shared(requests: list[SequenceRequest]) -> float:
    return sum(request.meter.device_s for request in requests)


def run_steps(engine: Harness, before_each: Callable[[], None] = lambda: None) -> None:
    for _ in range(3000):
        if not engine.core.has_sequences:
            return
        before_each()
        engine.step()
    raise AssertionError("the engine did not come to an end")


def test_a_step_is_shared_by_tokens(open_core: OpenCore, tiny_prompts: list[list[int]]):
    engine = open_core(max_step_tokens=64)
    long, short = (request(id, tiny_prompts[7][:count]) for id, count in (("long", 30), ("short", 10)))
    engine.core.add(long)
    engine.core.add(short)
    engine.core.step()
    busy = engine.core.stats().busy_s
    assert busy > 0
    assert (long.meter.device_s, short.meter.device_s) == (pytest.approx(busy * 3 / 4), pytest.approx(busy / 4))
    engine.core.step()
    decoding = (engine.core.stats().busy_s - busy) / 2
    assert long.meter.device_s == pytest.approx(busy * 3 / 4 + decoding)


@pytest.mark.parametrize("prefix_cache_bytes", [0, 1 << 20])
def test_all_sequences_together_have_all_the_time(
    open_core: OpenCore, tiny_adapters: list[Path], tiny_prompts: list[list[int]], prefix_cache_bytes: int
):
    """Also of chunks, of preempted and aborted ones, and of those whose prompt was known."""
    cache = {"kv_cache_tokens": 144, "prefix_cache_bytes": prefix_cache_bytes}
    engine = open_core(max_sequences=6, max_step_tokens=32, adapter_slots=2, **cache)
    folders = [None, *tiny_adapters]
    requests = []
    for number in range(18):
        folder = folders[number % 5]
        adapter = ref_of(folder) if folder else None
        params = replace(GREEDY, max_tokens=20 + number)
        prompt = tiny_prompts[number]
        requests.append(request(f"r{number}", prompt, params=params, adapter=adapter, owner="abc"[number % 3]))
        engine.core.add(requests[-1])

    def abort() -> None:
        if engine.core.stats().steps == 90:
            for number in (9, 17):
                engine.core.abort(f"r{number}")

    run_steps(engine, abort)
    stats = engine.core.stats()
    assert stats.busy_s > 0 and (stats.preemptions > 0 or prefix_cache_bytes)
    assert shared(requests) == pytest.approx(stats.busy_s, rel=1e-9)


def test_a_step_that_fails_is_shared_too(open_core: OpenCore, tiny_prompts: list[list[int]], monkeypatch):
    engine = open_core()
    requests = [request(f"r{number}", tiny_prompts[number]) for number in range(3)]
    for one in requests:
        engine.core.add(one)

    def fail(work: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(engine.core._runner, "forward", fail)
    engine.step()
    assert len(engine.errors) == 3
    assert shared(requests) == pytest.approx(engine.core.stats().busy_s) and shared(requests) > 0


def test_a_base_that_takes_one_at_a_time_gives_each_its_own_time(
    open_core: OpenCore, tiny_prompts: list[list[int]], tmp_path: Path
):
    base = make_model(tmp_path / "base", "falcon", {**COMMON, "alibi": True})
    engine = open_core(base, max_step_tokens=24)
    requests = [request(f"r{number}", tiny_prompts[number]) for number in range(3)]
    for one in requests:
        engine.core.add(one)
    run_steps(engine)
    assert min(one.meter.device_s for one in requests) > 0
    assert shared(requests) == pytest.approx(engine.core.stats().busy_s, rel=1e-9)
