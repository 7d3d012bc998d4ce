"""Two processes share the steps of one run, and it is the run of one process."""

import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train import test_dpo, test_lora
from tests.train.conftest import Lab
from tests.train.test_lora import plan_for, train
from tuneloom.bases import Base
from tuneloom.domain import TrainOptions
from tuneloom.train.attempt import run_attempt
from tuneloom.train.data import Tokens
from tuneloom.train.lora import LoraTrainer
from tuneloom.train.plan import Plan
from tuneloom.train.team import StartAgain, Team

pytestmark = pytest.mark.timeout(600)
base, tokens = test_lora.base, test_lora.tokens

RANK = """
import pickle, sys
from tests.train.test_team import compute
number, task, found = sys.argv[1:]
with open(task, "rb") as file:
    result = compute(int(number), pickle.load(file))
with open(found, "wb") as file:
    pickle.dump(result, file)
"""


@dataclass
class Task:
    base: Base
    plan: Plan
    tokens: Any
    folder: Path
    size: int = 2


def compute(rank: int, task: Task) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """In a process of a team: the adapter that it ends with, and what its steps logged."""
    from peft import get_peft_model_state_dict

    from tests.train.test_dpo import Losses
    from tuneloom.train.dpo import PreferenceTrainer, pair_lengths
    from tuneloom.train.lora import Batches, EndsTogether
    from tuneloom.train.models import add_lora, load_base, load_tokenizer

    def share(address: str) -> str:
        return f"file://{task.folder}/meet"

    team, plan, log = Team.meet(rank, task.size, "127.0.0.1", share), task.plan, Losses()
    is_dpo = plan.method == "dpo"
    lengths = pair_lengths(task.tokens) if is_dpo else task.tokens.lengths
    trainer = (PreferenceTrainer if is_dpo else LoraTrainer)(
        add_lora(load_base(task.base, plan), plan),
        plan,
        task.tokens,
        Batches(lengths, plan.batch_size, plan.micro_size, plan.seed),
        tokenizer=load_tokenizer(task.base),
        base_id=task.base.id,
        folder=task.folder / str(rank),
        use_gpu=False,
        callbacks=[log, EndsTogether(team)],
        on_save=lambda _: None,
        team=team,
    )
    if is_dpo:
        trainer.prepare(None, lambda: True)
    trainer.learn(None)
    team.leave()
    return get_peft_model_state_dict(trainer.model, save_embedding_layers=False), log.logs


def of(name: str, logs: list[dict[str, float]]) -> list[float]:
    return [each[name] for each in logs]


def finished(processes: list[subprocess.Popen]) -> list[tuple[str, int]]:
    """What each process printed and its exit code; none outlives this."""
    try:
        outputs = [process.communicate(timeout=540)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(output, process.returncode) for output, process in zip(outputs, processes, strict=True)]


def together(task: Task) -> list[Any]:
    """What each process of the team found."""
    path = task.folder / "task.pickle"
    path.write_bytes(pickle.dumps(task))
    found = [task.folder / f"found-{rank}" for rank in range(task.size)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(path), str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(found)
    ]
    for output, code in finished(processes):
        assert code == 0, output[-3000:]
    return [pickle.loads(file.read_bytes()) for file in found]


def test_loss_curve_and_adapter_are_those_of_one_process(base: Base, tokens: Tokens, tmp_path: Path) -> None:
    plan = plan_for(base, tokens)
    alone, log = train(base, plan, tokens, tmp_path / "alone")

    (first, logs), (second, others) = together(Task(base, plan, tokens, tmp_path))

    np.testing.assert_allclose(of("loss", logs), log.losses, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(of("mean_token_accuracy", logs), log.accuracies, atol=1e-6)
    assert of("loss", others) == of("loss", logs), "all processes know the same"
    for name, weight in alone.items():
        torch.testing.assert_close(first[name], weight, atol=1e-5, rtol=1e-4)
        assert torch.equal(first[name], second[name]), "no process drifts away"


def test_preferences_have_the_losses_and_rewards_of_one_process(base: Base, tmp_path: Path) -> None:
    # Nine pairs in steps of four: the last step has one, so that a process has none.
    pairs = test_dpo.random_pairs(9)
    plan = test_dpo.plan_for(base, pairs)
    trainer, alone = test_dpo.ours(base, plan, pairs, tmp_path / "alone")
    trainer.prepare(None, lambda: True)
    trainer.learn(None)

    (_, logs), (_, others) = together(Task(base, plan, pairs, tmp_path))

    for name in ("loss", "train_reward_margin", "train_reward_accuracy"):
        np.testing.assert_allclose(of(name, logs), of(name, alone.logs), atol=1e-4, rtol=1e-4, err_msg=name)
    assert of("loss", others) == of("loss", logs)


class Duo(Team):
    """The leader of two, the other of which computes nothing and waits for ever."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def part(self, rows: Any) -> Any:
        return rows

    def tell(self, value: Any = None) -> Any:
        return value

    def total(self, number: float) -> float:
        return number

    def means(self, values: dict[str, float], weight: float) -> dict[str, float]:
        return values

    def add_gradients(self, parameters: Any) -> None:
        pass


def test_out_of_memory_starts_all_of_a_team_again_with_less_at_a_time(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TrainOptions(rank=4, precision="fp32", learning_rate=5e-3)
    job, original = lab.add_job(options=options), LoraTrainer.compute_loss

    def compute_loss(self: LoraTrainer, model: Any, inputs: dict[str, Any], *more: Any, **names: Any) -> Any:
        if int((inputs["position_ids"] == 0).sum()) > 2:
            torch.empty(1 << 55)
        return original(self, model, inputs, *more, **names)

    monkeypatch.setattr(LoraTrainer, "compute_loss", compute_loss)
    with pytest.raises(StartAgain):
        run_attempt(lab.settings, job.id, 1, None, Duo())
    assert lab.progress(job.id).outcome is None

    assert run_attempt(lab.settings, job.id, 1, None, Duo()) == "published"

    (warned,) = [event.message for event in lab.events(job.id) if event.level == "warn"]
    assert warned.startswith("The memory was not enough: 2 of the 4 rows")
    assert lab.steps(job.id) == list(range(1, 13))


LEAVES = """
import sys
from tuneloom.train.team import Left, Team
team = Team.meet(int(sys.argv[1]), 2, "127.0.0.1", lambda _: sys.argv[2])
assert team.total(team.rank + 1) == 3
if team.leads:
    team.leave()
else:
    try:
        team.tell()
    except Left:
        print("left alone")
"""


def test_who_waits_for_a_leader_that_leaves_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVES]
    processes = [
        subprocess.Popen([*command, str(rank), f"file://{tmp_path}/meet"], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    leader, other = finished(processes)
    assert (leader[1], other[1]) == (0, 0) and "left alone" in other[0]
