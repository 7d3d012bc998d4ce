import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.train.conftest import Lab, colour_rows
from tuneloom.domain import Job, TrainOptions
from tuneloom.train.attempt import run_attempt, run_folder
from tuneloom.train.check import check_job


def checked(lab: Lab, job: Job) -> dict[str, Any]:
    return check_job(lab.settings, lab.store, job.id).as_json()


def test_the_command_prints_its_report_on_the_last_line(lab: Lab) -> None:
    job = lab.add_job(colour_rows(12))
    environment = {**os.environ, "TUNELOOM_HOME": str(lab.settings.home), "TUNELOOM_JOB": job.id}
    command = [sys.executable, "-m", "tuneloom.train.check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["ok"], report["error"], report["problems"], report["rows"]) == (True, None, [], 12)
    assert report["tokens"] > 12 * 10


def test_every_bad_line_is_listed_and_the_error_names_the_first(lab: Lab) -> None:
    rows = [json.dumps(row) for row in colour_rows(12)]
    rows[3] = "oops"
    rows[8] = json.dumps({"messages": [{"role": "robot", "content": "x"}]})
    report = checked(lab, lab.add_job("\n".join(rows).encode()))
    assert not report["ok"]
    assert [(problem["param"], problem["line"]) for problem in report["problems"]] == [
        ("training_file", 4),
        ("training_file", 9),
    ]
    assert report["error"]["code"] == "invalid_training_file"
    assert report["error"]["param"] == "training_file"
    assert "line 4: Not JSON" in report["error"]["message"] and "`robot`" in report["error"]["message"]


def test_a_row_longer_than_the_context_is_named_with_its_tokens_and_the_limit(lab: Lab) -> None:
    rows = colour_rows(12)
    rows[5] = {"messages": [{"role": "user", "content": "red " * 600}, {"role": "assistant", "content": "no"}]}
    (problem,) = checked(lab, lab.add_job(rows))["problems"]
    assert problem["line"] == 6
    assert "the limit is 512" in problem["message"] and "tokens" in problem["message"]


def test_the_limit_is_that_of_the_job_where_it_sets_one(lab: Lab) -> None:
    options = TrainOptions(max_length=24)
    messages = [problem["message"] for problem in checked(lab, lab.add_job(options=options))["problems"]]
    assert messages and all("the limit is 24" in message for message in messages)


def test_a_validation_file_is_checked_too_and_may_be_short(lab: Lab) -> None:
    assert checked(lab, lab.add_job(validation=colour_rows(1)))["ok"]
    report = checked(lab, lab.add_job(validation=[{"text": 1}]))
    assert [(problem["param"], problem["line"]) for problem in report["problems"]] == [("validation_file", 1)]
    assert report["error"]["param"] == "validation_file"


def test_too_few_rows_and_a_file_that_is_gone_are_errors(lab: Lab) -> None:
    assert "at least 10" in checked(lab, lab.add_job(colour_rows(9)))["error"]["message"]
    job = lab.add_job()
    lab.store.records.commit(lab.store.records.files.delete(lab.store.records.files.get(job.spec.training_file)))
    assert checked(lab, job)["error"]["code"] == "file_not_found"


def test_a_foreign_file_looks_like_one_that_is_gone(lab: Lab) -> None:
    foreign = lab.add_file(colour_rows(12), owner="eve")
    job = lab.add_job()
    job = lab.change_job(job.id, spec=job.spec.model_copy(update={"training_file": foreign.id}))
    report = checked(lab, job)
    assert report["error"]["code"] == "file_not_found"
    assert report["error"]["message"] == f"The file `{foreign.id}` is gone. Upload it again."


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "red green", "completion": " blue"},
        {"instruction": "red", "input": "green", "output": "blue"},
        {"input": "red", "output": "blue"},
        {"text": "red green blue"},
    ],
)
def test_every_format_is_counted(lab: Lab, row: dict[str, str]) -> None:
    report = checked(lab, lab.add_job([row] * 10))
    assert (report["ok"], report["rows"]) == (True, 10)


def test_training_uses_the_tokens_that_the_check_left(lab: Lab) -> None:
    job = lab.add_job(n_epochs=1)
    assert check_job(lab.settings, lab.store, job.id).error is None
    assert [path.suffix for path in run_folder(lab.settings, job.id).iterdir()] == [".npz"]
    lab.store.blobs.delete(lab.store.records.files.get(job.spec.training_file).value.blob)
    assert run_attempt(lab.settings, job.id, 1) == "published"
