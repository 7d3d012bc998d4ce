"""Architectures: each as a tiny random model, equal to transformers' own generate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tests.engine.conftest import GREEDY, OpenCore, ref_of, request
from tests.tiny import make_adapter
from tuneloom.engine.loader import pick_dtype
from tuneloom.errors import InvalidRequest

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma3_text": {**COMMON, **WINDOW, "head_dim": 24, "query_pre_attn_scalar": 24},
    "qwen2": {**COMMON, **WINDOW, "use_sliding_window": True},
    "qwen3": {**COMMON, "head_dim": 24},
    "mistral": {**COMMON, "sliding_window": 16, "head_dim": 16},
    "granite": {**COMMON, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "phi": {**COMMON, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": COMMON,
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_base_of_each_architecture_equals_generate(
    open_core: OpenCore, plain_generate, tiny_prompts, tmp_path: Path, kind: str
):
    """Longer prompts cross the sliding window, in chunks that start inside and outside of it."""
    base = make_model(tmp_path / kind, kind, ARCHITECTURES[kind])
    adapter = make_adapter(tmp_path / "adapter", base, seed=5, targets=TARGETS[kind])
    engine = open_core(base, max_step_tokens=24, max_sequences=4)
    chosen = [1, 4, 7, 11, 16]
    params = replace(GREEDY, max_tokens=12, logprobs=0)
    for i in chosen:
        engine.core.add(request(f"r{i}", tiny_prompts[i], params=params, adapter=ref_of(adapter) if i % 2 else None))
    engine.run()
    assert not engine.errors
    for i in chosen:
        tokens = engine.tokens(f"r{i}")
        assert tokens == plain_generate(base, tiny_prompts[i], 12, adapter if i % 2 else None)
        # A random model may repeat a token whatever it attends to; its probability tells.
        found = [token.logprob for output in engine.outputs[f"r{i}"] for token in output.tokens]
        expected = plain_logprobs(base, tiny_prompts[i], tokens, adapter if i % 2 else None)
        assert found == pytest.approx(expected, abs=2e-4)


def plain_logprobs(base: Path, prompt: list[int], tokens: list[int], adapter: Path | None) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def make_model(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {kind: LLAMA_LIKE for kind in ARCHITECTURES} | {"phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
TARGETS["phi"] = ("q_proj", "v_proj", "dense", "fc1", "fc2")


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
    base = make_model(tmp_path / kind, kind, settings)
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


def test_code_of_a_base_is_never_run(open_core: OpenCore, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Model"}}')
    with pytest.raises(InvalidRequest, match="code of its own"):
        open_core(tmp_path)


def test_the_number_format_follows_the_setting_and_else_the_machine():
    cpu = torch.device("cpu")
    assert pick_dtype("fp32", cpu) == torch.float32
    assert pick_dtype("bf16", cpu) == torch.bfloat16
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert pick_dtype("auto", cpu) == (torch.bfloat16 if has_bf16 else torch.float32)
