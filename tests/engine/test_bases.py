"""Architectures: each as a tiny random model, equal to transformers' own generate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import GREEDY, OpenCore, ref_of, request
from tests.engine.models import COMMON, make_model, plain_logprobs
from tests.tiny import make_adapter
from tuneloom.engine.loader import pick_dtype

WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma3_text": {**COMMON, **WINDOW, "head_dim": 24, "query_pre_attn_scalar": 24},
    "qwen2": {**COMMON, **WINDOW, "use_sliding_window": True},
    "qwen3": {**COMMON, "head_dim": 24},
    "mistral": {**COMMON, "sliding_window": 16, "head_dim": 16},
    "granite": {**COMMON, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "phi": {**COMMON, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": COMMON,
    "llama": {**COMMON, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "llama, long rope": {
        **COMMON,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "phi3, window": {**COMMON, "sliding_window": 16, "partial_rotary_factor": 0.75},
    "phi, norms": {**COMMON, "partial_rotary_factor": 0.5, "qk_layernorm": True},
    "gemma2": {**COMMON, **WINDOW, "head_dim": 24, "attn_logit_softcapping": None, "final_logit_softcapping": 5.0},
    "qwen2, no window": {**COMMON, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_base_of_each_architecture_equals_generate(
    open_core: OpenCore, plain_generate, tiny_prompts, tmp_path: Path, kind: str
):
    """Longer prompts cross the sliding window, in chunks that start inside and outside of it."""
    base = make_model(tmp_path / "base", kind, ARCHITECTURES[kind])
    adapter = make_adapter(tmp_path / "adapter", base, seed=5, targets=targets_of(kind))
    engine = open_core(base, max_step_tokens=24, max_sequences=4)
    assert engine.core.stats().extra["mode"] == "batched"
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


LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def targets_of(kind: str) -> tuple[str, ...]:
    fused = {
        "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        "phi": ("q_proj", "v_proj", "dense", "fc1", "fc2"),
    }
    return fused.get(kind.split(",")[0], LLAMA_LIKE)


WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32}
# The widest difference of a log-probability: bf16 rounds the steps of a layer in another order here.
BF16_TOLERANCE = 0.25


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if "," not in kind])
def test_a_base_of_each_architecture_agrees_with_transformers_in_bf16(
    open_core: OpenCore, tiny_prompts, tmp_path: Path, kind: str
):
    """With the CPU's kernels where it has them; heads are as wide as those need."""
    settings = {**ARCHITECTURES[kind], **WIDE, "initializer_range": 0.1}
    base = make_model(tmp_path / "base", kind, settings)
    adapter = make_adapter(tmp_path / "adapter", base, seed=5, targets=targets_of(kind))
    engine = open_core(base, dtype="bf16", max_step_tokens=24, max_sequences=4)
    assert engine.core.stats().extra["mode"] == "batched"
    for i in (1, 4, 7):
        params = replace(GREEDY, logprobs=0)
        engine.core.add(request(f"r{i}", tiny_prompts[i], params=params, adapter=ref_of(adapter) if i % 2 else None))
    engine.run()
    for i in (1, 4, 7):
        found = [token.logprob for output in engine.outputs[f"r{i}"] for token in output.tokens]
        expected = plain_logprobs(base, tiny_prompts[i], engine.tokens(f"r{i}"), adapter if i % 2 else None)
        assert found == pytest.approx(expected, abs=BF16_TOLERANCE)


def test_the_number_format_follows_the_setting_and_else_the_machine():
    cpu = torch.device("cpu")
    assert pick_dtype("fp32", cpu) == torch.float32
    assert pick_dtype("bf16", cpu) == torch.bfloat16
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert pick_dtype("auto", cpu) == (torch.bfloat16 if has_bf16 else torch.float32)
