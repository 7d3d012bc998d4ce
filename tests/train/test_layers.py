import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tuneloom.train import layers
from tuneloom.train.layers import speed_up

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(params=["llama", "gemma", "qwen with biases"])
def base(request: pytest.FixtureRequest, tiny_base: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "llama": lambda: AutoModelForCausalLM.from_pretrained(tiny_base),
        "gemma": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)),
        "qwen with biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    }
    model = makers[request.param]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.uniform_(0.2, 1.8)
    return model


def with_lora(base: torch.nn.Module, **config: object) -> tuple[PeftModel, PeftModel]:
    """PEFT's model and a copy of it with our layers, both with adapters that do something."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    plain = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    ours = copy.deepcopy(plain)
    speed_up(ours)
    return plain, ours


def learn(model: PeftModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids = torch.randint(3, 120, (2, 17), generator=torch.Generator().manual_seed(2))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def test_loss_and_gradients_equal_those_of_peft_and_transformers(base: torch.nn.Module) -> None:
    plain, ours = with_lora(base)
    (loss, grads), (expected_loss, expected) = learn(ours), learn(plain)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    assert len(grads) == len(expected) > 0
    for mine, theirs in zip(grads, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_in_bf16_the_gradient_is_as_near_to_that_of_fp32_as_with_autocast(base: torch.nn.Module) -> None:
    _, exact = learn(with_lora(copy.deepcopy(base))[0])
    plain, ours = with_lora(base.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        _, theirs = learn(plain)
    _, mine = learn(ours)

    def off(grads: list[torch.Tensor]) -> float:
        return float(sum(((a - b) ** 2).sum() for a, b in zip(grads, exact, strict=True)) ** 0.5)

    size = float(sum((a**2).sum() for a in exact) ** 0.5)
    assert all(grad.dtype == torch.float32 for grad in mine)
    assert off(mine) < max(1.2 * off(theirs), 0.02 * size)


def test_dropout_drops_the_same_as_that_of_peft(base: torch.nn.Module) -> None:
    plain, ours = with_lora(base, lora_dropout=0.4)
    found = []
    for model in (plain, ours):
        model.train()
        torch.manual_seed(3)
        found.append(learn(model)[1])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_model_without_its_adapter_is_the_base(base: torch.nn.Module) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = copy.deepcopy(base)(input_ids=ids).logits
    _, ours = with_lora(base)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(input_ids=ids).logits, expected, atol=1e-3)


def test_every_norm_and_gate_of_a_known_base_is_replaced(base: torch.nn.Module) -> None:
    _, ours = with_lora(base)
    changed = [name for name, module in ours.named_modules() if "forward" in vars(module)]
    norms = [name for name, _ in ours.named_modules() if name.endswith("norm")]
    assert norms
    assert set(norms) <= set(changed)
    assert sum(name.endswith("mlp") for name in changed) == 2


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 1

    model = torch.nn.Sequential(OddRMSNorm(8), LlamaRMSNorm(8)).requires_grad_(False)
    speed_up(model)
    assert "forward" not in vars(model[0])
    assert "forward" in vars(model[1])


def test_layers_with_a_variant_of_lora_are_left_to_peft(tiny_base: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base),
        LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True),
    )
    assert not speed_up(model)
    assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, layers.LoraLinear))
