"""What stands in for control where commands about lineages are tested."""

import threading
import time
from pathlib import Path

from tests.train.conftest import BASE_ID, Lab
from tuneloom import config
from tuneloom.control import models
from tuneloom.domain import Progress
from tuneloom.store import open_store
from tuneloom.store.artifacts import read_manifest
from tuneloom.train.attempt import run_attempt

CONFIG = f"bases: [{{id: {BASE_ID}, engine: {{dtype: fp32}}}}]\ntrain: {{threads: 1, min_rows: 1}}\n"


def register(lab: Lab, job_id: str) -> None:
    """What control does with a published attempt, in short."""
    stored = lab.store.records.jobs.get(job_id)
    manifest = read_manifest(lab.store.blobs, stored.value.artifacts)
    assert manifest is not None, lab.progress(job_id).error
    addition = models.register(lab.store.records, stored.value, manifest, time.time())
    after = stored.value.model_copy(update={"state": "succeeded", "version_id": addition.version.id})
    lab.store.records.commit(*addition.writes, lab.store.records.jobs.replace(stored, after))


class Control:
    """Runs jobs that appear, as the service does, in a thread."""

    def __init__(self, home: Path) -> None:
        self.lab = Lab.__new__(Lab)
        self.lab.settings = config.load(home)
        self.lab.store = open_store(self.lab.settings)
        self.known = {stored.value.id for stored in self.lab.store.records.jobs.query({})}
        self.results: list[str] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Control":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(60)
        self.lab.store.close()

    def _run(self) -> None:
        while not self._is_over.wait(0.1):
            for stored in self.lab.store.records.jobs.query({}):
                job = stored.value
                if job.id in self.known:
                    continue
                self.known.add(job.id)
                self.lab.change_job(job.id, state="running", attempt=1, attempt_open=True)
                progress = Progress(id=job.id, owner=job.owner, attempt=1, heartbeat_at=time.time())
                self.lab.store.records.commit(self.lab.store.records.progress.create(progress))
                self.results.append(run_attempt(self.lab.settings, job.id, 1))
                if self.results[-1] == "published":
                    register(self.lab, job.id)
                else:
                    self.lab.change_job(job.id, state="failed", error=self.lab.progress(job.id).error)
