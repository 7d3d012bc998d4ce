"""Learning from preferences, held against TRL's DPOTrainer on the same rows in the same order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from tests.tiny import make_adapter
from tests.train.conftest import BASE_ID, WORDS, Killed, Lab, final_adapter, run
from tuneloom.bases import Base, add_folder
from tuneloom.domain import Hyperparameters, JobSpec, TrainOptions
from tuneloom.train.data import PreferenceTokens, Tokens
from tuneloom.train.dpo import PreferenceTrainer, pair_lengths
from tuneloom.train.lora import Batches
from tuneloom.train.models import add_lora, load_base, load_tokenizer
from tuneloom.train.plan import Plan, make_plan
from tuneloom.train.start import read_start

Schedule = Callable[[int, Callable[[], None]], None]


def preference_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "input": {"messages": [{"role": "user", "content": " ".join(WORDS[: 1 + number % 7]) + f" {number}?"}]},
            "preferred_output": [{"role": "assistant", "content": WORDS[number % 3]}],
            "non_preferred_output": [{"role": "assistant", "content": " ".join(WORDS[4 : 6 + number % 4])}],
        }
        for number in range(count)
    ]


def random_pairs(count: int, seed: int = 0) -> PreferenceTokens:
    """Pairs of different lengths; only the answers are learned."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(5, 500, rng.integers(2, 12)) for _ in range(count)]

    def side() -> Tokens:
        answers = [rng.integers(5, 500, rng.integers(1, 8)) for _ in range(count)]
        rows = [np.concatenate(parts) for parts in zip(prompts, answers, strict=True)]
        learned = [np.arange(len(row)) >= len(prompt) for row, prompt in zip(rows, prompts, strict=True)]
        offsets = np.cumsum([0, *map(len, rows)])
        return Tokens(np.concatenate(rows).astype(np.int32), np.concatenate(learned), offsets.astype(np.int64))

    return PreferenceTokens(side(), side(), np.array([len(prompt) for prompt in prompts], np.int32))


@pytest.fixture
def base(tmp_path: Path, tiny_base: Path) -> Base:
    return add_folder(tmp_path / "bases", tiny_base, BASE_ID)


def plan_for(
    base: Base,
    pairs: PreferenceTokens,
    start: Path | None = None,
    *,
    beta: float = 0.5,
    n_epochs: int = 2,
    **options: Any,
) -> Plan:
    settings = {"learning_rate": 1e-2, "precision": "fp32", "scheduler": "constant", "warmup_steps": 0, **options}
    spec = JobSpec(
        base=base.id,
        training_file="file-1",
        seed=7,
        method="dpo",
        hyperparameters=Hyperparameters(n_epochs=n_epochs, batch_size=4, beta=beta),
        options=TrainOptions(**settings),
    )
    return make_plan(spec, pairs, base, has_bf16=True, start=read_start(start) if start else None)


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))


def ours(
    base: Base, plan: Plan, pairs: PreferenceTokens, folder: Path, **more: Any
) -> tuple[PreferenceTrainer, Losses]:
    losses = Losses()
    trainer = PreferenceTrainer(
        add_lora(load_base(base, plan), plan),
        plan,
        pairs,
        Batches(pair_lengths(pairs), plan.batch_size, plan.micro_size, plan.seed),
        tokenizer=load_tokenizer(base),
        base_id=base.id,
        folder=folder,
        use_gpu=False,
        callbacks=[losses],
        on_save=lambda _: None,
        **more,
    )
    return trainer, losses


