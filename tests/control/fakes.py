"""Stand-ins behind control's seams: a clock, a launcher with processes in memory, a checker, and a trainer's writes."""

import hashlib
from dataclasses import dataclass, field

from tuneloom.control.check import CheckReport
from tuneloom.control.launcher import LauncherUnavailable, Observation, Room
from tuneloom.domain import (
    AdapterRef,
    Checkpoint,
    Event,
    Hyperparameters,
    Job,
    JobError,
    checkpoint_name,
    event_id,
    ft_name,
    short_id,
)
from tuneloom.store import Store
from tuneloom.store.artifacts import ADAPTER_FILES, Manifest, write_manifest
from tuneloom.store.base import StoreConflict

ROOM = Room(free_cpus=8, free_gpus=0, cores=2, node_cores=2, free_memory_bytes=8 << 30)
RESOLVED = Hyperparameters(n_epochs=3, batch_size=2, learning_rate_multiplier=1.5)


class FakeClock:
    def __init__(self, at: float = 1_800_000_000.0) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at

    def advance(self, seconds: float) -> None:
        self.at += seconds


@dataclass
class FakeChecker:
    """Answers at the second look, as a process that takes a while."""

    report: CheckReport = field(default_factory=lambda: CheckReport(ok=True, rows=10, tokens=100))
    asked: set[str] = field(default_factory=set)
    forgotten: list[str] = field(default_factory=list)

    def check(self, job_id: str) -> CheckReport | None:
        if job_id in self.asked:
            self.asked.discard(job_id)
            return self.report
        self.asked.add(job_id)
        return None

    def forget(self, job_id: str) -> None:
        self.forgotten.append(job_id)
        self.asked.discard(job_id)

    def close(self) -> None:
        pass


