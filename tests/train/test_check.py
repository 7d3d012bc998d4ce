import io
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.parts.servers import free_port
from tests.train.conftest import Lab, colour_rows
from tuneloom.bases import get_base
from tuneloom.domain import Job, JobSpec, TrainOptions
from tuneloom.errors import Overloaded
from tuneloom.rows import Scan
from tuneloom.store.gcs import GcsBlobs
from tuneloom.store.gcs_client import EMULATOR, Waits
from tuneloom.train.check import Check, check_job
from tuneloom.train.folders import run_folder
from tuneloom.train.inputs import read_inputs
from tuneloom.train.render import Renderer


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


def turn(question: str, answer: str) -> dict[str, str]:
    return {"input": question, "output": answer}


def test_the_report_counts_the_rows_to_train_on_and_tells_of_each_file(lab: Lab, tiny_base: Path) -> None:
    rows = [turn(f"say {number}", "yes " * number) for number in range(1, 13)]
    validation = [rows[2], turn("say 4", "no"), turn("say nothing", "no")]
    report = checked(lab, lab.add_job(rows, validation=validation))
    renderer = Renderer.load(tiny_base)
    examples = [renderer.render(row) for _, row in Scan().rows(io.BytesIO("\n".join(map(json.dumps, rows)).encode()))]
    lengths = [len(example.ids) for example in examples]
    assert (report["ok"], report["rows"], report["tokens"]) == (True, 12, sum(lengths))
    assert (report["longest"], report["learned_tokens"]) == (max(lengths), sum(e.num_learned for e in examples))
    training = report["files"]["training_file"]
    assert (training["tokens_p50"], training["tokens_p95"]) == (sorted(lengths)[5], sorted(lengths)[11])
    assert (report["validation_rows"], report["validation_tokens"]) == (3, report["files"]["validation_file"]["tokens"])
    assert report["overlap"] == {"rows": 1, "prompts": 1, "pairs": [[1, 3]]}
    levels = [(note["level"], note["message"].split(":")[0].split(" (")[0]) for note in report["notes"]]
    assert levels == [
        ("info", "Training file"),
        ("info", "Validation file"),
        ("warn", "1 validation row is among the training rows too"),
        ("warn", "1 validation row has the prompt of a training row, with another answer"),
    ]


def test_long_rows_are_cut_where_the_job_says_so_and_training_uses_what_is_left(lab: Lab) -> None:
    rows = [*(turn(f"say {number}", "yes") for number in range(11)), turn("say it", "no " * 50)]
    options = TrainOptions(max_length=32, long_rows="cut", rank=4, precision="fp32")
    job = lab.add_job(rows, options=options)
    report = checked(lab, job)
    file = report["files"]["training_file"]
    assert (report["ok"], report["rows"], report["longest"], file["long_rows"]) == (True, 12, 32, 1)
    whole = checked(lab, lab.add_job(rows))
    assert file["lost_tokens"] == whole["tokens"] - report["tokens"] > 0
    (warning,) = [note for note in report["notes"] if note["level"] == "warn"]
    assert warning["data"] == {"long_rows": 1, "lost_tokens": file["lost_tokens"], "limit": 32}
    inputs = read_inputs(lab.store, job, get_base(lab.settings.bases_dir, job.spec.base), run_folder(lab.settings, "x"))
    assert (inputs.training.num_tokens, inputs.training.lengths.max()) == (report["tokens"], 32)


def test_a_cut_row_without_anything_to_learn_is_refused(lab: Lab) -> None:
    rows = [
        *colour_rows(11),
        {"messages": [{"role": "user", "content": "red " * 60}, colour_rows(1)[0]["messages"][1]]},
    ]
    (problem,) = checked(lab, lab.add_job(rows, options=TrainOptions(max_length=48, long_rows="cut")))["problems"]
    assert problem["line"] == 12 and "nothing that is learned is among the first 48" in problem["message"]


