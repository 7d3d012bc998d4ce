"""Runs that something is wrong with: smaller pieces where that helps, else one true error."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.conftest import (
    BASE_ID,
    Killed,
    Lab,
    Schedule,
    colour_rows,
    messages,
    run,
)
from tuneloom.bases import get_base
from tuneloom.config import BaseSettings, EngineSettings
from tuneloom.domain import TrainOptions
from tuneloom.train.check import check_job
from tuneloom.train.folders import run_folder
from tuneloom.train.lora import LoraTrainer, Score


def test_a_loss_that_is_no_number_fails_with_its_step(lab: Lab) -> None:
    job = lab.add_job(options=TrainOptions(rank=4, precision="fp32", learning_rate=1.0), learning_rate_multiplier=1e30)
    assert run(lab, job.id) == "failed"
    error = lab.progress(job.id).error
    assert error is not None and error.code == "loss_not_finite"
    assert "learning_rate_multiplier" in error.message


def test_an_unreadable_base_fails_with_its_name(lab: Lab) -> None:
    job = lab.add_job()
    weights = get_base(lab.settings.bases_dir, BASE_ID).path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert run(lab, job.id) == "failed"
    error = lab.progress(job.id).error
    assert error is not None and error.code == "base_unreadable"
    assert BASE_ID in error.message and str(lab.settings.home) not in error.message


def test_a_base_that_lacks_a_weight_is_not_trained_with_random_numbers(lab: Lab) -> None:
    job = lab.add_job()
    weights = get_base(lab.settings.bases_dir, BASE_ID).path / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert run(lab, job.id) == "failed"
    error = lab.progress(job.id).error
    assert error is not None and error.code == "base_unreadable"
    assert "`model.layers.0.mlp.up_proj.weight` is missing" in error.message


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_base_whose_texts_are_damaged_is_unreadable_too(lab: Lab, name: str) -> None:
    job = lab.add_job()
    path = get_base(lab.settings.bases_dir, BASE_ID).path / name
    path.write_bytes(path.read_bytes()[:40])
    assert run(lab, job.id) == "failed"
    error = lab.progress(job.id).error
    assert error is not None and error.code == "base_unreadable", error
    assert f"`{BASE_ID}`" in error.message and str(lab.settings.home) not in error.message
    checked = check_job(lab.settings, lab.store, job.id)
    assert checked.error is not None and checked.error.message == error.message


def test_an_evaluation_that_is_no_number_fails_with_its_step(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    job = lab.add_job(validation=colour_rows(6))
    monkeypatch.setattr(LoraTrainer, "score", lambda *_: Score(float("nan"), 0.0))
    assert run(lab, job.id) == "failed"
    error = lab.progress(job.id).error
    assert error is not None and error.code == "loss_not_finite" and "validation loss" in error.message
    assert "at step 6" in error.message


def test_a_rank_that_is_not_served_fails_before_it_is_trained(lab: Lab) -> None:
    """Also the one that nobody asked for."""
    lab.settings = lab.settings.model_copy(
        update={"bases": (BaseSettings(id=BASE_ID, engine=EngineSettings(max_rank=8)),)}
    )
    job = lab.add_job(options=TrainOptions(precision="fp32"))
    assert run(lab, job.id) == "failed"
    error = lab.progress(job.id).error
    assert error is not None and error.param == "tuneloom.rank"
    assert "the rank 16" in error.message and "up to 8" in error.message and lab.steps(job.id) == []
    assert check_job(lab.settings, lab.store, job.id).error == error


def test_an_unknown_target_module_fails_with_the_known_ones(lab: Lab) -> None:
    job = lab.add_job(options=TrainOptions(rank=4, precision="fp32", target_modules=("q_proj", "wq")))
    assert run(lab, job.id) == "failed"
    error = lab.progress(job.id).error
    assert error is not None and "`wq`" in error.message and "k_proj" in error.message


def test_a_file_that_is_gone_fails_with_its_id(lab: Lab) -> None:
    job = lab.add_job()
    stored = lab.store.records.files.get(job.spec.training_file)
    lab.store.records.commit(lab.store.records.files.delete(stored))
    assert run(lab, job.id) == "failed"
    error = lab.progress(job.id).error
    assert error is not None and job.spec.training_file in error.message and error.param == "training_file"


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the allocator fail, truly, in forward passes of more rows."""
    original = LoraTrainer.compute_loss

    def limit(rows: int) -> None:
        def compute_loss(self: LoraTrainer, model: Any, inputs: dict[str, Any], *more: Any, **names: Any) -> Any:
            is_packed = len(inputs["input_ids"]) == 1
            if (int((inputs["position_ids"] == 0).sum()) if is_packed else len(inputs["input_ids"])) > rows:
                torch.empty(1 << 55)
            return original(self, model, inputs, *more, **names)

        monkeypatch.setattr(LoraTrainer, "compute_loss", compute_loss)

    return limit


