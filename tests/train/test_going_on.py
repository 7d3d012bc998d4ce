"""Runs that were interrupted: the next attempt goes on, to the same end."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import (
    ODD_ROWS,
    Killed,
    Lab,
    Schedule,
    colour_rows,
    final_adapter,
    messages,
    run,
    valid_losses,
)
from tuneloom.domain import TrainOptions
from tuneloom.train.attempt import run_attempt
from tuneloom.train.folders import run_folder, stop_file


@pytest.mark.parametrize(
    "more",
    [
        {"packing": False},
        {"packing": True},
        {"quantization": "nf4"},
        {"quantization": "int8", "accumulation_steps": 2},
        {"precision": "bf16", "scheduler": "cosine", "rslora": True},
    ],
    ids=lambda more: ",".join(f"{name}={value}" for name, value in more.items()),
)
def test_a_killed_run_goes_on_to_the_very_same_adapter(
    lab: Lab, tmp_path: Path, at_step: Schedule, more: dict[str, Any]
) -> None:
    options = TrainOptions(**{"rank": 4, "precision": "fp32", "dropout": 0.1, "checkpoint_every_steps": 4, **more})
    # Evaluations too, after which a run must be as if there had been none.
    whole, broken = (lab.add_job(validation=colour_rows(6), options=options) for _ in range(2))
    run_attempt(lab.settings, whole.id, 1)

    def kill() -> None:
        raise Killed

    at_step(7, kill)
    with pytest.raises(Killed):
        run_attempt(lab.settings, broken.id, 1)
    assert lab.progress(broken.id).outcome is None
    lab.next_attempt(broken.id)
    assert run(lab, broken.id) == "published"

    assert lab.losses(broken.id) == lab.losses(whole.id)
    assert lab.steps(broken.id) == list(range(1, 13))
    assert final_adapter(lab, broken.id, tmp_path) == final_adapter(lab, whole.id, tmp_path)
    assert lab.checkpoint_steps(broken.id) == [8, 12]


@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_a_damaged_state_is_passed_over_for_the_one_before(lab: Lab, at_step: Schedule, damage: str) -> None:
    job = lab.add_job(options=TrainOptions(rank=4, precision="fp32", checkpoint_every_steps=2))

    def kill() -> None:
        raise Killed

    at_step(5, kill)
    with pytest.raises(Killed):
        run(lab, job.id)
    newest = run_folder(lab.settings, job.id) / "checkpoints" / "step-00000004"
    file = newest / "optimizer.pt"
    if damage == "gone":
        (newest / "checkpoint.json").unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    lab.next_attempt(job.id)

    assert run(lab, job.id) == "published"
    assert "Training goes on from the checkpoint at step 2" in [event.message for event in lab.events(job.id)]
    assert lab.steps(job.id) == list(range(1, 13))


def test_a_pause_takes_effect_at_the_step_and_the_job_goes_on_from_there(
    lab: Lab, tmp_path: Path, at_step: Schedule
) -> None:
    whole, paused = lab.add_job(), lab.add_job()
    run(lab, whole.id)
    at_step(5, lambda: lab.change_job(paused.id, state="paused") and None)

    assert run(lab, paused.id) == "paused"
    assert (lab.progress(paused.id).outcome, lab.progress(paused.id).step) == ("paused", 5)
    assert lab.checkpoint_steps(paused.id) == [5]
    lab.next_attempt(paused.id)
    assert run(lab, paused.id) == "published"

    assert lab.losses(paused.id) == lab.losses(whole.id)
    assert final_adapter(lab, paused.id, tmp_path) == final_adapter(lab, whole.id, tmp_path)


def test_a_pause_cuts_an_evaluation_off_which_is_made_up_for(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneloom.train.lora import LoraTrainer

    whole, paused = (lab.add_job(validation=ODD_ROWS) for _ in range(2))
    run(lab, whole.id)
    original = LoraTrainer.score
    wanted: list[bool] = []

    def score(self: LoraTrainer, tokens: Any, size: int, is_wanted: Callable[[], bool]) -> Any:
        if not wanted:
            lab.change_job(paused.id, state="paused")
            deadline = time.monotonic() + 60
            while is_wanted() and time.monotonic() < deadline:
                time.sleep(0.05)
        wanted.append(is_wanted())
        return original(self, tokens, size, is_wanted)

    monkeypatch.setattr(LoraTrainer, "score", score)
    assert run(lab, paused.id) == "paused"
    assert lab.steps(paused.id) == list(range(1, 6)), "the step is told with its evaluation"
    assert lab.checkpoint_steps(paused.id) == []
    lab.next_attempt(paused.id)
    assert run(lab, paused.id) == "published", lab.progress(paused.id).error

    assert wanted == [False, True, True]
    assert lab.steps(paused.id) == list(range(1, 13))
    assert valid_losses(lab, paused.id) == valid_losses(lab, whole.id)
    assert lab.losses(paused.id) == lab.losses(whole.id)
    assert final_adapter(lab, paused.id, tmp_path) == final_adapter(lab, whole.id, tmp_path)
    kept = lab.store.records.checkpoints.query({"job_id": paused.id})
    assert all("valid_loss" in stored.value.metrics for stored in kept)


def test_a_process_told_to_end_saves_its_state_and_has_no_last_word(lab: Lab, at_step: Schedule) -> None:
    job = lab.add_job()
    at_step(3, stop_file(lab.settings, job.id, 1).touch)

    assert run(lab, job.id) == "stopped"
    assert lab.progress(job.id).outcome is None
    lab.next_attempt(job.id)
    assert run(lab, job.id) == "published"
    assert "Training goes on from the checkpoint at step 3" in [event.message for event in lab.events(job.id)]


def test_a_run_whose_machine_is_gone_goes_on_from_the_stored_state(lab: Lab, tmp_path: Path, at_step: Schedule) -> None:
    lab.settings = lab.settings.model_copy(
        update={"train": lab.settings.train.model_copy(update={"upload_states": True})}
    )
    options = TrainOptions(rank=4, precision="fp32", dropout=0.1, checkpoint_every_steps=2)
    whole, broken = lab.add_job(options=options), lab.add_job(options=options)
    run(lab, whole.id)

    def lose() -> None:
        assert {blob.key.split("/")[3] for blob in lab.store.blobs.list(f"jobs/{broken.id}/states")} == {
            "step-00000004",
            "step-00000006",
        }
        shutil.rmtree(run_folder(lab.settings, broken.id))
        raise Killed

    at_step(7, lose)
    with pytest.raises(Killed):
        run(lab, broken.id)
    lab.next_attempt(broken.id)
    assert run(lab, broken.id) == "published"

    assert "Training goes on from the checkpoint at step 6" in messages(lab, broken.id)
    assert lab.losses(broken.id) == lab.losses(whole.id)
    assert final_adapter(lab, broken.id, tmp_path) == final_adapter(lab, whole.id, tmp_path)
    assert lab.store.blobs.list(f"jobs/{broken.id}/states") == []


def test_states_stay_on_the_machine_where_blobs_do(lab: Lab, at_step: Schedule) -> None:
    job = lab.add_job()
    at_step(5, lambda: lab.change_job(job.id, state="paused") and None)
    run(lab, job.id)
    assert lab.store.blobs.list(f"jobs/{job.id}/states") == []


def test_a_node_that_is_taken_away_saves_and_asks_for_the_next_attempt(
    lab: Lab, tmp_path: Path, at_step: Schedule
) -> None:
    whole, moved = lab.add_job(), lab.add_job()
    run(lab, whole.id)
    notice = threading.Event()
    at_step(3, notice.set)

    assert run_attempt(lab.settings, moved.id, 1, notice) == "stopped"
    # The word of a pause, while the job is to run: control starts it again and counts no loss.
    assert (lab.progress(moved.id).outcome, lab.checkpoint_steps(moved.id)) == ("paused", [3])
    assert any("about to be taken away; saved at step 3" in text for text in messages(lab, moved.id))
    lab.next_attempt(moved.id)
    assert run(lab, moved.id) == "published"
    assert final_adapter(lab, moved.id, tmp_path) == final_adapter(lab, whole.id, tmp_path)