class PlainTrainer(DPOTrainer):
    """TRL's, given token ids in the order in which they are learned."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def trl_logs(base: Base, plan: Plan, pairs: PreferenceTokens, folder: Path) -> list[dict[str, float]]:
    batches = Batches(pair_lengths(pairs), plan.batch_size, plan.micro_size, plan.seed)
    order = [int(row) for epoch in range(plan.n_epochs) for batch in batches.epoch(epoch) for row in batch]

    def ids(tokens: Tokens, row: int) -> list[int]:
        return tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()

    rows = []
    for row in order:
        prompt = int(pairs.prompt_lengths[row])
        chosen, rejected = ids(pairs.chosen, row), ids(pairs.rejected, row)
        rows.append({"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]})
    config = DPOConfig(
        output_dir=str(folder),
        beta=plan.beta,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=plan.max_grad_norm,
        optim="adamw_torch_fused",
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    losses = Losses()
    PlainTrainer(
        model=add_lora(load_base(base, plan), plan),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(base),
        callbacks=[losses],
    ).train()
    return losses.logs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"packing": True}, {"packing": False}, {"accumulation_steps": 4}], ids=str)
@pytest.mark.parametrize("is_warm", [False, True], ids=["fresh", "warm"])
def test_each_step_has_trls_loss_and_rewards(base: Base, tmp_path: Path, options: dict[str, Any], is_warm: bool):
    pairs = random_pairs(12)
    start = make_adapter(tmp_path / "start", base.path, targets=("q_proj", "v_proj")) if is_warm else None
    plan = plan_for(base, pairs, start, **options)
    trainer, losses = ours(base, plan, pairs, tmp_path / "ours")
    trainer.prepare(None, lambda: True)
    trainer.learn(None)

    theirs = trl_logs(base, plan, pairs, tmp_path / "theirs")

    assert len(losses.logs) == len(theirs) == 6
    for name, theirs_name in (
        ("loss", "loss"),
        ("train_reward_margin", "rewards/margins"),
        ("train_reward_accuracy", "rewards/accuracies"),
    ):
        found = [logs[name] for logs in losses.logs]
        np.testing.assert_allclose(found, [logs[theirs_name] for logs in theirs], atol=1e-4, err_msg=name)
    # It starts where the reference is, and learns.
    assert losses.logs[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert losses.logs[-1]["loss"] < 0.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"quantization": "nf4"}, {"quantization": "int8"}, {"precision": "bf16"}], ids=str)
def test_preferences_are_learned_in_fewer_bits(base: Base, tmp_path: Path, options: dict[str, Any]):
    pairs = random_pairs(12)
    plan = plan_for(base, pairs, **options)
    trainer, losses = ours(base, plan, pairs, tmp_path / "run")
    trainer.prepare(pairs, lambda: True)
    before = trainer.score(pairs, plan.micro_size)
    trainer.learn(None)
    after = trainer.score(pairs, plan.micro_size)

    # A product in int8 depends on the rows beside: outliers are looked for in all of them.
    near = 5e-2 if plan.quantization == "int8" else 1e-2
    assert losses.logs[0]["loss"] == pytest.approx(np.log(2), abs=near)
    assert before.loss == pytest.approx(np.log(2), abs=near) and after.loss < 0.6 * before.loss
    assert after.more["valid_reward_accuracy"] > 0.9 and after.more["valid_reward_margin"] > 0.5


def test_a_smaller_beta_lets_the_answers_move_farther(base: Base, tmp_path: Path):
    def log_ratio(beta: float) -> float:
        pairs = random_pairs(12)
        plan = plan_for(base, pairs, beta=beta, n_epochs=6)
        trainer, _ = ours(base, plan, pairs, tmp_path / str(beta))
        trainer.prepare(pairs, lambda: True)
        trainer.learn(None)
        return trainer.score(pairs, plan.micro_size).more["valid_reward_margin"] / beta

    assert log_ratio(0.05) > 1.5 * log_ratio(2.0) > 0


def test_the_reference_is_computed_once_and_goes_on_where_it_was_left(base: Base, tmp_path: Path):
    pairs = random_pairs(12)
    plan = plan_for(base, pairs, accumulation_steps=4)
    whole, _ = ours(base, plan, pairs, tmp_path / "whole")
    whole.prepare(None, lambda: True)
    calls: list[int] = []

    def twice() -> bool:
        calls.append(1)
        return len(calls) <= 2

    trainer, _ = ours(base, plan, pairs, tmp_path / "run")
    trainer.prepare(None, twice)
    (path,) = (tmp_path / "run").glob("reference-*.npy")
    assert 0 < np.isnan(np.load(path)).sum() < 24

    again, _ = ours(base, plan, pairs, tmp_path / "run")
    again.prepare(None, lambda: True)
    (reference,) = (tmp_path / "whole").glob("reference-*.npy")
    assert path.read_bytes() == reference.read_bytes()

    trained, _ = ours(base, plan, pairs, tmp_path / "run")
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    trained.prepare(None, lambda: pytest.fail("there is nothing left to compute"))


def add_dpo_job(lab: Lab, count: int = 24, **more: Any) -> Any:
    options = TrainOptions(rank=4, learning_rate=5e-3, precision="fp32", **more.pop("options", {}))
    job = lab.add_job(preference_rows(count), options=options, beta="auto", **more)
    return lab.change_job(job.id, spec=job.spec.model_copy(update={"method": "dpo"}))


def test_a_dpo_job_tells_loss_and_rewards_and_publishes(lab: Lab, tmp_path: Path):
    job = add_dpo_job(lab, validation=preference_rows(6), n_epochs=4)

    assert run(lab, job.id) == "published", lab.progress(job.id).error

    assert lab.progress(job.id).resolved.beta == 0.1
    metrics = [event.data for event in lab.events(job.id) if event.type == "metrics"]
    assert metrics[0]["train_loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert metrics[0]["train_reward_margin"] == pytest.approx(0, abs=1e-4)
    assert metrics[-1]["train_loss"] < 0.5 and metrics[-1]["train_reward_accuracy"] == 1
    assert metrics[-1]["valid_loss"] < 0.6 and metrics[-1]["valid_reward_accuracy"] == 1
    assert metrics[-1]["valid_reward_margin"] > 0.2
    learned = sum(len(row["preferred_output"]) for row in preference_rows(24))
    assert lab.progress(job.id).trained_tokens > 4 * 2 * learned
    assert final_adapter(lab, job.id, tmp_path)


def test_a_killed_dpo_run_goes_on_to_the_very_same_adapter(lab: Lab, tmp_path: Path, at_step: Schedule):
    options = {"dropout": 0.1, "checkpoint_every_steps": 4}
    whole, broken = add_dpo_job(lab, options=options), add_dpo_job(lab, options=options)
    assert run(lab, whole.id) == "published"

    def kill() -> None:
        raise Killed

    at_step(7, kill)
    with pytest.raises(Killed):
        run(lab, broken.id)
    lab.next_attempt(broken.id)
    assert run(lab, broken.id) == "published"

    assert lab.losses(broken.id) == lab.losses(whole.id)
    assert final_adapter(lab, broken.id, tmp_path) == final_adapter(lab, whole.id, tmp_path)


def test_a_dpo_job_that_is_cancelled_while_the_reference_is_computed_stops(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    job = add_dpo_job(lab)
    prepare = PreferenceTrainer.prepare

    def cancelled(self: PreferenceTrainer, validation: Any, is_wanted: Callable[[], bool]) -> None:
        lab.change_job(job.id, state="cancelled")
        prepare(self, validation, is_wanted)

    monkeypatch.setattr(PreferenceTrainer, "prepare", cancelled)
    assert run(lab, job.id) == "cancelled"
    assert lab.steps(job.id) == []
