import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import BASE_ID, Lab, colour_rows
from tuneloom.bases import get_base
from tuneloom.domain import Job, TrainOptions
from tuneloom.store.artifacts import fetch_adapter, read_manifest
from tuneloom.train.attempt import run_attempt
from tuneloom.train.checkpoints import Checkpoints
from tuneloom.train.folders import run_folder, stop_file

Schedule = Callable[[int, Callable[[], None]], None]


class Killed(BaseException):
    """Stands for a death that no handler sees."""


def run(lab: Lab, job_id: str) -> str:
    """Run the job's current attempt."""
    return run_attempt(lab.settings, job_id, lab.store.records.jobs.get(job_id).value.attempt)


def final_adapter(lab: Lab, job_id: str, tmp_path: Path) -> bytes:
    job = lab.store.records.jobs.get(job_id).value
    manifest = read_manifest(lab.store.blobs, job.artifacts)
    assert manifest is not None
    return (
        fetch_adapter(lab.store.blobs, manifest.adapter, tmp_path / "cache") / "adapter_model.safetensors"
    ).read_bytes()


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


def test_a_process_told_to_end_saves_its_state_and_has_no_last_word(lab: Lab, at_step: Schedule) -> None:
    job = lab.add_job()
    at_step(3, stop_file(lab.settings, job.id, 1).touch)

    assert run(lab, job.id) == "stopped"
    assert lab.progress(job.id).outcome is None
    lab.next_attempt(job.id)
    assert run(lab, job.id) == "published"
    assert "Training goes on from the checkpoint at step 3" in [event.message for event in lab.events(job.id)]


def test_an_attempt_that_was_replaced_writes_nothing_more(lab: Lab, at_step: Schedule) -> None:
    job = lab.add_job()
    at_step(5, lambda: lab.next_attempt(job.id) and None)

    assert run_attempt(lab.settings, job.id, 1) == "fenced"
    assert max(lab.steps(job.id), default=0) <= 5
    assert lab.progress(job.id).outcome is None
    assert read_manifest(lab.store.blobs, job.artifacts) is None
    assert run(lab, job.id) == "published"
    assert lab.steps(job.id) == list(range(1, 13))


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


def messages(lab: Lab, job_id: str) -> list[str]:
    return [event.message for event in lab.events(job_id)]


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


# Answers of the validation rows are never those that are learned, so that their loss soon rises.
ODD_ROWS = [{"messages": [row["messages"][0], {"role": "assistant", "content": "maybe"}]} for row in colour_rows(6)]
STOPPING = TrainOptions(
    rank=4,
    precision="fp32",
    learning_rate=2e-2,
    evaluate_every_steps=2,
    early_stopping_patience=2,
    checkpoint_every_steps=2,
)


def valid_losses(lab: Lab, job_id: str) -> dict[int, float]:
    data = [event.data or {} for event in lab.events(job_id) if event.type == "metrics"]
    return {each["step"]: each["valid_loss"] for each in data if "valid_loss" in each}


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


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the allocator fail, truly, in forward passes of more rows."""
    from tuneloom.train.lora import LoraTrainer

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
    from tuneloom.train.lora import LoraTrainer

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
