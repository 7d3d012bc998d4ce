"""A service of its own on a real local cluster, with a tiny random base, and jobs on it by the plain client."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import yaml

from tests.tiny import make_base
from tuneloom import bases, cluster
from tuneloom.config import load
from tuneloom.domain import Progress
from tuneloom.store import Store, open_store

BASE = "tiny/llama"
_COMMAND_TIMEOUT_S = 420
_VICTIMS = {
    "worker": ("RayTrainWorker",),
    "driver": ("-m", "tuneloom.train"),
    "control": ("ServeReplica:control",),
}


@dataclass
class Installation:
    """A running service: its client, and its records as they are on disk."""

    home: Path
    client: openai.OpenAI
    store: Store

    def start_job(self, suffix: str, *, rows: int, epochs: int, **options: Any) -> str:
        """The id of a new job: batches of 4, always the same seed and data."""
        file = self.client.files.create(file=("rows.jsonl", _rows(rows)), purpose="fine-tune")
        job = self.client.fine_tuning.jobs.create(
            model=BASE,
            training_file=file.id,
            suffix=suffix,
            seed=7,
            hyperparameters={"n_epochs": epochs, "batch_size": 4},
            extra_body={"tuneloom": {"rank": 4, "learning_rate": 5e-3, "precision": "fp32", **options}},
        )
        return job.id

    def progress(self, job_id: str) -> Progress | None:
        stored = self.store.records.progress.find(job_id)
        return stored.value if stored else None

    def job(self, job_id: str) -> Any:
        return self.store.records.jobs.get(job_id).value

    def kill(self, victim: str) -> bool:
        """SIGKILL the processes of one kind; whether there was one."""
        found = False
        for process in cluster.processes(self.home):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                text = f"{process.name()} {' '.join(process.cmdline())}"
                if all(word in text for word in _VICTIMS[victim]):
                    os.kill(process.pid, signal.SIGKILL)
                    found = True
        return found


@contextlib.contextmanager
def open_installation(**train: Any) -> Iterator[Installation]:
    """Up in a scratch home until the end of the context. `train` are settings of training."""
    # A short path: Ray's sockets live below it.
    folder = Path(tempfile.mkdtemp(prefix="tl-", dir="/tmp"))
    home = folder / "h"
    try:
        bases.add_folder(home / "bases", make_base(folder / "source"), BASE)
        config = {
            "bases": [{"id": BASE, "engine": {"dtype": "fp32", "max_sequences": 4, "adapter_slots": 2, "threads": 1}}],
            "gateway": {"port": 0},
            "train": {"threads": 1, **train},
        }
        (home / "config.yaml").write_text(yaml.safe_dump(config))
        run_command(home, "up")
        state = cluster.read_state(home)
        assert state is not None, "`up` leaves the cluster's state"
        key = (home / "admin-key").read_text().strip()
        client = openai.OpenAI(base_url=f"{state.api_url}/v1", api_key=key, max_retries=8, timeout=60)
        store = open_store(load(home))
        try:
            yield Installation(home, client, store)
        finally:
            store.close()
    finally:
        run_command(home, "down", check=False)
        shutil.rmtree(folder, ignore_errors=True)


def run_command(home: Path, *arguments: str, check: bool = True) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TUNELOOM_"))}
    command = [sys.executable, "-m", "tuneloom.cli", "--home", str(home), *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, stdin=subprocess.DEVNULL
    )
    if check and done.returncode != 0:
        raise SystemExit(f"`tuneloom {' '.join(arguments)}` failed: {done.stdout[-1000:]} {done.stderr[-2000:]}")


def wait_for(what: str, check: Callable[[], Any], timeout_s: float = 300.0, every_s: float = 0.02) -> Any:
    """The first true value of `check`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(every_s)
    raise SystemExit(f"{what}: not within {timeout_s:.0f} s")


def _rows(count: int) -> bytes:
    words = ("rain", "sun", "fox", "dog", "green", "blue", "left", "right", "weather", "hello")
    lines = []
    for number in range(count):
        question = {"role": "user", "content": f"{words[number % 10]} {words[number // 10 % 10]} {number}"}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": words[number % 7]}]}))
    return "\n".join(lines).encode()
