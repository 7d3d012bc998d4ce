import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import GREEDY, OpenCore, ref_of, request
from tuneloom.engine.core import EngineCore
from tuneloom.errors import AdapterRejected, ContextLengthExceeded, InvalidRequest, Overloaded
from tuneloom.generation import SamplingParams


@pytest.mark.parametrize("form", ["dense", "paged"])
def test_mixed_requests_over_many_adapters_equal_generate(
    open_core: OpenCore,
    tiny_base: Path,
    tiny_adapters: list[Path],
    tiny_prompts: list[list[int]],
    plain_generate,
    form: str,
):
    """Chunked prefill, joins, leaves, an abort, and two slots for four adapters."""
    engine = open_core(kv_cache=form, max_sequences=6, max_step_tokens=24, adapter_slots=2)
    folders = [None, *tiny_adapters]
    counts = [4 + i % 9 for i in range(30)]
    for i, prompt in enumerate(tiny_prompts):
        folder = folders[i % 5]
        params = replace(GREEDY, max_tokens=counts[i])
        engine.core.add(request(f"r{i}", prompt, params=params, adapter=ref_of(folder) if folder else None))
        for _ in range(i % 3):
            engine.step()
        if i == 20:
            engine.core.abort("r14")
    engine.run()
    assert not engine.errors
    for i, prompt in enumerate(tiny_prompts):
        if i != 14:
            expected = plain_generate(tiny_base, prompt, counts[i], folders[i % 5])
            assert engine.tokens(f"r{i}") == expected, f"request {i}"
            assert engine.reason(f"r{i}") == "length"
    assert engine.core.adapters.counters.slot_evictions > 0
    stats = engine.core.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
    assert all(state.in_use == 0 for state in engine.core.adapters.states())


def test_adapters_change_the_answer(open_core: OpenCore, tiny_adapters: list[Path], tiny_prompts: list[list[int]]):
    engine = open_core()
    for i, folder in enumerate([None, *tiny_adapters]):
        engine.core.add(request(f"r{i}", tiny_prompts[5], adapter=ref_of(folder) if folder else None))
    engine.run()
    assert len({tuple(engine.tokens(f"r{i}")) for i in range(5)}) == 5


def test_generation_stops_at_a_stop_id_and_reports_it(open_core: OpenCore, tiny_prompts: list[list[int]]):
    engine = open_core()
    engine.core.add(request("free", tiny_prompts[0]))
    engine.run()
    free = engine.tokens("free")
    stop = free[3]
    engine.core.add(request("stopped", tiny_prompts[0], stop_ids=frozenset({stop})))
    engine.run()
    assert engine.tokens("stopped") == free[: free.index(stop) + 1]
    assert engine.reason("stopped") == "stop"


def test_an_answer_ends_where_the_context_ends(open_core: OpenCore, tiny_prompts: list[list[int]]):
    engine = open_core(max_length=32)
    prompt = tiny_prompts[7][:28]
    engine.core.add(request("r", prompt, params=replace(GREEDY, max_tokens=None)))
    engine.run()
    assert len(engine.tokens("r")) == 32 - len(prompt)
    assert engine.reason("r") == "length"


def test_requests_that_can_never_run_are_refused_with_the_reason(open_core: OpenCore, tiny_adapters: list[Path]):
    core: EngineCore = open_core(max_length=32, max_rank=8).core
    with pytest.raises(InvalidRequest, match="empty"):
        core.check(request("r", []))
    with pytest.raises(ContextLengthExceeded, match="up to 32"):
        core.check(request("r", [5] * 32))
    with pytest.raises(InvalidRequest, match="outside"):
        core.check(request("r", [512]))
    with pytest.raises(InvalidRequest, match="logit_bias"):
        core.check(request("r", [5], params=replace(GREEDY, logit_bias={9999: 1.0})))
    with pytest.raises(AdapterRejected, match="Rank 16"):
        core.check(request("r", [5], adapter=ref_of(tiny_adapters[3])))


