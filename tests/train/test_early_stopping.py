"""Runs that end before their last step, since validation says so."""

from pathlib import Path

import pytest

from tests.train.conftest import (
    ODD_ROWS,
    Killed,
    Lab,
    Schedule,
    final_adapter,
    messages,
    run,
    valid_losses,
)
from tuneloom.domain import TrainOptions
from tuneloom.store.artifacts import fetch_adapter, read_manifest

STOPPING = TrainOptions(
    rank=4,
    precision="fp32",
    learning_rate=2e-2,
    evaluate_every_steps=2,
    early_stopping_patience=2,
    checkpoint_every_steps=2,
)


def test_a_run_that_gets_worse_stops_early_and_hands_over_its_best_adapter(lab: Lab, tmp_path: Path) -> None:
    lab.settings = lab.settings.model_copy(
        update={"train": lab.settings.train.model_copy(update={"checkpoints_kept": 3})}
    )
    job = lab.add_job(validation=ODD_ROWS, options=STOPPING, n_epochs=20)

    assert run(lab, job.id) == "published", lab.progress(job.id).error

    losses = valid_losses(lab, job.id)
    best, last = min(losses, key=losses.__getitem__), max(losses)
    assert last == best + 4 == lab.progress(job.id).step < 120
    assert any(text.startswith(f"Training stops early at step {last}") for text in messages(lab, job.id))
    manifest = read_manifest(lab.store.blobs, job.artifacts)
    assert manifest is not None
    assert (manifest.steps, manifest.metrics["step"], manifest.metrics["valid_loss"]) == (last, best, losses[best])
    kept = {s.value.step: s.value.adapter for s in lab.store.records.checkpoints.query({"job_id": job.id})}
    folder = fetch_adapter(lab.store.blobs, kept[best], tmp_path / "kept")
    assert (folder / "adapter_model.safetensors").read_bytes() == final_adapter(lab, job.id, tmp_path)


def test_a_killed_run_stops_early_at_the_same_step_with_the_same_adapter(
    lab: Lab, tmp_path: Path, at_step: Schedule
) -> None:
    whole, broken = (lab.add_job(validation=ODD_ROWS, options=STOPPING, n_epochs=20) for _ in range(2))
    run(lab, whole.id)
    end = lab.progress(whole.id).step

    def kill() -> None:
        raise Killed

    at_step(end - 1, kill)
    with pytest.raises(Killed):
        run(lab, broken.id)
    lab.next_attempt(broken.id)
    assert run(lab, broken.id) == "published"

    assert valid_losses(lab, broken.id) == valid_losses(lab, whole.id)
    assert final_adapter(lab, broken.id, tmp_path) == final_adapter(lab, whole.id, tmp_path)
