import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuneloom.bases import add_folder
from tuneloom.config import Settings, TrainSettings
from tuneloom.domain import (
    Event,
    File,
    Hyperparameters,
    Job,
    JobSpec,
    Progress,
    TrainOptions,
    Version,
    ft_name,
    model_name,
    new_id,
    version_id,
)
from tuneloom.store import Store, open_store
from tuneloom.store.artifacts import fetch_adapter, read_manifest
from tuneloom.train.attempt import run_attempt

BASE_ID = "tiny/llama"
Schedule = Callable[[int, Callable[[], None]], None]
WORDS = ["red", "green", "blue", "left", "right", "up", "down", "yes", "no", "maybe"]


def colour_rows(count: int) -> list[dict[str, Any]]:
    """Rows of different lengths with short answers."""
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(WORDS[: 1 + number % 7]) + f" {number}?"},
                {"role": "assistant", "content": WORDS[number % 3]},
            ]
        }
        for number in range(count)
    ]


class Lab:
    """An installation in a folder, with one tiny base, and jobs made as control makes them."""

    def __init__(self, home: Path, tiny_base: Path) -> None:
        self.settings = Settings(
            home=home, train=TrainSettings(threads=1, checkpoint_interval_s=3600, checkpoints_kept=2)
        )
        add_folder(self.settings.bases_dir, tiny_base, BASE_ID)
        self.store: Store = open_store(self.settings)

    def add_file(self, rows: list[dict[str, Any]] | bytes, owner: str = "local") -> File:
        body = rows if isinstance(rows, bytes) else "\n".join(json.dumps(row) for row in rows).encode()
        file_id = new_id("file-")
        sha256 = self.store.blobs.write(f"files/{file_id}", body)
        file = File(
            id=file_id,
            owner=owner,
            filename="rows.jsonl",
            purpose="fine-tune",
            size_bytes=len(body),
            sha256=sha256,
            blob=f"files/{file_id}",
            created_at=time.time(),
        )
        self.store.records.commit(self.store.records.files.create(file))
        return file

    def add_job(
        self,
        rows: list[dict[str, Any]] | bytes | None = None,
        *,
        validation: list[dict[str, Any]] | None = None,
        options: TrainOptions | None = None,
        state: str = "running",
        **hyperparameters: Any,
    ) -> Job:
        """A job whose first attempt is open, with its progress record."""
        spec = JobSpec(
            base=BASE_ID,
            training_file=self.add_file(colour_rows(24) if rows is None else rows).id,
            validation_file=self.add_file(validation).id if validation else None,
            suffix="colours",
            seed=7,
            hyperparameters=Hyperparameters(**{"n_epochs": 2, "batch_size": 4, **hyperparameters}),
            options=options or TrainOptions(rank=4, learning_rate=5e-3, precision="fp32"),
        )
        now = time.time()
        job = Job(
            id=new_id("ftjob-"),
            owner="local",
            spec=spec,
            requested_model=BASE_ID,
            created_at=now,
            state=state,
            attempt=1,
            attempt_open=True,
        )
        progress = Progress(id=job.id, owner=job.owner, attempt=1, heartbeat_at=now)
        self.store.records.commit(self.store.records.jobs.create(job), self.store.records.progress.create(progress))
        return job

    def change_job(self, job_id: str, **changes: Any) -> Job:
        stored = self.store.records.jobs.get(job_id)
        after = stored.value.model_copy(update=changes)
        self.store.records.commit(self.store.records.jobs.replace(stored, after))
        return after

    def next_attempt(self, job_id: str) -> Job:
        """What control does to launch a job again."""
        job = self.change_job(job_id, attempt=self.store.records.jobs.get(job_id).value.attempt + 1, state="running")
        stored = self.store.records.progress.get(job_id)
        fresh = {"attempt": job.attempt, "stage": "launching", "outcome": None, "error": None}
        after = stored.value.model_copy(update=fresh)
        self.store.records.commit(self.store.records.progress.replace(stored, after))
        return job

    def register(self, job_id: str) -> None:
        """What control does with a published run."""
        job = self.store.records.jobs.get(job_id).value
        manifest = read_manifest(self.store.blobs, job.artifacts)
        assert manifest is not None
        version = Version(
            id=version_id(job.owner, model_name(job.spec, job.id), 1),
            owner=job.owner,
            model=model_name(job.spec, job.id),
            number=1,
            base=job.spec.base,
            ft_name=ft_name(job.spec.base, job.owner, job.spec.suffix, "12345678"),
            adapter=manifest.adapter,
            created_at=time.time(),
        )
        self.store.records.commit(self.store.records.versions.create(version))
        self.change_job(job_id, state="succeeded", version_id=version.id)

    def progress(self, job_id: str) -> Progress:
        return self.store.records.progress.get(job_id).value

    def events(self, job_id: str) -> list[Event]:
        return [stored.value for stored in self.store.records.events.query({"job_id": job_id})]

    def steps(self, job_id: str) -> list[int]:
        return [event.data["step"] for event in self.events(job_id) if event.type == "metrics" and event.data]

    def losses(self, job_id: str) -> list[float]:
        return [event.data["train_loss"] for event in self.events(job_id) if event.type == "metrics" and event.data]

    def checkpoint_steps(self, job_id: str) -> list[int]:
        return sorted(stored.value.step for stored in self.store.records.checkpoints.query({"job_id": job_id}))


# Answers of the validation rows are never those that are learned, so that their loss soon rises.
ODD_ROWS = [{"messages": [row["messages"][0], {"role": "assistant", "content": "maybe"}]} for row in colour_rows(6)]


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


def messages(lab: Lab, job_id: str) -> list[str]:
    return [event.message for event in lab.events(job_id)]


def valid_losses(lab: Lab, job_id: str) -> dict[int, float]:
    data = [event.data or {} for event in lab.events(job_id) if event.type == "metrics"]
    return {each["step"]: each["valid_loss"] for each in data if "valid_loss" in each}


@pytest.fixture(autouse=True)
def ample_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others take of this machine's memory while a test kills a run says nothing of the run."""
    monkeypatch.setattr("tuneloom.train.meter.SHORT_SHARE", 0.0)
    monkeypatch.setattr("tuneloom.train.meter.oom_kills", lambda: 0)


@pytest.fixture
def lab(tmp_path: Path, tiny_base: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path / "home", tiny_base)
    yield lab
    lab.store.close()


@pytest.fixture
def at_step(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Schedule:
    """Let something happen once in a run when a step has just ended, before anything is made of it."""
    from tuneloom.train.steps import Steps

    actions: dict[int, Callable[[], None]] = {}
    original = Steps.on_step_end

    def on_step_end(self: Steps, args: Any, state: Any, control: Any, **more: Any) -> None:
        actions.pop(state.global_step, lambda: None)()
        original(self, args, state, control, **more)

    monkeypatch.setattr(Steps, "on_step_end", on_step_end)
    return actions.__setitem__