def test_a_sequence_past_its_deadline_ends_and_frees_its_place(open_core: OpenCore, tiny_prompts: list[list[int]]):
    clock = Clock()
    engine = open_core(clock=clock)
    engine.core.add(request("slow", tiny_prompts[1], deadline_s=5, params=replace(GREEDY, max_tokens=100)))
    engine.step()
    clock.now += 6
    engine.step()
    assert isinstance(engine.errors["slow"], Overloaded)
    assert "limit of 5 s" in engine.errors["slow"].message
    assert not engine.core.has_sequences


def test_scores_that_are_no_numbers_end_only_their_own_sequence(
    open_core: OpenCore, tiny_base: Path, tiny_adapters: list[Path], tiny_prompts, plain_generate, tmp_path: Path
):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((tiny_adapters[0] / "adapter_config.json").read_bytes())
    tensors = load_file(tiny_adapters[0] / "adapter_model.safetensors")
    save_file({k: torch.full_like(t, float("nan")) for k, t in tensors.items()}, broken / "adapter_model.safetensors")

    engine = open_core(max_sequences=3)
    engine.core.add(request("good", tiny_prompts[3]))
    engine.core.add(request("bad", tiny_prompts[4], adapter=ref_of(broken)))
    engine.run()
    assert "finite" in engine.errors["bad"].message
    assert engine.tokens("good") == plain_generate(tiny_base, tiny_prompts[3], 8)
    # Who gets the cache slot next must not see what the broken sequence left in it.
    for i in range(3):
        engine.core.add(request(f"next{i}", tiny_prompts[6 + i][:5]))
    engine.run()
    for i in range(3):
        assert engine.tokens(f"next{i}") == plain_generate(tiny_base, tiny_prompts[6 + i][:5], 8)


def test_a_failing_step_ends_its_sequences_and_the_engine_goes_on(
    open_core: OpenCore, tiny_base: Path, tiny_prompts, plain_generate, monkeypatch: pytest.MonkeyPatch
):
    engine = open_core()
    forward = engine.core._runner.forward

    def fail(work):
        forward(work)
        raise RuntimeError("out of memory")

    engine.core.add(request("hit", tiny_prompts[2]))
    monkeypatch.setattr(engine.core._runner, "forward", fail)
    engine.step()
    monkeypatch.undo()
    assert "failed" in engine.errors["hit"].message
    engine.core.add(request("after", tiny_prompts[2]))
    engine.run()
    assert engine.tokens("after") == plain_generate(tiny_base, tiny_prompts[2], 8)


def test_a_cache_so_small_that_sequences_are_preempted_changes_no_answer(
    open_core: OpenCore, tiny_base: Path, tiny_adapters: list[Path], tiny_prompts: list[list[int]], plain_generate
):
    engine = open_core(max_sequences=6, max_step_tokens=32, adapter_slots=2, kv_cache_tokens=144, prefix_cache_bytes=0)
    folders = [None, *tiny_adapters]
    for i in range(18):
        folder = folders[i % 5]
        params = replace(GREEDY, max_tokens=20 + i)
        adapter = ref_of(folder) if folder else None
        engine.core.add(request(f"r{i}", tiny_prompts[i], params=params, adapter=adapter, owner="abc"[i % 3]))
    engine.run()
    assert not engine.errors
    stats = engine.core.stats()
    assert stats.preemptions > 0
    for i in range(18):
        assert engine.tokens(f"r{i}") == plain_generate(tiny_base, tiny_prompts[i], 20 + i, folders[i % 5]), i
    assert (stats.running, stats.waiting, stats.waiting_tokens, stats.kv_tokens_used) == (0, 0, 0, 0)
    assert all(state.in_use == 0 for state in engine.core.adapters.states())


def test_a_preempted_sequence_goes_on_with_its_own_random_numbers(open_core: OpenCore, tiny_prompts: list[list[int]]):
    # No top_p: a token computed anew differs in its last digits, and may so fall on the other side of a cut.
    params = SamplingParams(max_tokens=40, temperature=1.2, frequency_penalty=0.4)
    found = []
    for tokens in (None, 128):
        engine = open_core(max_sequences=4, kv_cache_tokens=tokens)
        for i in range(4):
            engine.core.add(request(f"r{i}", tiny_prompts[i], params=replace(params, seed=i)))
        engine.run()
        found.append([engine.tokens(f"r{i}") for i in range(4)])
        assert bool(engine.core.stats().preemptions) == (tokens is not None)
    assert found[0] == found[1]


