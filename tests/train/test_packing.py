import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tuneloom.train.packing import ATTENTION, IGNORED, pack, pad, try_packing

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def model_of(kind: str, tiny_base: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "llama":
        return AutoModelForCausalLM.from_pretrained(tiny_base)
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES))
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES))
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2))
    # Two kinds of layers, one of which sees four tokens.
    types = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=types))


def rows_of(*lengths: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids = rng.integers(3, 120, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 2, IGNORED, ids)
        rows.append((ids, labels))
    return rows


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3 with windows"])
@pytest.mark.parametrize("lengths", [(11, 11, 7, 3, 2), (9,), (3, 2)])
def test_packed_rows_have_the_states_and_gradients_of_padded_ones(
    kind: str, lengths: tuple[int, ...], tiny_base: Path
) -> None:
    plain = model_of(kind, tiny_base)
    ours = copy.deepcopy(plain)
    assert try_packing(ours) is None
    rows = rows_of(*lengths)
    padded = pad(rows, 0)
    mask = padded["attention_mask"].bool()
    states = []
    for model, inputs in ((plain, padded), (ours, pack(rows))):
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        states.append((logits[mask] if model is plain else logits[0], loss))
    torch.testing.assert_close(states[1], states[0], atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "mamba"])
def test_a_base_that_mixes_rows_or_needs_another_attention_says_so_and_stays_as_it_is(
    kind: str, tiny_base: Path
) -> None:
    model = model_of(kind, tiny_base)
    before, inputs = model.config._attn_implementation, pad(rows_of(6, 4), 0)
    del inputs["labels"]
    expected = model(**inputs).logits
    assert "base" in (try_packing(model) or "")
    assert model.config._attn_implementation == before
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "gemma3 with windows"])
def test_a_packing_model_still_answers_padded_batches_and_generates(kind: str, tiny_base: Path) -> None:
    plain = model_of(kind, tiny_base)
    ours = copy.deepcopy(plain)
    assert try_packing(ours) is None
    assert ours.config._attn_implementation == ATTENTION
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        torch.testing.assert_close(ours(**inputs).logits, plain(**inputs).logits, atol=1e-5, rtol=1e-5)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(ours.generate(**inputs, **options), plain.generate(**inputs, **options))


def test_no_row_is_asked_to_predict_the_next_row() -> None:
    (a, _), (b, _) = rows_of(4, 3)
    inputs = pack([(a, a), (b, b)])
    assert inputs["input_ids"].tolist() == [[*a, *b]]
    assert inputs["labels"].tolist() == [[IGNORED, *a[1:], IGNORED, *b[1:]]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
