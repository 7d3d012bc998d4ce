"""A service with the default base on a real local cluster in a scratch folder, and jobs on it through HTTP."""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.inputs import Setup
from bench.over_http import tuneloom
from bench.stores import as_base
from tuneloom import bases, cluster
from tuneloom.config import DEFAULT_BASE

JOBS = "/v1/fine_tuning/jobs"
ENDED = ("succeeded", "failed", "cancelled")
_WORDS = ("river", "stone", "cloud", "bread", "light", "garden", "number", "window", "paper", "silver", "morning")


@dataclass
class Service:
    """A running installation. Its settings of training are read again by each job."""

    home: Path
    client: httpx.Client
    _config: dict[str, Any]

    def call(self, method: str, path: str, **options: Any) -> Any:
        answer = self.client.request(method, path, **options)
        if not answer.is_success:
            raise SystemExit(f"{method} {path}: {answer.status_code} {answer.text[:500]}")
        return answer.json()

    def set_train(self, **train: Any) -> None:
        """For jobs that start from now on."""
        self._config["train"] = train
        (self.home / "config.yaml").write_text(yaml.safe_dump(self._config))

    def upload(self, rows: int, words: int, *, seed: int = 0) -> str:
        """A file of rows with prompts and answers of so many words each."""
        draw = random.Random(seed)
        lines = []
        for _ in range(rows):
            texts = [" ".join(draw.choices(_WORDS, k=words)) for _ in range(2)]
            roles = zip(("user", "assistant"), texts, strict=True)
            lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}))
        data = {"purpose": "fine-tune"}
        return self.call("POST", "/v1/files", files={"file": ("rows.jsonl", "\n".join(lines))}, data=data)["id"]

    def start(self, file: str, **body: Any) -> str:
        return self.call("POST", JOBS, json={"model": DEFAULT_BASE, "training_file": file, "seed": 1, **body})["id"]

    def job(self, id: str) -> dict[str, Any]:
        return self.call("GET", f"{JOBS}/{id}")

    def wait(self, id: str, until: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
        """The job once `until` holds of it; ends the script if it ends otherwise or takes longer."""
        deadline = time.monotonic() + timeout_s
        while not until(job := self.job(id)):
            if job["status"] in ENDED or time.monotonic() > deadline:
                raise SystemExit(f"the job is `{job['status']}`: {job['error']}")
            time.sleep(0.25)
        return job

    def cancel(self, id: str) -> None:
        """End a job, and wait until its processes are gone."""
        self.call("POST", f"{JOBS}/{id}/cancel")
        deadline = time.monotonic() + 90
        while any("RayTrainWorker" in " ".join(p.cmdline()) for p in cluster.processes(self.home)):
            if time.monotonic() > deadline:
                raise SystemExit("the worker of a cancelled job does not end")
            time.sleep(0.5)


@contextmanager
def open_service(setup: Setup) -> Iterator[Service]:
    """A service that is up until the end of the context."""
    # A short path: Ray's sockets live below it.
    folder = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp"))
    home = folder / "h"
    try:
        base = as_base(setup.base)
        if (setup.base / "tuneloom.json").exists():
            shutil.copytree(setup.base, home / "bases" / base.slug)
        else:
            bases.add_folder(home / "bases", setup.base, base.id)
        engine = {"dtype": setup.dtype, "threads": setup.threads}
        config = {"gateway": {"port": 0}, "bases": [{"id": DEFAULT_BASE, "engine": engine}]}
        (home / "config.yaml").write_text(yaml.safe_dump(config))
        tuneloom(home, "up")
        state = cluster.read_state(home)
        assert state is not None, "`up` leaves the cluster's state"
        headers = {"Authorization": f"Bearer {(home / 'admin-key').read_text().strip()}"}
        with httpx.Client(base_url=state.api_url, headers=headers, timeout=120, trust_env=False) as client:
            yield Service(home, client, config)
    finally:
        tuneloom(home, "down")
        shutil.rmtree(folder, ignore_errors=True)
