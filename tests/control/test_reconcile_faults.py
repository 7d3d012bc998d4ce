"""Random interleavings of owners, trainers, crashes of control and losses: what must hold whatever happens."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.control.conftest import add_job, open_test_store
from tests.control.fakes import FakeChecker, FakeClock, FakeLauncher, FakeTrainer
from tuneloom.config import TrainSettings
from tuneloom.control import jobs
from tuneloom.control.job_usage import job_over
from tuneloom.control.reconcile import Reconciler
from tuneloom.domain import TERMINAL, Job, JobError
from tuneloom.errors import Conflict
from tuneloom.store import Store, usage
from tuneloom.store.base import Documents, Write
from tuneloom.store.records import Records

SETTINGS = TrainSettings(max_losses=3, heartbeat_timeout_s=20, start_timeout_s=30)
JOBS = 2
SETTLE_ROUNDS = 400


class Crash(BaseException):
    """The control process dies here. No handler of errors sees it."""


class Fuse:
    """Blows at the n-th effect from now, before it or after it."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.is_after = False

    def arm(self, left: int, is_after: bool) -> None:
        self.left, self.is_after = left, is_after

    def around(self, effect):
        if self.left is None:
            return effect()
        self.left -= 1
        if self.left >= 0:
            return effect()
        self.left = None
        if self.is_after:
            effect()
        raise Crash


class FusedDocuments:
    def __init__(self, inner: Documents, fuse: Fuse) -> None:
        self._inner = inner
        self._fuse = fuse

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def commit(self, writes: Sequence[Write]):
        return self._fuse.around(lambda: self._inner.commit(writes))


class FusedLauncher:
    def __init__(self, inner: FakeLauncher, fuse: Fuse) -> None:
        self._inner = inner
        self._fuse = fuse

    def launch(self, job: Job) -> None:
        self._fuse.around(lambda: self._inner.launch(job))

    def observe(self, submission_id: str):
        return self._inner.observe(submission_id)

    def room(self):
        return self._inner.room()

    def stop(self, submission_id: str) -> None:
        self._fuse.around(lambda: self._inner.stop(submission_id))


class World:
    def __init__(self, folder: Path) -> None:
        self.store = open_test_store(folder)
        self.clock = FakeClock()
        self.launcher = FakeLauncher(self.store, self.clock)
        self.fuse = Fuse()
        self.ends: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.events: set[str] = set()
        self.ids = [add_job(self.store, at=self.clock() + i).id for i in range(JOBS)]
        self.restart()

    def restart(self) -> None:
        records = Records(FusedDocuments(self.store.records.documents, self.fuse))
        self.reconciler = Reconciler(
            Store(records, self.store.blobs),
            FusedLauncher(self.launcher, self.fuse),
            FakeChecker(),
            SETTINGS,
            self.clock,
            observe_every_s=0,
        )

    def tick(self) -> None:
        try:
            self.reconciler.tick()
        except Crash:
            self.restart()
        self.clock.advance(1)

    @property
    def processes(self) -> list[FakeTrainer]:
        return [*self.launcher.trainers.values(), *self.launcher.zombies]

    def intend(self, id: str, event: jobs.JobEvent) -> None:
        stored = self.store.records.jobs.get(id)
        try:
            after = jobs.apply(stored.value, event)
        except Conflict:
            return
        used = job_over(self.store.records, stored.value, after, self.clock())
        self.store.records.commit(self.store.records.jobs.replace(stored, after), *used)
        if after.state == "cancelled":
            self.cancelled.add(id)

    def do(self, action: str, n: int) -> None:
        id = self.ids[n % JOBS]
        match action:
            case "tick":
                self.tick()
            case "train":
                for process in self.processes:
                    process.step()
            case "cancel":
                self.intend(id, jobs.Cancelled(self.clock()))
            case "pause":
                self.intend(id, jobs.Paused())
            case "resume":
                self.intend(id, jobs.Resumed())
            case "crash":
                self.fuse.arm(n // 2, n % 2 == 0)
                self.tick()
                self.fuse.left = None
            case "restart":
                self.restart()
            case "kill":
                for process in self.processes[n % 3 : n % 3 + 1]:
                    process.state = "failed"
            case "fail":
                for process in self.processes[-1:]:
                    process.fail(JobError(code="boom", message="It broke."))
            case "wait":
                self.clock.advance(5 * n)
            case "power cut":
                self.launcher.forget()
                self.restart()
            case "launcher down":
                self.launcher.down = not self.launcher.down

    def settle(self) -> None:
        """No more faults and no more wishes: everything must come to an end by itself."""
        self.launcher.down = False
        for id in self.ids:
            self.intend(id, jobs.Resumed())
        for _ in range(SETTLE_ROUNDS):
            self.tick()
            for process in self.processes:
                process.step()
            self.check()
            if all(job.is_terminal and not job.attempt_open for job in self.jobs()):
                return
        raise AssertionError([(job.id, job.state, job.attempt_open) for job in self.jobs()])

    def jobs(self) -> list[Job]:
        return [self.store.records.jobs.get(id).value for id in self.ids]

    def check(self) -> None:
        for job in self.jobs():
            if job.id in self.ends:
                assert job.state == self.ends[job.id], "a job ends once"
            elif job.state in TERMINAL:
                self.ends[job.id] = job.state
            if job.id in self.cancelled:
                assert job.state == "cancelled", "a cancel is final"
            versions = self.store.records.versions.query({"job_id": job.id})
            assert len(versions) == (job.state == "succeeded"), "one version for a success, none without"
            # One attempt may have two processes after a power cut at its launch; the first to write fences the other.
            writers = {process.attempt for process in self.processes if process.job_id == job.id and process.can_write}
            assert len(writers) <= 1, "two attempts of a job that could both write"
        assert sum(job.attempt_open for job in self.jobs()) <= SETTINGS.max_running_per_owner, (
            "all jobs are one owner's"
        )
        seen = {stored.value.id for stored in self.store.records.events.query()}
        assert self.events <= seen, "an event is lost"
        self.events = seen


def check_outcome(world: World, job: Job) -> None:
    table = world.store.records.events
    steps = [stored.value.data["step"] for stored in table.query({"job_id": job.id, "type": "metrics"})]
    assert len(steps) == len(set(steps)), "a step is told twice"
    if job.state == "succeeded":
        assert sorted(steps) == [1, 2, 3, 4]
        assert job.fine_tuned_model and job.result_files
        assert world.store.records.files.find(job.result_files[0]) is not None
    counted = [one for one in usage.read(world.store.records, "2000", "2100") if one.used.job_id == job.id]
    assert len(counted) == (job.usage is not None), "what a job took is counted once"
    if job.usage is not None:
        assert counted[0].amounts.device_s == job.usage.seconds
        assert counted[0].amounts.trained_tokens == job.usage.tokens
    if job.state == "failed":
        assert job.error.code in ("boom", "training_interrupted")


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["tick"] * 6
            + ["train"] * 6
            + ["crash"] * 4
            + ["cancel", "pause", "resume", "resume", "restart", "kill", "fail", "wait", "power cut", "launcher down"]
        ),
        st.integers(0, 7),
    ),
    max_size=60,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(actions=ACTIONS)
def test_every_job_ends_once_and_truly_whatever_happens(actions):
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for action, n in actions:
            world.do(action, n)
            world.check()
        world.settle()
        for job in world.jobs():
            check_outcome(world, job)
        world.store.close()
