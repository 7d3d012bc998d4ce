import json
from pathlib import Path

import pytest

from tests.train.conftest import BASE_ID, Lab, colour_rows
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
    prepared = by_hand.prepare(lab.settings, asked)
    assert lab.store.records.jobs.query() == []

    job = by_hand.create(lab.store, prepared)

    stored = lab.store.records.jobs.get(job.id).value
    assert (stored.owner, stored.state, stored.attempt, stored.attempt_open) == ("ada", "queued", 1, True)
    assert stored.self_launched and stored.files_checked
    assert (stored.spec.suffix, stored.spec.hyperparameters.n_epochs) == ("support-bot", 2)
    file = lab.store.records.files.get(stored.spec.training_file).value
    assert lab.store.blobs.read(file.blob) == (tmp_path / "rows.jsonl").read_bytes()
    assert lab.progress(job.id).attempt == 1


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--epochs", "0"], "`--epochs` is 0; it must be from 1 to 50."),
        (["--rank", "500"], "`--rank`"),
        (["--model", "Bad Name"], "Invalid `--model`"),
        (["--base", "no/such"], "`no/such` does not exist"),
        (["--data", "absent.jsonl"], "`absent.jsonl` cannot be read"),
    ],
)
def test_a_wrong_argument_is_named_and_makes_nothing(lab: Lab, tmp_path: Path, more: list[str], reason: str) -> None:
    asked = by_hand.parse(arguments(write(tmp_path / "rows.jsonl"), *more))
    with pytest.raises(TuneloomError) as caught:
        by_hand.prepare(lab.settings, asked)
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
