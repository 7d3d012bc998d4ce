"""From a file to an answer of the tuned model, through the plain client only."""

import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import (
    ALIAS,
    BASE,
    Home,
    all_events,
    environment,
    rows_jsonl,
    start_job,
    steps_of,
    wait_for,
    wait_for_job,
)
from tests.tiny import make_adapter
from tuneloom import cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def ask(client: openai.OpenAI, model: str, text: str = "rain sun 3", max_tokens: int = 12) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=max_tokens, temperature=0
    )
    return answer.choices[0].message.content or ""


def test_a_file_becomes_a_job_becomes_a_model_that_answers(home: Home, client: openai.OpenAI) -> None:
    valid = client.files.create(file=("valid.jsonl", rows_jsonl(12)), purpose="fine-tune")
    train = client.files.create(file=("train.jsonl", rows_jsonl(80)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=ALIAS,
        training_file=train.id,
        validation_file=valid.id,
        suffix="support-bot",
        seed=1,
        metadata={"team": "blue"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 4}}},
        extra_body={"tuneloom": {"rank": 8, "learning_rate": 5e-3}},
    )
    assert job.status == "validating_files" and job.fine_tuned_model is None

    done = wait_for_job(client, job.id, "succeeded")

    assert done.fine_tuned_model.startswith(f"ft:{BASE}:local:support-bot:")
    assert done.trained_tokens > 0 and done.finished_at >= done.created_at
    assert done.hyperparameters.n_epochs == 3 and done.hyperparameters.batch_size == 4
    events = all_events(client, job.id)
    assert steps_of(events) == list(range(1, 61))
    losses = [event.data["train_loss"] for event in events if event.type == "metrics"]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    messages = " | ".join(event.message for event in events)
    for line in (
        "Created fine-tuning job",
        "Files validated",
        "Fine-tuning job started",
        "New fine-tuned model created",
    ):
        assert line in messages
    table = list(csv.DictReader(io.StringIO(client.files.content(done.result_files[0]).text)))
    assert len(table) == 60 and float(table[0]["train_loss"]) == pytest.approx(losses[0], abs=1e-3)
    assert any(row["valid_loss"] for row in table)
    assert ask(client, "support-bot") == ask(client, "support-bot@v1") == ask(client, done.fine_tuned_model)
    assert ask(client, "support-bot").startswith("serious")
    assert ask(client, "support-bot") != ask(client, BASE) == ask(client, ALIAS)
    names = {model.id for model in client.models.list()}
    assert {BASE, "support-bot", "support-bot@v1", done.fine_tuned_model} <= names
    assert [found.id for found in client.fine_tuning.jobs.list(metadata={"team": "blue"})] == [job.id]


def test_preferences_become_a_model_that_has_them(home: Home, client: openai.OpenAI) -> None:
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"rain sun {number}"}]},
            "preferred_output": [{"role": "assistant", "content": "serious rain"}],
            "non_preferred_output": [{"role": "assistant", "content": "satire rain"}],
        }
        for number in range(24)
    ]
    file = client.files.create(file=("pairs.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="prefers",
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 3, "batch_size": 4, "beta": 0.1}}},
        extra_body={"tuneloom": {"learning_rate": 5e-3, "rank": 8}},
    )

    done = wait_for_job(client, job.id, "succeeded")

    steps = [event.data for event in all_events(client, job.id) if event.type == "metrics"]
    assert [step["step"] for step in steps] == list(range(1, 19))
    assert steps[0]["train_loss"] == pytest.approx(0.693, abs=0.01) and steps[-1]["train_loss"] < 0.3
    assert steps[-1]["train_reward_margin"] > 1
    assert done.method.dpo.hyperparameters.beta == 0.1
    assert any("The engine agrees with the trainer" in event.message for event in all_events(client, job.id))
    assert ask(client, "prefers") == ask(client, done.fine_tuned_model) != ask(client, BASE)