def test_out_of_memory_goes_on_in_smaller_pieces_of_the_same_steps(
    lab: Lab, at_step: Schedule, room_for: Callable[[int], None]
) -> None:
    options = TrainOptions(rank=4, precision="fp32", learning_rate=5e-3, checkpoint_every_steps=4)
    whole, tight = lab.add_job(options=options), lab.add_job(options=options)
    run(lab, whole.id)
    at_step(5, lambda: room_for(1))

    assert run(lab, tight.id) == "published", lab.progress(tight.id).error

    warned = [event.message for event in lab.events(tight.id) if event.level == "warn"]
    assert warned and all(text.startswith("The memory was not enough: ") for text in warned)
    assert "Training goes on from the checkpoint at step 4" in messages(lab, tight.id)
    assert lab.steps(tight.id) == list(range(1, 13))
    assert lab.losses(tight.id) == pytest.approx(lab.losses(whole.id), rel=1e-4)
    passes = {setting.name: setting for setting in lab.progress(tight.id).settings}["accumulation_steps"]
    assert (passes.value, passes.reason) == (4, "the memory was not enough")


def test_a_row_that_does_not_fit_alone_fails_with_what_helps(lab: Lab, room_for: Callable[[int], None]) -> None:
    job = lab.add_job()
    room_for(0)
    assert run(lab, job.id) == "failed"
    error = lab.progress(job.id).error
    assert error is not None and error.code == "out_of_memory"
    assert "quantization" in error.message and "one row" in error.message


@pytest.mark.parametrize("memory", ["short", "ample"])
def test_a_death_while_memory_is_short_makes_the_next_start_smaller(
    lab: Lab, at_step: Schedule, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    job = lab.add_job(options=TrainOptions(rank=4, precision="fp32", checkpoint_every_steps=4))

    def kill() -> None:
        if memory == "short":
            monkeypatch.setattr("tuneloom.train.meter.SHORT_SHARE", 1.1)
        time.sleep(2.5)
        raise Killed

    at_step(3, kill)
    with pytest.raises(Killed):
        run(lab, job.id)
    assert run(lab, job.id) == "published"
    warned = [event.message for event in lab.events(job.id) if event.level == "warn"]
    assert [text.split(":")[0] for text in warned] == (
        ["The training process was ended while memory was short"] if memory == "short" else []
    )


def test_a_disk_that_fills_up_fails_the_job_with_that_word_and_leaves_nothing(
    lab: Lab, at_step: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lab.add_job(options=TrainOptions(rank=4, precision="fp32", checkpoint_every_steps=4))
    save = LoraTrainer.save_state

    def fill_up(self: LoraTrainer, folder: Path) -> None:
        folder.joinpath("optimizer.pt").symlink_to("/dev/full")
        save(self, folder)

    at_step(5, lambda: monkeypatch.setattr(LoraTrainer, "save_state", fill_up))
    monkeypatch.setattr("tuneloom.train.failure.FULL_DISK_BYTES", 1 << 60)
    assert run(lab, job.id) == "failed"
    error = lab.progress(job.id).error
    assert error is not None and error.code == "disk_full", error
    assert lab.checkpoint_steps(job.id) == [4]
    assert not run_folder(lab.settings, job.id).exists()


def test_a_base_that_has_no_room_is_not_called_unreadable(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    job = lab.add_job()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: torch.empty(1 << 55))
    assert run(lab, job.id) == "failed"
    error = lab.progress(job.id).error
    assert error is not None and error.code == "out_of_memory"