def test_a_prompt_that_the_whole_cache_cannot_hold_is_refused(open_core: OpenCore):
    engine = open_core(kv_cache_tokens=64)
    with pytest.raises(ContextLengthExceeded, match="up to 64"):
        engine.core.check(request("r", [5] * 64))


def test_a_request_that_waits_past_its_deadline_is_told_to_come_again(open_core: OpenCore, tiny_prompts):
    clock = Clock()
    engine = open_core(clock=clock, max_sequences=1)
    engine.core.add(request("runs", tiny_prompts[1], params=replace(GREEDY, max_tokens=50)))
    engine.core.add(request("waits", tiny_prompts[2], deadline_s=5))
    for _ in range(3):
        clock.now += 2
        engine.step()
    error = engine.errors["waits"]
    assert isinstance(error, Overloaded) and "not begun" in error.message and error.retry_after_s
    engine.run()
    assert len(engine.tokens("runs")) == 50


def test_the_numbers_of_an_engine_tell_what_waits_and_what_a_step_does(open_core: OpenCore, tiny_prompts):
    engine = open_core(max_sequences=2)
    for i in range(4):
        engine.core.add(request(f"r{i}", tiny_prompts[i]))
    stats = engine.core.stats()
    assert (stats.waiting, stats.waiting_tokens) == (4, sum(len(prompt) for prompt in tiny_prompts[:4]))
    engine.step()
    stats = engine.core.stats()
    assert (stats.running, stats.waiting) == (2, 2)
    assert stats.step_tokens > 0 and stats.step_ms > 0 and stats.tokens_per_s > 0 and stats.kv_tokens_used > 0


def test_an_adapter_that_loads_slowly_holds_up_nobody_else(
    open_core: OpenCore, tiny_adapters: list[Path], tiny_prompts: list[list[int]]
):
    import threading

    gate = threading.Event()

    def fetch(ref):
        assert gate.wait(10)
        return Path(ref.uri)

    engine = open_core(fetch=fetch)
    engine.core.add(request("waits", tiny_prompts[1], adapter=ref_of(tiny_adapters[0])))
    engine.core.add(request("passes", tiny_prompts[2]))
    for _ in range(20):
        engine.step()
    assert engine.reason("passes") == "length" and not engine.tokens("waits")
    gate.set()
    engine.run()
    assert engine.reason("waits") == "length"


def test_a_request_gives_up_on_an_adapter_that_does_not_load_in_time(
    open_core: OpenCore, tiny_adapters: list[Path], tiny_prompts: list[list[int]]
):
    import threading

    clock, gate = Clock(), threading.Event()

    def fetch(ref):
        gate.wait(10)
        return Path(ref.uri)

    engine = open_core(fetch=fetch, clock=clock, adapter_timeout_s=3.0)
    engine.core.add(request("r", tiny_prompts[1], adapter=ref_of(tiny_adapters[0])))
    engine.step()
    clock.now += 4
    engine.step()
    gate.set()
    assert isinstance(engine.errors["r"], Overloaded) and engine.errors["r"].retry_after_s


def test_a_broken_adapter_fails_its_own_request_only(
    open_core: OpenCore, tiny_adapters: list[Path], tiny_prompts: list[list[int]], tmp_path: Path
):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    engine = open_core()
    engine.core.add(request("bad", tiny_prompts[1], adapter=ref_of(tmp_path)))
    engine.core.add(request("good", tiny_prompts[1], adapter=ref_of(tiny_adapters[0])))
    engine.run()
    assert isinstance(engine.errors["bad"], AdapterRejected) and "use_dora" in engine.errors["bad"].message
    assert engine.reason("good") == "length"


