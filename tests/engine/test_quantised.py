"""Bases of 4 and 8 bits, held against transformers and PEFT on the same quantised weights."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.engine.conftest import GREEDY, Harness, OpenCore, ref_of, request
from tuneloom.engine.quantised import QuantisedProduct, is_quantised, quantization_config
from tuneloom.errors import InvalidRequest

# Of log-probabilities. LLM.int8 takes columns with outliers out of the product for all tokens of a call, the engine
# only for those that have them.
TOLERANCE = {"nf4": 5e-4, "int8": 5e-2}
KINDS = tuple(TOLERANCE)
CHOSEN = (1, 4, 7, 11)


def load_plainly(base: Path, kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = quantization_config(kind, dtype)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config, device_map="cpu")
    for module in model.modules():
        if is_quantised(module):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def run(engine: Harness, adapters: list[Path], prompts: list[list[int]]) -> None:
    params = replace(GREEDY, max_tokens=8, logprobs=0)
    for i in CHOSEN:
        engine.core.add(request(f"r{i}", prompts[i], params=params, adapter=ref_of(adapters[i % 4]) if i % 2 else None))
    engine.run()
    assert not engine.errors


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_with_adapters_equals_peft_on_the_same_weights(
    open_core: OpenCore, tiny_base: Path, tiny_adapters: list[Path], tiny_prompts, kind: str
):
    engine = open_core(quantization=kind, max_step_tokens=24)
    assert engine.core.stats().extra["quantised_linears"] == 14
    run(engine, tiny_adapters, tiny_prompts)
    assert engine.core.stats().extra["mode"] == "batched"
    for i in CHOSEN:
        model = load_plainly(tiny_base, kind)
        if i % 2:
            model = PeftModel.from_pretrained(model, tiny_adapters[i % 4]).eval()
        tokens = engine.tokens(f"r{i}")
        with torch.no_grad():
            logits = model(torch.tensor([tiny_prompts[i] + tokens])).logits[0, len(tiny_prompts[i]) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        found = [token.logprob for output in engine.outputs[f"r{i}"] for token in output.tokens]
        assert found == pytest.approx(expected, abs=TOLERANCE[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_stored_quantised_equals_one_quantised_at_load(
    open_core: OpenCore, tiny_base: Path, tiny_adapters: list[Path], tiny_prompts, tmp_path: Path, kind: str
):
    load_plainly(tiny_base, kind).save_pretrained(tmp_path / "stored")
    stored, at_load = open_core(tmp_path / "stored"), open_core(quantization=kind)
    for engine in (stored, at_load):
        run(engine, tiny_adapters, tiny_prompts)
    assert [stored.tokens(f"r{i}") for i in CHOSEN] == [at_load.tokens(f"r{i}") for i in CHOSEN]
    weights = [e.core.stats().extra["memory"]["items"]["weights"] for e in (stored, at_load, open_core())]
    assert weights[0] == pytest.approx(weights[1], rel=0.15) and weights[1] < 0.8 * weights[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_served_in_bf16_without_a_word_for_each_product(
    open_core: OpenCore,
    tiny_adapters: list[Path],
    tiny_prompts,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    kind: str,
):
    engine = open_core(quantization=kind, dtype="bf16")
    capfd.readouterr()
    with caplog.at_level(logging.INFO):
        run(engine, tiny_adapters, tiny_prompts)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]
    assert capfd.readouterr().err == ""
    assert engine.core.stats().extra["mode"] == "batched"


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@torch.inference_mode()
def test_no_token_of_an_int8_product_depends_on_another(threshold: float):
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    torch.manual_seed(0)
    layer = Linear8bitLt(64, 32, has_fp16_weights=False, threshold=threshold)
    weight = torch.randn(32, 64) * 0.2
    layer.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu").eval().requires_grad_(False)
    product, x = QuantisedProduct([layer]), torch.randn(4, 64)
    x[1, 5] = 50.0
    y = product(x)
    alone = torch.cat([product(row[None]) for row in x])
    assert torch.equal(y[[0, 2, 3]], alone[[0, 2, 3]])
    torch.testing.assert_close(y, alone, atol=1e-5, rtol=1e-5)
    exact = x @ weight.t() + layer.bias
    error = (y - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error[[0, 2, 3]].max() < 0.02 and error[1] < (0.02 if threshold else 0.2)


def test_layers_side_by_side_may_be_quantised_or_not(
    open_core: OpenCore, tiny_base: Path, tiny_prompts, tmp_path: Path
):
    config = quantization_config("nf4", torch.float32)
    config.llm_int8_skip_modules = ["k_proj", "up_proj", "lm_head"]
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "mixed")
    engine = open_core(tmp_path / "mixed")
    assert engine.core.stats().extra["quantised_linears"] == 10
    engine.core.add(request("r", tiny_prompts[5]))
    engine.run()
    for module in model.modules():
        if is_quantised(module):
            module.support_avx512bf16_for_cpu = False
    prompt = tiny_prompts[5]
    with torch.no_grad():
        out = model.eval().generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert engine.tokens("r") == out[0, len(prompt) :].tolist()


def test_a_base_quantised_by_something_else_is_refused(open_core: OpenCore, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(InvalidRequest, match="quantised by `gptq`"):
        open_core(tmp_path)
