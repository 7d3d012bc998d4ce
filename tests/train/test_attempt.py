"""One attempt from its records to its last word."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import (
    BASE_ID,
    Killed,
    Lab,
    Schedule,
    colour_rows,
    final_adapter,
    run,
)
from tuneloom.bases import get_base
from tuneloom.domain import Job, TrainOptions
from tuneloom.store.artifacts import fetch_adapter, read_manifest
from tuneloom.train.attempt import run_attempt
from tuneloom.train.checkpoints import Checkpoints
from tuneloom.train.folders import run_folder


def test_a_run_learns_publishes_and_tells_each_step(lab: Lab, tmp_path: Path) -> None:
    job = lab.add_job(validation=colour_rows(6), n_epochs=4)

    assert run_attempt(lab.settings, job.id, 1) == "published", lab.progress(job.id).error

    progress = lab.progress(job.id)
    assert (progress.outcome, progress.step, progress.total_steps, progress.logged_step) == ("published", 24, 24, 24)
    assert progress.resolved is not None and progress.resolved.n_epochs == 4
    assert lab.steps(job.id) == list(range(1, 25))
    losses = lab.losses(job.id)
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    last = [event for event in lab.events(job.id) if event.type == "metrics"][-1]
    assert last.message.startswith("Step 24/24: training loss=") and "full validation loss=" in last.message
    assert last.data is not None and last.data["full_valid_loss"] == last.data["valid_loss"] > 0

    manifest = read_manifest(lab.store.blobs, job.artifacts)
    assert manifest is not None
    assert (manifest.steps, manifest.trained_tokens, manifest.adapter.rank) == (24, progress.trained_tokens, 4)
    folder = fetch_adapter(lab.store.blobs, manifest.adapter, tmp_path / "cache")
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert str(lab.settings.home) not in (folder / "adapter_config.json").read_text()
    assert not run_folder(lab.settings, job.id).exists()


def test_checkpoints_are_callable_records_and_only_the_last_are_kept(lab: Lab, tmp_path: Path) -> None:
    job = lab.add_job(options=TrainOptions(rank=4, precision="fp32", checkpoint_every_steps=4))

    run_attempt(lab.settings, job.id, 1)

    made = [event.message for event in lab.events(job.id) if event.message.startswith("Checkpoint")]
    assert made == [f"Checkpoint created at step {step}" for step in (4, 6, 8, 12)]
    assert lab.checkpoint_steps(job.id) == [8, 12]
    assert {blob.key.split("/")[3] for blob in lab.store.blobs.list(f"jobs/{job.id}/checkpoints")} == {
        "step-8",
        "step-12",
    }
    last = lab.store.records.checkpoints.query({"job_id": job.id}, order_by="step")[-1].value
    assert last.name.startswith("ft:tiny/llama:local:colours:") and last.name.endswith(":ckpt-step-12")
    assert last.metrics["train_loss"] == lab.losses(job.id)[-1]
    fetch_adapter(lab.store.blobs, last.adapter, tmp_path / "cache")


def test_a_checkpoint_stays_while_an_unfinished_job_is_to_train_on_it(
    lab: Lab, tmp_path: Path, at_step: Callable[[int, Callable[[], None]], None]
) -> None:
    """Also while that job only waits; once it has ended, the checkpoint goes as any other."""
    job = lab.add_job(n_epochs=4, options=TrainOptions(rank=4, precision="fp32", checkpoint_every_steps=4))
    waiting: list[Job] = []

    def wait() -> None:
        (first,) = lab.store.records.checkpoints.query({"job_id": job.id, "step": 4})
        named = TrainOptions(precision="fp32", warm_start=first.value.name)
        other = lab.add_job(options=named, state="queued")
        waiting.append(lab.change_job(other.id, spec=other.spec.model_copy(update={"warm_start": first.value.adapter})))

    def end() -> None:
        assert lab.checkpoint_steps(job.id) == [4, 12, 16]
        assert waiting[0].spec.warm_start is not None
        fetch_adapter(lab.store.blobs, waiting[0].spec.warm_start, tmp_path / "cache")
        lab.change_job(waiting[0].id, state="cancelled")

    at_step(6, wait)
    at_step(17, end)
    assert run_attempt(lab.settings, job.id, 1) == "published"
    assert lab.checkpoint_steps(job.id) == [20, 24]


def test_the_steps_before_a_state_are_told_before_it_is_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    job = lab.add_job(options=TrainOptions(rank=4, precision="fp32", checkpoint_every_steps=5))
    keep, told = Checkpoints.save, []

    def save(self: Checkpoints, step: int, *arguments: Any) -> Path:
        told.append((step, lab.steps(job.id)))
        return keep(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", save)
    run_attempt(lab.settings, job.id, 1)

    assert told == [(step, list(range(1, step + 1))) for step in (5, 6, 10, 12)]


def test_publishing_twice_changes_nothing(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = lab.add_job()

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("tuneloom.train.publish.write_manifest", die)
        with pytest.raises(Killed):
            run(lab, job.id)
    assert lab.store.blobs.list(f"{job.artifacts}/adapter")

    assert run(lab, job.id) == "published"
    first = final_adapter(lab, job.id, tmp_path)
    assert run(lab, job.id) == "published"
    assert final_adapter(lab, job.id, tmp_path) == first


def test_options_have_their_effect(lab: Lab, tmp_path: Path) -> None:
    options = TrainOptions(rank=2, alpha=3.0, target_modules=("q_proj", "down_proj"), precision="bf16")
    job = lab.add_job(options=options, n_epochs=1)
    assert run(lab, job.id) == "published", lab.progress(job.id).error
    manifest = read_manifest(lab.store.blobs, job.artifacts)
    assert manifest is not None
    folder = fetch_adapter(lab.store.blobs, manifest.adapter, tmp_path / "cache")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 3.0, ["down_proj", "q_proj"])
    assert config["base_model_name_or_path"] == BASE_ID
    weights = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert {name.split(".")[-3] for name in weights} == {"q_proj", "down_proj"}


def test_each_step_tells_how_it_learns_and_what_it_takes(lab: Lab) -> None:
    job = lab.add_job(n_epochs=1)
    run(lab, job.id)

    data = [event.data for event in lab.events(job.id) if event.type == "metrics"]
    assert [each["learning_rate"] for each in data if each] == pytest.approx(
        [5e-3 * (6 - step) / 6 for step in range(6)]
    )
    for each in data:
        assert each is not None
        assert min(each["grad_norm"], each["tokens_per_second"]) > 0
        assert 50 << 20 < each["memory_bytes"] < 1 << 40
        assert abs(each["estimated_finish"] - time.time()) < 600
    progress = lab.progress(job.id)
    assert {"learning_rate", "batch_size"} <= {setting.name for setting in progress.settings}
    assert progress.memory_bytes >= 50 << 20


def test_seconds_and_memory_count_over_all_attempts(lab: Lab, at_step: Schedule) -> None:
    job = lab.add_job()
    at_step(2, lambda: lab.change_job(job.id, state="paused") and None)
    run(lab, job.id)
    first = lab.progress(job.id)
    assert 0 < first.seconds < 600
    lab.next_attempt(job.id)
    run(lab, job.id)
    assert lab.progress(job.id).seconds > first.seconds
    assert lab.progress(job.id).memory_bytes >= first.memory_bytes


def test_a_cancelled_job_stops_at_the_step_and_leaves_nothing_behind(lab: Lab, at_step: Schedule) -> None:
    job = lab.add_job()
    at_step(5, lambda: lab.change_job(job.id, state="cancelled") and None)

    assert run(lab, job.id) == "cancelled"
    assert (lab.progress(job.id).outcome, lab.progress(job.id).step) == ("cancelled", 5)
    assert read_manifest(lab.store.blobs, job.artifacts) is None
    assert not run_folder(lab.settings, job.id).exists()


def test_a_job_cancelled_before_it_starts_never_loads_the_base(lab: Lab) -> None:
    job = lab.add_job(state="cancelled")
    get_base(lab.settings.bases_dir, BASE_ID).path.joinpath("model.safetensors").unlink()
    assert run(lab, job.id) == "cancelled"


def test_a_cancel_takes_effect_between_two_forward_passes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuneloom.train.lora import LoraTrainer

    job = lab.add_job(options=TrainOptions(rank=4, precision="fp32", accumulation_steps=4))
    original, passes = LoraTrainer.compute_loss, []

    def compute_loss(self: LoraTrainer, *arguments: Any, **names: Any) -> Any:
        passes.append(self.state.global_step)
        if passes.count(2) == 1:
            lab.change_job(job.id, state="cancelled")
            # The pulse looks each second.
            time.sleep(3)
        return original(self, *arguments, **names)

    monkeypatch.setattr(LoraTrainer, "compute_loss", compute_loss)
    assert run(lab, job.id) == "cancelled"
    assert min(passes.count(0), passes.count(1)) > 1
    assert (passes.count(2), max(passes)) == (1, 2)


def test_an_attempt_that_was_replaced_writes_nothing_more(lab: Lab, at_step: Schedule) -> None:
    job = lab.add_job()
    at_step(5, lambda: lab.next_attempt(job.id) and None)

    assert run_attempt(lab.settings, job.id, 1) == "fenced"
    assert max(lab.steps(job.id), default=0) <= 5
    assert lab.progress(job.id).outcome is None
    assert read_manifest(lab.store.blobs, job.artifacts) is None
    assert run(lab, job.id) == "published"
    assert lab.steps(job.id) == list(range(1, 13))
