import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import make_adapter, make_base
from tuneloom.bases import Base, add_folder
from tuneloom.engine.base import SequenceRequest
from tuneloom.engine.engine import LocalEngine
from tuneloom.engine.options import EngineConfig
from tuneloom.errors import InvalidRequest, TuneloomError
from tuneloom.generation import SamplingParams
from tuneloom.train.merge import TOLERANCE, Dtype, memory_needed, merge

IDS = torch.tensor([[5, 300, 17, 42, 99, 7, 260, 31], [1, 2, 3, 4, 400, 401, 402, 403]])


@pytest.fixture
def base(tmp_path: Path, tiny_base: Path) -> Base:
    return add_folder(tmp_path / "bases", tiny_base, "tiny/llama")


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "alpha": 3.0},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"q_proj": 1}},
        {"targets": ("q_proj", "v_proj")},
    ],
    ids=["plain", "rslora", "patterns", "two layers"],
)
def test_a_merge_in_fp32_is_base_and_adapter_to_rounding(base: Base, tmp_path: Path, config: dict[str, Any]):
    adapter = make_adapter(tmp_path / "adapter", base.path, **config)
    folder = tmp_path / "merged"

    made = merge(base, adapter, folder)

    assert made.dtype == "fp32" and made.difference <= made.tolerance < 0.01 < made.effect
    wanted = logits(base.path, adapter)
    torch.testing.assert_close(logits(folder), wanted, atol=1e-5 * wanted.abs().max().item(), rtol=0)
    assert (wanted - logits(base.path)).abs().max() > 0.1
    assert not list(folder.glob("adapter_*"))


def test_a_base_with_a_head_of_its_own_is_merged_too(tmp_path: Path, tiny_base: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    for path in tiny_base.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / "source").mkdir(exist_ok=True)
            (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(tmp_path / "source")
    base = add_folder(tmp_path / "bases", tmp_path / "source", "tiny/untied")
    adapter = make_adapter(tmp_path / "adapter", base.path)

    merge(base, adapter, tmp_path / "merged")

    wanted = logits(base.path, adapter)
    torch.testing.assert_close(logits(tmp_path / "merged"), wanted, atol=1e-5 * wanted.abs().max().item(), rtol=0)


def test_the_dtype_is_the_bases_unless_another_is_asked(tmp_path: Path, tiny_base: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    source = make_base(tmp_path / "source")
    model.save_pretrained(source)
    base = add_folder(tmp_path / "bases", source, "tiny/bf16")
    adapter = make_adapter(tmp_path / "adapter", base.path)

    half = merge(base, adapter, tmp_path / "half")
    full = merge(base, adapter, tmp_path / "full", dtype="fp32")

    assert (half.dtype, full.dtype) == ("bf16", "fp32")
    assert full.difference < TOLERANCE[torch.float32] < half.difference <= TOLERANCE[torch.bfloat16]
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert full.size_bytes > 1.9 * half.size_bytes


def test_tokenizer_template_and_generation_settings_come_with_the_weights(base: Base, tmp_path: Path):
    folder = tmp_path / "merged"
    merge(base, make_adapter(tmp_path / "adapter", base.path), folder)

    messages = [{"role": "user", "content": "left or right?"}]
    texts = [
        AutoTokenizer.from_pretrained(path).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for path in (folder, base.path)
    ]
    assert texts[0] == texts[1]
    assert (folder / "generation_config.json").read_bytes() == (base.path / "generation_config.json").read_bytes()
    assert all(path.stat().st_mode & 0o044 for path in folder.iterdir())


@pytest.mark.anyio
async def test_the_engine_serves_a_merge_with_the_answer_of_base_and_adapter(base: Base, tmp_path: Path):
    adapter = make_adapter(tmp_path / "adapter", base.path)
    merge(base, adapter, tmp_path / "merged")
    added = add_folder(tmp_path / "bases", tmp_path / "merged", "tiny/merged")
    prompt = [1, 300, 17, 42, 99, 7]

    async def no_adapter(*_: object) -> Path:
        raise AssertionError("a merged model needs none")

    engine = LocalEngine(added.path, EngineConfig(dtype="fp32", threads=1, max_sequences=2), no_adapter)
    await engine.start()
    try:
        asked = SequenceRequest("r", tuple(prompt), SamplingParams(temperature=0, max_tokens=16), frozenset(), "ada")
        found = [token.token_id async for output in engine.generate(asked) for token in output.tokens]
    finally:
        await engine.close()

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), adapter).eval()
    model.generation_config.eos_token_id = None
    plain = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert found == plain.tolist() and len(found) == 16


def test_a_merge_that_computes_something_else_is_refused(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = make_adapter(tmp_path / "adapter", base.path)
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(TuneloomError, match="is not what base and adapter are"):
        merge(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_that_change_on_their_way_to_disk_are_noticed(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Dtype
):
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def spoil(self: PreTrainedModel, *arguments: Any, **options: Any) -> None:
        weight = self.model.layers[1].mlp.down_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[0, 0] += 0.1
            save(self, *arguments, **options)
            weight.copy_(kept)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoil)
    with pytest.raises(TuneloomError, match="is not what base and adapter are"):
        merge(base, make_adapter(tmp_path / "adapter", base.path), tmp_path / "merged", dtype=dtype)


def test_a_base_that_is_stored_quantised_is_refused(base: Base, tmp_path: Path):
    adapter = make_adapter(tmp_path / "adapter", base.path)
    path = base.path / "config.json"
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": stored}))
    with pytest.raises(InvalidRequest, match="is stored quantised"):
        merge(base, adapter, tmp_path / "merged")


def test_the_memory_of_a_merge_counts_all_weights_in_fp32_and_the_logits_that_are_compared(base: Base):
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base.path).parameters())
    assert memory_needed(base) > 4 * weights
    wide = replace(base, vocab_size=262_144)
    assert memory_needed(wide) - memory_needed(base) > 4 * (4 * 4 * 48 * 262_000)