def test_the_check_and_the_trainer_hold_out_the_same_rows(lab: Lab) -> None:
    rows = [turn(f"say {number}", "yes " * (number + 1)) for number in range(20)]
    job = lab.add_job(rows, options=TrainOptions(validation_share=0.25))
    report = checked(lab, job)
    assert (report["rows"], report["validation_rows"]) == (15, 5)
    inputs = read_inputs(lab.store, job, get_base(lab.settings.bases_dir, job.spec.base), run_folder(lab.settings, "x"))
    assert inputs.validation is not None
    assert (inputs.training.num_rows, inputs.training.num_tokens) == (15, report["tokens"])
    assert (inputs.validation.num_rows, inputs.validation.num_tokens) == (5, report["validation_tokens"])
    assert inputs.training.lengths.max() == report["longest"]
    held = f"Held out for validation: 5 of these rows, {report['validation_tokens']} tokens"
    assert held in [note["message"] for note in report["notes"]]


def test_rows_that_are_held_out_and_trained_on_are_told(lab: Lab) -> None:
    report = checked(lab, lab.add_job([turn("say it", "yes")] * 12, options=TrainOptions(validation_share=0.25)))
    assert report["overlap"]["rows"] == report["validation_rows"] == 3
    assert report["files"]["training_file"]["duplicate_rows"] == 11


def test_what_is_learned_is_counted_by_the_jobs_own_rule(lab: Lab) -> None:
    answers = checked(lab, lab.add_job())
    everything = checked(lab, lab.add_job(options=TrainOptions(loss_on="all")))
    assert answers["tokens"] == everything["tokens"]
    assert 24 < answers["learned_tokens"] < everything["learned_tokens"] == everything["tokens"] - 24


def test_preference_rows_are_checked_for_their_method_and_for_no_other(lab: Lab) -> None:
    rows = [{"prompt": f"say {number}", "chosen": " yes", "rejected": " no maybe"} for number in range(12)]
    job = lab.add_job(rows)
    wrong = checked(lab, job)
    assert wrong["problem_count"] == 12 and "`dpo`" in wrong["error"]["message"]
    job = lab.change_job(job.id, spec=job.spec.model_copy(update={"method": "dpo"}))
    report = checked(lab, job)
    assert (report["ok"], report["rows"], report["files"]["training_file"]["duplicate_rows"]) == (True, 12, 0)
    inputs = read_inputs(lab.store, job, get_base(lab.settings.bases_dir, job.spec.base), run_folder(lab.settings, "x"))
    assert inputs.training.num_tokens == report["tokens"]


def test_memory_is_that_of_a_few_rows_however_large_the_file_is(lab: Lab, tiny_base: Path, tmp_path: Path) -> None:
    # Most of a line is space between keys and values, which costs no time in the tokenizer.
    line = json.dumps({"text": "red green blue left right " * 5}).encode().replace(b":", b":" + b" " * 1200) + b"\n"
    path = tmp_path / "rows.jsonl"
    check = Check(lab.settings, JobSpec(base="tiny/llama", training_file="f", seed=1))

    def peak_of(size_bytes: int) -> int:
        with path.open("wb") as target:
            for _ in range(size_bytes // len(line)):
                target.write(line)
        with path.open("rb") as source:
            tracemalloc.start()
            try:
                check.read("training_file", "rows.jsonl", source)
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    small, large = peak_of(2 << 20), peak_of(30 << 20)
    rows = check.report().training.rows
    assert rows == (30 << 20) // len(line) > 20_000
    # 24 bytes a row are kept, and sorting costs some 17 more.
    assert large - small < 64 * rows < 4 << 20


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
    base = get_base(lab.settings.bases_dir, job.spec.base)
    inputs = read_inputs(lab.store, job, base, run_folder(lab.settings, job.id))
    assert inputs.training.num_rows == 24


def test_a_store_that_does_not_answer_says_nothing_about_the_files(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    job = lab.add_job(colour_rows(12))
    monkeypatch.setenv(EMULATOR, f"http://127.0.0.1:{free_port()}")
    away = GcsBlobs("bucket", waits=Waits(call_s=0.3, piece_s=0.3))
    with pytest.raises(Overloaded):
        check_job(lab.settings, replace(lab.store, blobs=away), job.id)
