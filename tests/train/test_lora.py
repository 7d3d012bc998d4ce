"""The trainer on packed and padded rows, held against plain transformers and PEFT in the same order of rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import TrainerCallback

from tuneloom.bases import Base, add_folder
from tuneloom.domain import Hyperparameters, JobSpec, TrainOptions
from tuneloom.train.attention import Group
from tuneloom.train.data import Tokens
from tuneloom.train.lora import Batches, LoraTrainer
from tuneloom.train.models import add_lora, load_base, load_tokenizer
from tuneloom.train.plan import Plan, make_plan

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS, STEPS = 21, 12


@pytest.fixture
def base(tmp_path: Path, tiny_base: Path) -> Base:
    return add_folder(tmp_path / "bases", tiny_base, "tiny/llama")


@pytest.fixture
def tokens() -> Tokens:
    """Rows of 3 to 24 tokens whose second halves are learned."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 25, ROWS)
    ids = rng.integers(5, 500, lengths.sum()).astype(np.int32)
    learned = np.concatenate([np.arange(length) >= length // 2 for length in lengths])
    return Tokens(ids, learned, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def plan_for(base: Base, tokens: Tokens, *, passes: int = 1, **options: Any) -> Plan:
    spec = JobSpec(
        base=base.id,
        training_file="file-1",
        seed=5,
        hyperparameters=Hyperparameters(n_epochs=2, batch_size=4),
        options=TrainOptions(**{"rank": 4, "precision": "fp32", "learning_rate": 5e-3, **options}),
    )
    plan = make_plan(spec, tokens, base, has_bf16=False)
    return replace(plan, micro_size=plan.batch_size // passes)


class Log(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.substeps = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            self.accuracies.append(logs["mean_token_accuracy"])

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.substeps += 1


def trainer_for(base: Base, plan: Plan, tokens: Tokens, folder: Path) -> tuple[LoraTrainer, Log]:
    log = Log()
    trainer = LoraTrainer(
        add_lora(load_base(base, plan), plan),
        plan,
        tokens,
        Batches(tokens.lengths, plan.batch_size, plan.micro_size, plan.seed),
        tokenizer=load_tokenizer(base),
        base_id=base.id,
        folder=folder,
        use_gpu=False,
        callbacks=[log],
        on_save=lambda _: None,
    )
    return trainer, log


def train(base: Base, plan: Plan, tokens: Tokens, folder: Path) -> tuple[dict[str, torch.Tensor], Log]:
    trainer, log = trainer_for(base, plan, tokens, folder)
    trainer.learn(None)
    return get_peft_model_state_dict(trainer.model, save_embedding_layers=False), log


def by_hand(base: Base, plan: Plan, tokens: Tokens) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same steps row by row, with full logits, by transformers, PEFT and torch alone."""
    model = add_lora(load_base(base, plan), plan)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=plan.learning_rate, weight_decay=0.0)
    batches = Batches(tokens.lengths, plan.batch_size, plan.micro_size, plan.seed)
    losses = []
    steps = [batch for epoch in range(plan.n_epochs) for batch in batches.epoch(epoch)]
    for step, batch in enumerate(steps):
        optimizer.param_groups[0]["lr"] = plan.learning_rate * (1 - step / len(steps))
        parts = [slice(tokens.offsets[row], tokens.offsets[row + 1]) for row in batch]
        count = sum(int(tokens.learned[part][1:].sum()) for part in parts)
        total = 0.0
        for part in parts:
            ids = torch.from_numpy(tokens.ids[part].astype(np.int64))
            mask = torch.from_numpy(tokens.learned[part].copy())[1:]
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits[mask], ids[1:][mask], reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(weights, plan.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return get_peft_model_state_dict(model, save_embedding_layers=False), losses


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(("passes", "checkpointing"), [(1, False), (4, False), (1, True)])
def test_the_loss_curve_and_the_adapter_are_those_of_rows_one_by_one(
    base: Base, tokens: Tokens, tmp_path: Path, packing: bool, passes: int, checkpointing: bool
) -> None:
    plan = plan_for(base, tokens, packing=packing, passes=passes)
    plan = replace(plan, gradient_checkpointing=checkpointing)
    expected, losses = by_hand(base, plan, tokens)
    found, log = train(base, plan, tokens, tmp_path)
    assert len(log.losses) == STEPS
    np.testing.assert_allclose(log.losses, losses, atol=1e-5, rtol=1e-5)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-4)
    assert (log.substeps > 0) == (passes > 1)


def test_the_same_job_has_the_same_bytes_and_another_seed_has_others(
    base: Base, tokens: Tokens, tmp_path: Path
) -> None:
    plan = plan_for(base, tokens, dropout=0.1)
    first, again = (train(base, plan, tokens, tmp_path / name)[0] for name in "ab")
    other = train(base, replace(plan, seed=6), tokens, tmp_path / "c")[0]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_accuracy_is_that_of_all_learned_tokens_of_a_step(base: Base, tokens: Tokens, tmp_path: Path) -> None:
    tokens = replace(tokens, ids=tokens.ids % 3 + 5)
    plan = plan_for(base, tokens, learning_rate=3e-2)
    whole = train(base, plan, tokens, tmp_path / "a")[1].accuracies
    parts = train(base, replace(plan, micro_size=1), tokens, tmp_path / "b")[1].accuracies
    assert 0 < np.mean(whole) < 1
    np.testing.assert_allclose(parts, whole, atol=1e-6)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_the_score_of_other_rows_does_not_depend_on_how_many_are_scored_at_once(
    base: Base, tokens: Tokens, tmp_path: Path, packing: bool
) -> None:
    trainer, _ = trainer_for(base, plan_for(base, tokens, packing=packing), tokens, tmp_path)
    one, many = trainer.score(tokens, 1), trainer.score(tokens, 8)
    assert one.loss == pytest.approx(many.loss, abs=1e-5)
    assert one.accuracy == many.accuracy


def test_packed_inputs_hold_no_padding_and_padded_ones_do(base: Base, tokens: Tokens, tmp_path: Path) -> None:
    sizes = {}
    for packing in (True, False):
        trainer, _ = trainer_for(base, plan_for(base, tokens, packing=packing), tokens, tmp_path)
        sizes[packing] = sum(part["input_ids"].numel() for step in trainer.get_train_dataloader() for part in step)
    assert sizes[True] == tokens.num_tokens < sizes[False]


def test_a_base_that_cannot_be_packed_is_padded_and_its_settings_say_why(
    base: Base, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneloom.train import packing

    # An attention that lets rows see each other, as of a model that ignores where they begin.
    monkeypatch.setattr(packing, "groups_of", lambda borders: [Group(0, 1, borders[-1])])
    plan = plan_for(base, tokens, packing=True)
    trainer, _ = trainer_for(base, plan, tokens, tmp_path)
    assert plan.packing
    assert not trainer.plan.packing
    (setting,) = [each for each in trainer.plan.settings if each.name == "packing"]
    assert setting.value is False
    assert "change each other" in setting.reason
    assert "attention_mask" in trainer.collate([0, 1])[0]


def test_bf16_needs_no_autocast_and_learns_like_fp32(base: Base, tokens: Tokens, tmp_path: Path) -> None:
    exact = train(base, plan_for(base, tokens), tokens, tmp_path / "a")[1].losses
    trainer, log = trainer_for(base, plan_for(base, tokens, precision="bf16"), tokens, tmp_path / "b")
    trainer.learn(None)
    assert not trainer.args.bf16
    assert trainer.model.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    np.testing.assert_allclose(log.losses, exact, atol=0.15)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_fp16_learns_like_fp32_by_losses_that_are_scaled(
    base: Base, tokens: Tokens, tmp_path: Path, quantization: str
) -> None:
    exact = train(base, plan_for(base, tokens, quantization=quantization), tokens, tmp_path / "a")[1].losses
    plan = plan_for(base, tokens, precision="fp16", quantization=quantization)
    trainer, log = trainer_for(base, plan, tokens, tmp_path / "b")
    trainer.learn(None)
    assert trainer.model.dtype == torch.float16
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    print(quantization, np.abs(np.array(log.losses) - exact).max(), trainer._scale.value)
    np.testing.assert_allclose(log.losses, exact, atol=0.02)


def test_layers_of_unknown_form_are_cast_to_fp16(
    base: Base, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneloom.train import lora

    exact = train(base, plan_for(base, tokens), tokens, tmp_path / "a")[1].losses
    monkeypatch.setattr(lora, "speed_up", lambda model: False)
    _, log = train(base, plan_for(base, tokens, precision="fp16"), tokens, tmp_path / "b")
    np.testing.assert_allclose(log.losses, exact, atol=0.02)
