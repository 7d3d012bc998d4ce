import json
from pathlib import Path

import pytest

from tests.train.conftest import BASE_ID, Lab, colour_rows
from tuneloom.config import BaseSettings
from tuneloom.domain import Model, TrainOptions, model_id
from tuneloom.errors import TuneloomError
from tuneloom.train import by_hand
from tuneloom.train.__main__ import main


def write(path: Path, count: int = 12) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in colour_rows(count)))
    return path


def arguments(data: Path, *more: str) -> list[str]:
    return ["--base", BASE_ID, "--data", str(data), "--model", "support-bot", *more]


def test_good_data_becomes_a_job_that_control_adopts(lab: Lab, tmp_path: Path) -> None:
    asked = by_hand.parse(arguments(write(tmp_path / "rows.jsonl"), "--epochs", "2", "--owner", "ada"))
    prepared = by_hand.prepare(lab.settings, lab.store, asked)
    assert lab.store.records.jobs.query() == []

    job = by_hand.create(lab.store, prepared)

    stored = lab.store.records.jobs.get(job.id).value
    assert (stored.owner, stored.state, stored.attempt, stored.attempt_open) == ("ada", "queued", 1, True)
    assert stored.self_launched and stored.files_checked
    assert (stored.spec.suffix, stored.spec.hyperparameters.n_epochs) == ("support-bot", 2)
    file = lab.store.records.files.get(stored.spec.training_file).value
    assert lab.store.blobs.read(file.blob) == (tmp_path / "rows.jsonl").read_bytes()
    assert lab.progress(job.id).attempt == 1
    (told,) = [entry.value for entry in lab.store.records.audit_entries.query({"owner": "ada"})]
    assert (told.action, told.actor.kind, told.target.id) == ("fine_tuning.job.created", "cli", job.id)
    assert told.data == {"model": BASE_ID, "training_file": file.id, "method": "supervised"}


def test_every_setting_has_a_flag(lab: Lab, tmp_path: Path) -> None:
    given = {
        "preset": "quick",
        "rank": "4",
        "alpha": "8",
        "dropout": "0.1",
        "target_modules": ["q_proj", "v_proj"],
        "rslora": None,
        "learning_rate": "1e-3",
        "scheduler": "cosine",
        "warmup_steps": "1",
        "weight_decay": "0.1",
        "max_grad_norm": "2",
        "accumulation_steps": "2",
        "max_length": "128",
        "long_rows": "cut",
        "packing": "false",
        "precision": "fp32",
        "quantization": "nf4",
        "loss_on": "all",
        "evaluate_every_steps": "3",
        "early_stopping_patience": "2",
        "early_stopping_min_delta": "0.01",
        "validation_share": "0.25",
        "checkpoint_every_steps": "5",
        "checkpoint_every_minutes": "1.5",
    }
    assert given.keys() == TrainOptions.model_fields.keys() - {"warm_start", "modules_to_save"}
    flags = []
    for name, value in given.items():
        flags += [by_hand.flag(name), *([] if value is None else value if isinstance(value, list) else [value])]
    asked = by_hand.parse(arguments(write(tmp_path / "rows.jsonl", 20), "--learning-rate-multiplier", "2", *flags))

    spec = by_hand.prepare(lab.settings, lab.store, asked).job.spec

    assert spec.options == TrainOptions.model_validate({**given, "rslora": True})
    assert (spec.options.packing, spec.options.rslora, spec.options.alpha) == (False, True, 8.0)
    assert spec.hyperparameters.learning_rate_multiplier == 2


def test_preferences_are_a_method_with_a_beta(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {
        "input": {"messages": [{"role": "user", "content": "red?"}]},
        "preferred_output": [{"role": "assistant", "content": "yes"}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }
    path.write_text("\n".join(json.dumps(row) for _ in range(12)))
    asked = by_hand.parse(arguments(path, "--method", "dpo", "--beta", "0.2"))
    spec = by_hand.prepare(lab.settings, lab.store, asked).job.spec
    assert (spec.method, spec.hyperparameters.beta) == ("dpo", 0.2)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--epochs", "0"], "`--epochs` is 0; it must be from 1 to 50."),
        (["--rank", "500"], "`--rank`"),
        (["--model", "Bad Name"], "Invalid `--model`"),
        (["--scheduler", "square"], "`--scheduler`: Input should be 'linear', 'cosine' or 'constant'."),
        (["--learning-rate", "fast"], "`--learning-rate`: Input should be a valid number"),
        (["--beta", "0.2"], "`--beta` needs `--method dpo`."),
        (["--method", "dpo", "--beta", "3"], "`--beta` is 3; it must be from 1e-06 to 2."),
        (
            ["--batch-size", "6", "--accumulation-steps", "4"],
            "`--accumulation-steps` 4 does not divide",
        ),
        (["--early-stopping-patience", "2"], "`--early-stopping-patience` needs rows to validate on."),
        (["--warm-start", "nobody@v1"], "`--warm-start`: there is no version or checkpoint `nobody@v1`."),
        (["--base", "no/such"], "`no/such` does not exist"),
        (["--data", "absent.jsonl"], "`absent.jsonl` cannot be read"),
        (["--data", "/dev/null"], "`/dev/null` is no file"),
        (["--rank", "65"], "`--rank`: 65 is above the largest rank that is served: 64."),
        (["--model", "gpt-old"], "`gpt-old` is the name of a base model. Choose another `--model`."),
        (["--model", "elsewhere"], "The model `elsewhere` is on the base `tiny/other`, not `tiny/llama`."),
    ],
)
def test_a_wrong_argument_is_named_and_makes_nothing(lab: Lab, tmp_path: Path, more: list[str], reason: str) -> None:
    lab.settings = lab.settings.model_copy(
        update={"bases": (BaseSettings(id=BASE_ID),), "base_aliases": {"gpt-old": BASE_ID}}
    )
    other = Model(id=model_id("local", "elsewhere"), owner="local", name="elsewhere", base="tiny/other", created_at=1.0)
    lab.store.records.commit(lab.store.records.models.create(other))
    asked = by_hand.parse(arguments(write(tmp_path / "rows.jsonl"), *more))
    with pytest.raises(TuneloomError) as caught:
        by_hand.prepare(lab.settings, lab.store, asked)
    assert reason in str(caught.value)


def test_bad_rows_end_the_program_with_their_lines(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl")
    data.write_text(data.read_text() + '\noops\n{"messages": []}\n')
    monkeypatch.setenv("TUNELOOM_HOME", str(lab.settings.home))
    assert main(arguments(data)) == 1
    output = capsys.readouterr().out
    assert "line 13: Not JSON" in output and "line 14: `messages` is empty" in output
    assert lab.store.records.jobs.query() == []


def test_without_a_cluster_nothing_is_made(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNELOOM_HOME", str(lab.settings.home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(arguments(write(tmp_path / "rows.jsonl"))) == 1
    assert "ray job submit" in capsys.readouterr().out
    assert lab.store.records.jobs.query() == []
    assert list((lab.settings.home / "runs").iterdir()) == []


def test_waiting_for_the_version_has_an_end(lab: Lab) -> None:
    job = lab.add_job()
    with pytest.raises(TuneloomError, match="nobody has registered it"):
        by_hand.wait_for_version(lab.store, job.id, timeout_s=0.1)