def test_a_request_that_finds_no_adapter_slot_is_not_starved_by_those_behind_it(
    open_core: OpenCore, tiny_adapters: list[Path], tiny_prompts: list[list[int]]
):
    clock = Clock()
    engine = open_core(clock=clock, adapter_slots=1, max_sequences=4)
    busy, other = ref_of(tiny_adapters[0]), ref_of(tiny_adapters[1])
    engine.core.add(request("busy0", tiny_prompts[1], adapter=busy))
    _step_until(engine, lambda: engine.tokens("busy0"))
    engine.core.add(request("starved", tiny_prompts[1], adapter=other))
    for i in range(1, 60):
        clock.now += 0.5
        engine.core.add(request(f"busy{i}", tiny_prompts[1], adapter=busy))
        engine.step()
        time.sleep(0.001)
        if engine.tokens("starved"):
            break
    assert engine.tokens("starved")
    engine.run()


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(
    open_core: OpenCore, tiny_adapters: list[Path], tiny_prompts: list[list[int]]
):
    params = SamplingParams(max_tokens=12, temperature=1.3, top_p=0.95, seed=7)
    alone = open_core()
    alone.core.add(request("r", tiny_prompts[9], params=params))
    alone.run()
    together = open_core(max_step_tokens=16)
    for i in range(6):
        noise = SamplingParams(max_tokens=5 + i, temperature=0.7 * i)
        together.core.add(request(f"n{i}", tiny_prompts[i], params=noise, adapter=ref_of(tiny_adapters[i % 4])))
    together.core.add(request("r", tiny_prompts[9], params=params))
    together.core.add(request("other", tiny_prompts[9], params=replace(params, seed=8)))
    together.run()
    assert together.tokens("r") == alone.tokens("r")
    assert together.tokens("other") != alone.tokens("r")


def test_logprobs_are_those_of_the_raw_logits(open_core: OpenCore, tiny_base: Path, tiny_prompts: list[list[int]]):
    from transformers import AutoModelForCausalLM

    params = SamplingParams(max_tokens=5, temperature=0.8, seed=1, logprobs=3, logit_bias={9: 2.0})
    engine = open_core()
    engine.core.add(request("r", tiny_prompts[4], params=params))
    engine.run()
    tokens = [token for output in engine.outputs["r"] for token in output.tokens]
    ids = tiny_prompts[4] + [token.token_id for token in tokens]
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for at, token in enumerate(tokens, start=len(tiny_prompts[4]) - 1):
        assert token.logprob == pytest.approx(expected[at, token.token_id].item(), abs=1e-3)
        best = expected[at].topk(3)
        assert [id for id, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_a_long_mix_of_requests_and_aborts_leaves_nothing_behind(
    open_core: OpenCore, tiny_adapters: list[Path], tiny_prompts: list[list[int]]
):
    import random

    chance = random.Random(5)
    engine = open_core(max_sequences=5, max_step_tokens=32, adapter_slots=2, host_cache_bytes=120_000)
    ids = [f"r{i}" for i in range(150)]
    for id in ids:
        folder = chance.choice([None, *tiny_adapters])
        params = SamplingParams(max_tokens=chance.randint(1, 9), temperature=chance.choice([0, 0.9]), top_p=0.9)
        adapter = ref_of(folder) if folder else None
        engine.core.add(request(id, chance.choice(tiny_prompts), params=params, adapter=adapter))
        for _ in range(chance.randint(0, 2)):
            engine.step()
        if chance.random() < 0.3:
            engine.core.abort(chance.choice(ids))
    engine.run()
    assert not engine.errors
    assert engine.core._cache.num_free == 5
    assert not engine.core._sequences
    entries = engine.core.adapters._entries.values()
    assert all(entry.num_waiting == entry.num_running == 0 for entry in entries)
    assert engine.core.adapters.host_bytes_used() <= 120_000


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _step_until(engine, is_done, max_steps: int = 500) -> None:
    for _ in range(max_steps):
        if is_done():
            return
        engine.step()
        time.sleep(0.002)
    raise AssertionError("it did not happen")
