import numpy as np
import pytest
import torch

from tests.train.conftest import BASE_ID
from tuneloom.bases import get_base
from tuneloom.config import TrainSettings
from tuneloom.domain import JobSpec, TrainOptions
from tuneloom.train.planned import Lengths, has_bf16, plan_run
from tuneloom.train.report import NOTHING, Totals

ROWS = Lengths(np.full(40, 100))
TRAINING = Totals(rows=40, tokens=4000, learned_tokens=2000, longest=100)
PLAIN = TrainSettings(threads=1)


@pytest.fixture
def base(lab):
    return get_base(lab.settings.bases_dir, BASE_ID)


def spec(base, **fields) -> JobSpec:
    return JobSpec(base=base.id, training_file="file-1", seed=1, **fields)


def test_tokens_steps_and_memory_are_those_of_the_plan(base):
    planned = plan_run(PLAIN, spec(base), base, ROWS, TRAINING, NOTHING, None)
    assert (planned.tokens, planned.plan.total_steps) == (4000 * planned.plan.n_epochs, planned.plan.n_epochs * 10)
    assert planned.evaluated_tokens == 0 and planned.refusal is None
    shown = planned.as_json()
    assert shown["memory_bytes"] == sum(shown["memory_parts"].values()) > 0
    assert {"base", "adapter", "activations", "logits", "program"} <= set(shown["memory_parts"])
    assert {"n_epochs", "precision", "quantization"} <= {setting["name"] for setting in shown["settings"]}


@pytest.mark.parametrize(("every", "times"), [(None, 3), (10, 3), (7, 5), (500, 1)])
def test_validation_rows_are_scored_as_often_as_the_run_evaluates(base, every, times):
    asked = spec(
        base,
        hyperparameters={"n_epochs": 3, "batch_size": 4},
        options=TrainOptions(validation_share=0.2, evaluate_every_steps=every),
    )
    held = Totals(rows=10, tokens=700)
    assert plan_run(PLAIN, asked, base, ROWS, TRAINING, held, None).evaluated_tokens == 700 * times


def test_a_run_that_fits_nowhere_says_so_with_the_arithmetic_and_a_gpus_memory_is_not_guessed(base):
    small = TrainSettings(memory_bytes=1 << 20)
    planned = plan_run(small, spec(base), base, ROWS, TRAINING, NOTHING, None)
    assert "does not fit" in planned.refusal and "base" in planned.refusal
    gpu = plan_run(TrainSettings(num_gpus=1), spec(base), base, ROWS, TRAINING, NOTHING, None)
    assert gpu.refusal is None and "program" not in gpu.memory


def test_the_number_format_is_what_the_trainer_will_find(tmp_path):
    assert has_bf16(PLAIN) == (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    assert not has_bf16(PLAIN, tmp_path / "absent") and has_bf16(TrainSettings(num_gpus=1))
