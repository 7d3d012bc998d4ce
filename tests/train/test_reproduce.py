"""`tuneloom reproduce`, whatever the run was like that is repeated."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lineages import CONFIG, Control, register
from tests.test_cli import Shell
from tests.train.conftest import WORDS, Killed, Lab, Schedule, colour_rows
from tests.train.test_dpo import preference_rows
from tuneloom import config
from tuneloom.bases import get_base
from tuneloom.cli import reproduce as commands
from tuneloom.domain import TrainOptions, new_id
from tuneloom.train.attempt import run_attempt

FAST: dict[str, Any] = {"n_epochs": 1, "options": TrainOptions(rank=4, learning_rate=5e-3, precision="fp32")}


@pytest.fixture
def lab(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Of which the command believes that it runs."""
    (lab.settings.home / "config.yaml").write_text(CONFIG)
    lab.settings = config.load(lab.settings.home)
    monkeypatch.setattr(commands, "Api", lambda settings: None)
    return lab


@pytest.fixture
def shell(lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(lab.settings.home, capsys, monkeypatch)


def finish(lab: Lab, job_id: str) -> None:
    """Run the job's attempt, and make a version of what it trains."""
    attempt = lab.store.records.jobs.get(job_id).value.attempt
    assert run_attempt(lab.settings, job_id, attempt) == "published", lab.progress(job_id).error
    register(lab, job_id)


def check_identical(shell: Shell, name: str = "colours") -> None:
    with Control(shell.home) as control:
        assert shell("reproduce", name) == 0, shell.out + shell.err
        assert control.results == ["published"]
    assert "identical: adapter " in shell.out and "same machine, packages and code" in shell.out


def test_the_same_adapter_comes_again_and_leaves_no_model(lab: Lab, shell: Shell) -> None:
    finish(lab, lab.add_job(colour_rows(12), **FAST).id)
    check_identical(shell)
    assert "Step 3/3" in shell.out
    assert shell("models", "list") == 0
    assert "colours@v1 *" in shell.out and "reproduce" not in shell.out
    assert " of 0.01 " in shell.out, "the list tells of the fidelity"
    assert len(shell.out.splitlines()) == 2


def test_a_killed_run_whose_passes_do_not_divide_its_steps_comes_again(
    lab: Lab, shell: Shell, at_step: Schedule
) -> None:
    """Rows so long that five of them take two passes, held-out rows, dropout, and the best state of all."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "red green blue " * (50 + number % 9)},
                {"role": "assistant", "content": WORDS[number % 3]},
            ]
        }
        for number in range(20)
    ]
    options = TrainOptions(
        rank=4,
        learning_rate=2e-2,
        precision="fp32",
        dropout=0.1,
        validation_share=0.2,
        evaluate_every_steps=2,
        early_stopping_patience=1,
        checkpoint_every_steps=2,
    )
    job = lab.add_job(rows, options=options, batch_size=5, n_epochs=6)

    def kill() -> None:
        raise Killed

    at_step(3, kill)
    with pytest.raises(Killed):
        run_attempt(lab.settings, job.id, 1)
    lab.next_attempt(job.id)
    finish(lab, job.id)

    settings = {setting.name: setting.value for setting in lab.progress(job.id).settings}
    assert settings["batch_size"] % settings["accumulation_steps"]
    check_identical(shell)


def test_a_paused_run_on_preferences_from_a_warm_start_comes_again(lab: Lab, shell: Shell, at_step: Schedule) -> None:
    """Also when the name that it started from calls something else by then."""
    finish(lab, lab.add_job(colour_rows(12), **FAST).id)
    start = lab.store.records.versions.query({})[0].value.adapter
    job = lab.add_job(preference_rows(12), options=TrainOptions(precision="fp32", warm_start="colours"))
    spec = job.spec.model_copy(update={"method": "dpo", "warm_start": start})
    lab.change_job(job.id, spec=spec)
    at_step(2, lambda: lab.change_job(job.id, state="paused") and None)
    assert run_attempt(lab.settings, job.id, 1) == "paused"
    lab.next_attempt(job.id)
    finish(lab, job.id)
    assert shell("models", "activate", "colours@v2") == 0

    check_identical(shell)


def test_a_run_that_was_cut_down_from_its_start_comes_again_as_it_was(lab: Lab, shell: Shell) -> None:
    """Memory had room for three rows of nine: the repetition takes three, too, though there is room."""
    job = lab.add_job(colour_rows(18), options=FAST["options"], n_epochs=1, batch_size=9)
    lab.change_job(job.id, spec=job.spec.model_copy(update={"micro_size": 4}))
    finish(lab, job.id)
    settings = {setting.name: setting.value for setting in lab.progress(job.id).settings}
    assert settings["accumulation_steps"] == 3
    # As if memory had cut it down.
    check_identical(shell)
    (copy,) = [stored.value for stored in lab.store.records.jobs.query({}) if stored.value.id != job.id]
    again = {setting.name: setting.value for setting in lab.progress(copy.id).settings}
    assert again["accumulation_steps"] == 3


def test_data_that_was_uploaded_anew_serves_as_well(lab: Lab, shell: Shell) -> None:
    job = lab.add_job(colour_rows(12), **FAST)
    finish(lab, job.id)
    files = lab.store.records.files
    old = files.get(job.spec.training_file)
    moved = {"id": new_id("file-"), "filename": "again.jsonl"}
    lab.store.records.commit(files.delete(old), files.create(old.value.model_copy(update={**moved, "owner": "ada"})))
    assert shell("reproduce", "colours") == 1
    assert "Upload it again" in shell.err and moved["id"] not in shell.err, "another owner's file is none"
    moved["id"] = new_id("file-")
    lab.store.records.commit(files.create(old.value.model_copy(update=moved)))
    check_identical(shell)


def test_what_differs_is_named_and_the_copy_is_removed(lab: Lab, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuneloom.train import lineage
    from tuneloom.train import models as train_models

    finish(lab, lab.add_job(colour_rows(12), **FAST).id)
    save = train_models.save_adapter

    def changed(model: Any, folder: Path, base_id: str) -> None:
        save(model, folder, base_id)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": "0"}))

    monkeypatch.setattr(train_models, "save_adapter", changed)
    monkeypatch.setattr(lineage, "package_versions", lambda: {"torch": "0.0"})
    with Control(shell.home):
        assert shell("reproduce", "colours@v1") == 1
    assert "different: adapter " in shell.out and "package torch: " in shell.out and "0.0 now" in shell.out
    assert shell("models", "list") == 0 and "reproduce" not in shell.out


def test_nothing_is_trained_where_it_could_not_be_the_same(
    lab: Lab, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lab.add_job(colour_rows(12), **FAST)
    finish(lab, job.id)

    def states() -> list[str]:
        return sorted(stored.value.state for stored in lab.store.records.jobs.query({}))

    path = get_base(lab.settings.bases_dir, job.spec.base).path / "chat_template.jinja"
    template = path.read_bytes()
    path.write_bytes(template.replace(b"user", b"usr") + b" ")
    assert shell("reproduce", "colours") == 1
    assert "something else than is here now: base chat_template.jinja: " in shell.err
    path.write_bytes(template)
    file = lab.store.records.files.get(job.spec.training_file)
    lab.store.blobs.delete(file.value.blob)
    lab.store.blobs.write(file.value.blob, b"{}")
    assert shell("reproduce", "colours") == 1 and "here now: file rows.jsonl: " in shell.err
    lab.store.records.commit(lab.store.records.files.delete(file))
    assert shell("reproduce", "colours") == 1 and "Upload it again" in shell.err
    assert shell("verify", "colours") == 0 and "--    training file" in shell.out
    monkeypatch.undo()
    assert shell("reproduce", "colours") in (1, 3)
    assert states() == ["succeeded"]


def test_a_job_that_does_not_end_is_cancelled(lab: Lab, shell: Shell) -> None:
    finish(lab, lab.add_job(colour_rows(12), **FAST).id)
    assert shell("reproduce", "colours", "--timeout", "0.0003") == 1
    assert "did not end within" in shell.err
    states = {stored.value.state for stored in lab.store.records.jobs.query({})}
    assert states == {"succeeded", "cancelled"}


def test_an_imported_adapter_is_not_reproduced(lab: Lab, shell: Shell, tiny_adapters: list[Path]) -> None:
    assert shell("models", "import", str(tiny_adapters[0]), "--name", "bot") == 0
    assert shell("reproduce", "bot") == 1 and "It has no lineage" in shell.err
