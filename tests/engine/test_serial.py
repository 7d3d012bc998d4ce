"""Bases whose sequences cannot share steps: each as a tiny random model, equal to transformers' own generate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import GREEDY, OpenCore, ref_of, request
from tests.engine.models import COMMON, make_model, plain_logprobs
from tests.tiny import make_adapter
from tuneloom.errors import AdapterRejected
from tuneloom.generation import SamplingParams

RECURRENT: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
ONE_AT_A_TIME: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": (
        {**COMMON, "sliding_window": 16, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
        "attn_logit_softcapping",
    ),
    "gpt_oss": ({**COMMON, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux"),
    "deepseek_v3": (
        {
            **COMMON,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
        },
        "kv_lora_rank",
    ),
    "gemma4_text": (
        {
            **COMMON,
            **{"head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "hidden_size_per_layer_input": 16},
            **{"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 512},
        },
        "differ in head_dim",
    ),
    "falcon": ({**COMMON, "alibi": True}, "does not let its attention be replaced"),
    "mamba2": (
        {**RECURRENT, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16, "initializer_range": 0.2},
        "recurrent state",
    ),
    "jamba": (
        {**COMMON, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8},
        "recurrent state",
    ),
    "bamba": (
        {
            **COMMON,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        "recurrent state",
    ),
}
SERIAL_TARGETS = {kind: ("q_proj", "v_proj", "o_proj") for kind in ONE_AT_A_TIME}
SERIAL_TARGETS |= {
    "deepseek_v3": ("q_a_proj", "kv_b_proj", "o_proj"),
    "falcon": ("query_key_value", "dense_4h_to_h"),
    "mamba2": ("in_proj",),
    "jamba": ("in_proj", "x_proj", "q_proj", "down_proj"),
    "bamba": ("in_proj", "q_proj", "down_proj"),
}


@pytest.mark.parametrize("kind", ONE_AT_A_TIME)
def test_a_base_that_cannot_share_steps_is_served_one_at_a_time(
    open_core: OpenCore, plain_generate, tiny_prompts, tmp_path: Path, kind: str
):
    settings, reason = ONE_AT_A_TIME[kind]
    base = make_model(tmp_path / "base", kind, settings)
    adapter = make_adapter(tmp_path / "adapter", base, seed=5, targets=SERIAL_TARGETS[kind])
    engine = open_core(base, max_step_tokens=24)
    extra = engine.core.stats().extra
    assert extra["mode"] == "one at a time" and reason in extra["reason"]
    chosen = [1, 4, 7, 10]
    for i in chosen:
        params = replace(GREEDY, max_tokens=10, logprobs=0)
        engine.core.add(request(f"r{i}", tiny_prompts[i], params=params, adapter=ref_of(adapter) if i % 2 else None))
    engine.run()
    assert not engine.errors
    for i in chosen:
        tokens = engine.tokens(f"r{i}")
        assert tokens == plain_generate(base, tiny_prompts[i], 10, adapter if i % 2 else None)
        found = [token.logprob for output in engine.outputs[f"r{i}"] for token in output.tokens]
        expected = plain_logprobs(base, tiny_prompts[i], tokens, adapter if i % 2 else None)
        assert found == pytest.approx(expected, abs=2e-4)


@pytest.fixture(scope="module")
def softcap_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("softcap") / "base", "gemma2", ONE_AT_A_TIME["gemma2"][0])


def test_a_prompt_longer_than_a_step_goes_in_chunks_where_the_base_can_and_whole_where_not(
    open_core: OpenCore, softcap_base: Path, plain_generate, tiny_prompts, tmp_path: Path
):
    jamba = make_model(tmp_path / "base", "jamba", ONE_AT_A_TIME["jamba"][0])
    for base, feeding, steps in ((softcap_base, "in chunks", 4), (jamba, "whole", 1)):
        engine = open_core(base, max_step_tokens=24)
        assert engine.core._runner.feeding == feeding
        engine.core.add(request("r", tiny_prompts[7], params=replace(GREEDY, max_tokens=1)))
        engine.run()
        assert len(tiny_prompts[7]) == 80 and engine.core.stats().steps == steps
        assert engine.tokens("r") == plain_generate(base, tiny_prompts[7], 1)


def test_one_runs_and_the_others_wait_their_turn(open_core: OpenCore, softcap_base: Path, tiny_prompts):
    engine = open_core(softcap_base)
    for i in range(3):
        engine.core.add(request(f"r{i}", tiny_prompts[i]))
    for _ in range(4):
        engine.step()
        stats = engine.core.stats()
        assert (stats.running, stats.waiting) == (1, 2)
    engine.core.abort("r0")
    engine.run()
    alone = open_core(softcap_base)
    alone.core.add(request("r2", tiny_prompts[2]))
    alone.run()
    assert engine.tokens("r2") == alone.tokens("r2") and len(engine.tokens("r1")) == 8


def test_sampling_is_that_of_every_base(open_core: OpenCore, softcap_base: Path, tiny_prompts):
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=7, logprobs=2, logit_bias={9: -100.0})
    engine = open_core(softcap_base)
    for id in ("first", "again"):
        engine.core.add(request(id, tiny_prompts[4], params=params))
        engine.core.add(request(f"{id}-other", tiny_prompts[5]))
    engine.run()
    assert engine.tokens("first") == engine.tokens("again") != engine.tokens("first-other")
    assert all(len(token.top) == 2 for output in engine.outputs["first"] for token in output.tokens)
    stop = engine.tokens("first")[3]
    engine.core.add(request("stopped", tiny_prompts[4], params=params, stop_ids=frozenset({stop})))
    engine.run()
    assert engine.reason("stopped") == "stop" and engine.tokens("stopped")[-1] == stop


def test_more_adapters_than_slots_take_turns(
    open_core: OpenCore, softcap_base: Path, plain_generate, tiny_prompts, tmp_path: Path
):
    adapters = [make_adapter(tmp_path / f"a{i}", softcap_base, seed=i, rank=2 + i) for i in range(4)]
    engine = open_core(softcap_base, adapter_slots=2)
    for i in range(8):
        engine.core.add(request(f"r{i}", tiny_prompts[3], adapter=ref_of(adapters[i % 4])))
    engine.run()
    for i in range(8):
        assert engine.tokens(f"r{i}") == plain_generate(softcap_base, tiny_prompts[3], 8, adapters[i % 4])
    assert engine.core.stats().adapter_evictions > 0


def test_a_layer_that_the_base_reads_past_cannot_be_adapted(open_core: OpenCore, tiny_prompts, tmp_path: Path):
    """Mamba's own step multiplies by the weight of `dt_proj`; an adapter there would do nothing."""
    base = make_model(tmp_path / "base", "mamba", RECURRENT)
    adapter = make_adapter(tmp_path / "adapter", base, targets=("dt_proj",))
    engine = open_core(base)
    engine.core.add(request("r", tiny_prompts[1], adapter=ref_of(adapter)))
    engine.run()
    assert isinstance(engine.errors["r"], AdapterRejected) and "dt_proj" in engine.errors["r"].message


def test_a_base_that_fails_in_a_shared_step_is_served_as_it_is(
    open_core: OpenCore, tiny_base: Path, plain_generate, tiny_prompts, monkeypatch: pytest.MonkeyPatch
):
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        if type(self.up_proj) is not torch.nn.Linear:
            raise RuntimeError("these layers are not mine")
        return plain(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    engine = open_core()
    assert "RuntimeError" in engine.core.stats().extra["reason"]
    engine.core.add(request("r", tiny_prompts[6]))
    engine.run()
    assert engine.tokens("r") == plain_generate(tiny_base, tiny_prompts[6], 8)
