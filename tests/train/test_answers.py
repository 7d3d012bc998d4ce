import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from tuneloom.train import answers
from tuneloom.train.answers import score_answers_only


@pytest.fixture
def models(tiny_base: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Two equal models with adapters that do something: TRL's head, and ours."""
    torch.manual_seed(0)
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    ours = copy.deepcopy(plain)
    for model in (plain, ours):
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    assert score_answers_only(ours.get_base_model())
    return plain, ours


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 500, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    labels = ids.clone()
    labels[:, :14] = -100
    labels[1, 15:] = -100
    labels[2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_loss_and_gradients_equal_those_of_full_logits(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    plain, ours = models
    inputs = batch()
    labels = inputs["labels"]
    logits = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    output = ours(**inputs, fused_lm_head=True)
    loss = -output.log_probs.sum() / output.label_mask.sum()
    expected.backward()
    loss.backward()

    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    pairs = [(a.grad, b.grad) for a, b in zip(ours.parameters(), plain.parameters(), strict=True) if a.requires_grad]
    assert pairs
    for ours_grad, plain_grad in pairs:
        torch.testing.assert_close(ours_grad, plain_grad, atol=1e-5, rtol=1e-4)


def test_what_is_returned_equals_what_trl_returns(
    models: tuple[torch.nn.Module, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours = models
    # Three positions at once, so that the chunks have borders.
    monkeypatch.setattr(answers, "LOGITS_AT_ONCE", 3 * 512)
    theirs, mine = (model(**batch(), fused_lm_head=True) for model in (plain, ours))
    torch.testing.assert_close(mine.log_probs, theirs.log_probs, atol=1e-5, rtol=1e-5)
    assert torch.equal(mine.is_top1, theirs.is_top1)
    assert torch.equal(mine.label_mask, theirs.label_mask)


def test_a_batch_without_labels_has_a_loss_of_zero_that_can_be_differentiated(
    models: tuple[torch.nn.Module, torch.nn.Module],
) -> None:
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = -models[1](**inputs, fused_lm_head=True).log_probs.sum()
    loss.backward()
    assert loss.item() == 0.0


def test_generation_still_sees_plain_logits(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    inputs = {"input_ids": batch()["input_ids"]}
    assert torch.equal(models[0](**inputs).logits, models[1](**inputs).logits)


def test_a_head_as_in_gemma_3_is_plain(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base).requires_grad_(False)
    model.config.final_logit_softcapping = None
    model.config.logit_scale = 1.0
    assert score_answers_only(model)


@pytest.mark.parametrize("field", ["final_logit_softcapping", "logit_scale"])
def test_a_head_that_is_not_plain_is_left_to_trl(tiny_base: Path, field: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.requires_grad_(False)
    setattr(model.config, field, 30.0)
    assert not score_answers_only(model)