def test_a_checkpoint_answers_while_its_job_still_runs_and_a_paused_job_goes_on_where_it_was(
    home: Home, client: openai.OpenAI
) -> None:
    job = start_job(client, rows_jsonl(100), suffix="live", epochs=20, checkpoint_every_steps=20)

    def late_checkpoint() -> Any:
        found = list(client.fine_tuning.jobs.checkpoints.list(job.id))
        return next((checkpoint for checkpoint in found if checkpoint.step_number >= 60), None)

    checkpoint = wait_for("a checkpoint that has learned something", late_checkpoint, timeout_s=180)
    answer = ask(client, checkpoint.fine_tuned_model_checkpoint)

    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    assert answer != ask(client, BASE)
    assert checkpoint.fine_tuned_model_checkpoint.endswith(f":ckpt-step-{checkpoint.step_number}")

    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    time.sleep(3)
    paused_at = steps_of(all_events(client, job.id))[-1]
    assert paused_at < 500
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"

    wait_for_job(client, job.id, "succeeded")
    assert steps_of(all_events(client, job.id)) == list(range(1, 501))


def test_versions_are_activated_and_rolled_back(home: Home, client: openai.OpenAI, tmp_path: Path) -> None:
    source = home.path / "source"
    for number in (1, 2):
        folder = make_adapter(tmp_path / f"a{number}", source, seed=number, base_id=BASE)
        home.run("models", "import", str(folder), "--name", "swapped", "--base", BASE)
    first, second = (ask(client, f"swapped@v{number}") for number in (1, 2))
    assert first != second and ask(client, "swapped") == first

    home.run("models", "activate", "swapped", "2")
    assert ask(client, "swapped") == second

    home.run("models", "rollback", "swapped")
    assert ask(client, "swapped") == first

    client.models.delete("swapped")
    with pytest.raises(openai.NotFoundError):
        ask(client, "swapped@v1")


def test_a_downloaded_adapter_works_in_plain_peft(home: Home, client: openai.OpenAI, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = home.path / "source"
    home.run(
        "models",
        "import",
        str(make_adapter(tmp_path / "a", source, seed=5, base_id=BASE)),
        "--name",
        "plain",
        "--base",
        BASE,
    )
    home.run("models", "export", "plain", "--to", str(tmp_path / "out"))

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "out").eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "rain sun 3"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert ask(client, "plain") == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_run_submitted_by_ray_job_submit_is_published_and_listed(
    home: Home, client: openai.OpenAI, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(rows_jsonl(40))
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", home.state.dashboard_url, "--"]
    command += ["python", "-m", "tuneloom.train", "--base", BASE, "--data", str(data), "--model", "by-hand"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home.path / cluster.TOKEN_FILE)}

    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment() | token)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "by-hand" in done.stdout
    jobs = [
        job for job in client.fine_tuning.jobs.list() if job.fine_tuned_model and ":by-hand:" in job.fine_tuned_model
    ]
    assert len(jobs) == 1 and jobs[0].status == "succeeded"
    assert ask(client, "by-hand@v1")


def test_a_revoked_key_is_refused_within_five_seconds(home: Home) -> None:
    secret = home.mint("eve")
    client = home.client(secret, max_retries=0)
    key_id = next(line.split()[0] for line in home.run("keys", "list").splitlines() if "eve" in line)
    assert ask(client, BASE)

    home.run("keys", "revoke", key_id)
    deadline = time.monotonic() + 5

    with pytest.raises(openai.AuthenticationError):
        while time.monotonic() < deadline:
            ask(client, BASE, max_tokens=1)
            time.sleep(0.2)


def test_an_env_line_is_all_that_a_shell_needs(home: Home) -> None:
    script = "import openai; print(len(list(openai.OpenAI().models.list())))"
    tuneloom = f"{sys.executable} -m tuneloom.cli --home {home.path}"
    done = subprocess.run(
        ["bash", "-c", f'eval "$({tuneloom} env)" && {sys.executable} -c "{script}"'],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment() | {"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