class FakeTrainer:
    """Writes what a trainer of one attempt writes, and only against the progress record that it wrote last."""

    def __init__(self, store: Store, clock: FakeClock, job_id: str, attempt: int, total_steps: int = 4) -> None:
        self.store = store
        self.clock = clock
        self.job_id = job_id
        self.attempt = attempt
        self.total_steps = total_steps
        self.state = "alive"
        self.at_step = self._resume_point()
        self.progress = store.records.progress.get(job_id)
        self.has_begun = False
        self.began_at, self.seconds_before = clock(), self.progress.value.seconds
        if self.progress.value.attempt != attempt:
            self.state = "failed"

    @property
    def can_write(self) -> bool:
        """Whether its next write would get through."""
        if self.state != "alive":
            return False
        return self.store.records.progress.get(self.job_id).rev == self.progress.rev

    def step(self) -> None:
        """One loop of the trainer: look at the job, then one piece of work."""
        if self.state != "alive":
            return
        job = self.store.records.jobs.get(self.job_id).value
        if job.attempt != self.attempt:
            self.state = "failed"
        elif job.state in ("paused", "cancelled"):
            self._write(outcome=job.state)
            self.state = "finished"
        elif not self.has_begun:
            self.has_begun = True
            self._write(stage="training", resolved=RESOLVED, total_steps=self.total_steps)
        elif self.at_step < self.total_steps:
            self._train(job)
        else:
            self._publish(job)

    def fail(self, error: JobError) -> None:
        if self.state == "alive":
            self._write(outcome="failed", error=error)
            self.state = "failed"

    def _train(self, job: Job) -> None:
        self.at_step += 1
        writes = []
        if self.at_step > self.progress.value.logged_step:
            at = self.clock()
            data = {"step": self.at_step, "train_loss": 1 / self.at_step, "train_mean_token_accuracy": 0.5}
            line = Event(
                id=event_id(at),
                owner=job.owner,
                job_id=job.id,
                created_at=at,
                message=f"Step {self.at_step}/{self.total_steps}",
                type="metrics",
                data=data,
            )
            writes.append(self.store.records.events.create(line))
        if self.at_step % 2 == 0 and self.store.records.checkpoints.find(f"ftckpt_{job.id}-{self.at_step}") is None:
            writes.append(self.store.records.checkpoints.create(self._checkpoint(job)))
        logged = max(self.at_step, self.progress.value.logged_step)
        self._write(*writes, step=self.at_step, logged_step=logged, trained_tokens=10 * self.at_step)

    def _publish(self, job: Job) -> None:
        adapter = put_fake_adapter(self.store, f"{job.artifacts}/adapter", f"{job.id}-{self.attempt}")
        manifest = Manifest(
            job_id=job.id,
            attempt=self.attempt,
            base=job.spec.base,
            adapter=adapter,
            resolved=RESOLVED,
            trained_tokens=10 * self.total_steps,
            steps=self.total_steps,
            metrics={"train_loss": 0.25},
            created_at=1.0,
        )
        write_manifest(self.store.blobs, job.artifacts, manifest)
        self._write(outcome="published")
        if self.state == "alive":
            self.state = "finished"

    def _checkpoint(self, job: Job) -> Checkpoint:
        prefix = f"jobs/{job.id}/checkpoints/step-{self.at_step}"
        name = ft_name(job.spec.base, job.owner, job.spec.suffix, short_id(job.id))
        return Checkpoint(
            id=f"ftckpt_{job.id}-{self.at_step}",
            owner=job.owner,
            job_id=job.id,
            base=job.spec.base,
            step=self.at_step,
            name=checkpoint_name(name, self.at_step),
            created_at=self.clock(),
            adapter=put_fake_adapter(self.store, prefix, prefix),
        )

    def _write(self, *writes: object, **changes: object) -> None:
        progress = self.store.records.progress
        value = self.progress.value.model_copy(update={**self._measured(), **changes})
        try:
            revs = self.store.records.commit(progress.replace(self.progress, value), *writes)
        except StoreConflict:
            self.state = "failed"
            return
        self.progress = type(self.progress)(value, revs[("progress", self.job_id)])

    def _measured(self) -> dict[str, object]:
        now = self.clock()
        return {"heartbeat_at": now, "seconds": self.seconds_before + now - self.began_at, "memory_bytes": 1 << 30}

    def _resume_point(self) -> int:
        found = self.store.records.checkpoints.query({"job_id": self.job_id}, order_by="step", descending=True, limit=1)
        return found[0].value.step if found else 0


@dataclass
class FakeLauncher:
    """Processes by handle. `down` makes it unreachable; `forget` is a new cluster that knows nothing of the old one."""

    store: Store
    clock: FakeClock
    trainers: dict[str, FakeTrainer] = field(default_factory=dict)
    zombies: list[FakeTrainer] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    down: bool = False
    has: Room = ROOM

    def launch(self, job: Job) -> None:
        self._check()
        if job.submission_id not in self.trainers:
            self.launches.append(job.submission_id)
            self.trainers[job.submission_id] = FakeTrainer(self.store, self.clock, job.id, job.attempt)

    def observe(self, submission_id: str) -> Observation:
        self._check()
        trainer = self.trainers.get(submission_id)
        return Observation("unknown") if trainer is None else Observation(trainer.state)

    def stop(self, submission_id: str) -> None:
        self._check()
        self.stops.append(submission_id)
        trainer = self.trainers.get(submission_id)
        if trainer is not None and trainer.state == "alive":
            trainer.state = "finished"

    def room(self) -> Room:
        self._check()
        return self.has

    def forget(self) -> None:
        """The records of the cluster are lost; its processes may live on for a while."""
        self.zombies += self.trainers.values()
        self.trainers = {}

    def _check(self) -> None:
        if self.down:
            raise LauncherUnavailable("The launcher is down.")


def put_fake_adapter(store: Store, prefix: str, content: str) -> AdapterRef:
    for name in ADAPTER_FILES:
        store.blobs.write(f"{prefix}/{name}", content.encode())
    return AdapterRef(sha256=hashlib.sha256(content.encode()).hexdigest(), uri=prefix, rank=4, size_bytes=len(content))
