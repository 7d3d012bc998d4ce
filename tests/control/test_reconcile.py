import json

import pytest

from tests.control.conftest import BASE, add_job
from tests.control.fakes import RESOLVED, FakeChecker, FakeClock, FakeLauncher
from tuneloom.config import TrainSettings
from tuneloom.control import jobs
from tuneloom.control.check import CheckReport, Planned, Problem
from tuneloom.control.reconcile import FORCE_S, GRACE_S, Reconciler
from tuneloom.domain import Job, JobError, Progress, Setting, model_id
from tuneloom.store import Store

SETTINGS = TrainSettings(max_losses=2, heartbeat_timeout_s=60, start_timeout_s=100)


class World:
    """One control over one store, with everything around it in hand."""

    def __init__(self, store: Store, settings: TrainSettings = SETTINGS) -> None:
        self.store = store
        self.settings = settings
        self.clock = FakeClock()
        self.checker = FakeChecker()
        self.launcher = FakeLauncher(store, self.clock)
        self.restart()

    def restart(self) -> None:
        """A new control process that remembers nothing."""
        self.reconciler = Reconciler(
            self.store, self.launcher, self.checker, self.settings, self.clock, observe_every_s=0
        )

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.reconciler.tick()
            self.clock.advance(1)

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            for trainer in list(self.launcher.trainers.values()):
                trainer.step()
            self.tick()

    def job(self, id: str) -> Job:
        return self.store.records.jobs.get(id).value

    def intend(self, id: str, event: jobs.JobEvent) -> None:
        stored = self.store.records.jobs.get(id)
        self.store.records.commit(self.store.records.jobs.replace(stored, jobs.apply(stored.value, event)))

    def messages(self, id: str) -> list[str]:
        return [stored.value.message for stored in self.store.records.events.query({"job_id": id})]

    def running(self, **fields: object) -> Job:
        """A job whose first attempt has given signs of life."""
        job = add_job(self.store, at=self.clock(), **fields)
        self.tick(3)
        self.train(3)
        assert self.job(job.id).state == "running"
        return self.job(job.id)


@pytest.fixture
def world(store: Store) -> World:
    return World(store)


def test_a_job_goes_from_its_files_to_a_version_that_is_active(world):
    job = add_job(world.store)
    world.tick(3)
    world.train(8)
    done = world.job(job.id)
    assert (done.state, done.attempt_open, done.trained_tokens, done.resolved) == ("succeeded", False, 40, RESOLVED)
    version = world.store.records.versions.get(done.version_id).value
    assert (version.ft_name, version.number, version.job_id) == (done.fine_tuned_model, 1, job.id)
    assert world.store.records.models.get(model_id("ada", "bot")).value.active == 1
    (told,) = [entry.value for entry in world.store.records.audit_entries.query({"owner": "ada"})]
    assert (told.action, told.actor.kind, told.target.id) == ("model.version.created", "system", version.id)
    said = [line for line in world.messages(job.id) if not line.startswith("Step")]
    assert said == [
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        f"New fine-tuned model created: {done.fine_tuned_model}",
        "Took 40 tokens in 4 steps, 6 s, 1.1 GB",
        "The job has successfully completed",
    ]


def test_the_results_file_holds_one_row_a_step(world):
    job = world.running()
    world.train(6)
    file = world.store.records.files.get(world.job(job.id).result_files[0]).value
    assert (file.purpose, file.owner) == ("fine-tune-results", "ada")
    lines = world.store.blobs.read(file.blob).decode().splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert lines[1:3] == ["1,1.0,0.5,,", "2,0.5,0.5,,"]
    assert len(lines) == 5


def test_a_later_success_adds_a_version_and_leaves_the_active_one(world):
    for _ in range(2):
        job = add_job(world.store, at=world.clock())
        world.tick(3)
        world.train(8)
    assert world.job(job.id).version_id == "ada:bot:v2"
    model = world.store.records.models.get(model_id("ada", "bot")).value
    assert (model.active, model.next_version) == (1, 3)


def test_bad_rows_fail_the_job_with_a_line_each_and_the_first_ones_in_the_error(world):
    problems = [Problem(param="training_file", line=n, message="no `messages`") for n in range(1, 151)]
    error = JobError(code="invalid_training_file", message="The file has 150 bad lines.", param="training_file")
    world.checker.report = CheckReport(ok=False, error=error, problems=problems)
    job = add_job(world.store)
    world.tick(2)
    failed = world.job(job.id)
    assert failed.state == "failed"
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert "line 1: no `messages`; line 2" in failed.error.message
    lines = world.store.records.events.query({"job_id": job.id, "level": "error"})
    assert [line.value.data["line"] for line in lines if line.value.data] == list(range(1, 101))
    assert "50 more problems" in lines[-2].value.message


def test_the_check_of_a_cancelled_job_is_dropped(world):
    job = add_job(world.store)
    world.tick()
    world.intend(job.id, jobs.Cancelled(world.clock()))
    world.tick()
    assert world.checker.forgotten == [job.id]


def test_only_so_many_attempts_are_open_and_the_oldest_job_is_first(world):
    first, second = add_job(world.store, at=1.0), add_job(world.store, at=2.0)
    world.tick(4)
    assert (world.job(first.id).attempt, world.job(second.id).attempt) == (1, 0)
    world.train(9)
    world.tick(2)
    assert world.job(first.id).state == "succeeded"
    assert world.job(second.id).attempt == 1


def test_a_lost_attempt_is_followed_by_another_that_resumes(world):
    job = world.running()
    world.train(1)
    world.launcher.trainers[f"{job.id}-a1"].state = "failed"
    world.tick(2)
    again = world.job(job.id)
    assert (again.attempt, again.losses, again.attempt_open) == (2, 1, True)
    assert "Attempt 1 was lost; resuming from step 2" in world.messages(job.id)
    world.train(8)
    assert world.job(job.id).state == "succeeded"
    steps = [m for m in world.messages(job.id) if m.startswith("Step")]
    assert steps == ["Step 1/4", "Step 2/4", "Step 3/4", "Step 4/4"]


def test_too_many_losses_end_the_job_with_a_true_error(world):
    job = world.running()
    for _ in range(3):
        world.launcher.trainers[world.job(job.id).submission_id].state = "failed"
        world.tick(2)
    failed = world.job(job.id)
    assert (failed.state, failed.error.code, failed.attempt_open) == ("failed", "training_interrupted", False)
    assert len(world.launcher.launches) == 3


def test_after_a_power_cut_a_running_job_is_launched_again_at_once(world):
    job = world.running()
    world.launcher.forget()
    world.restart()
    world.tick(2)
    assert world.job(job.id).attempt == 2
    zombie = world.launcher.zombies[0]
    assert not zombie.can_write
    world.train(8)
    assert world.job(job.id).state == "succeeded"


def test_a_launch_that_was_lost_with_its_control_is_done_again_under_the_same_handle(world):
    job = add_job(world.store)
    world.tick(2)
    world.launcher.down = True
    world.tick()
    assert (world.job(job.id).attempt, world.launcher.launches) == (1, [])
    world.launcher.down = False
    world.restart()
    world.tick()
    assert world.launcher.launches == [f"{job.id}-a1"]
    assert world.job(job.id).losses == 0


def test_a_launcher_that_is_down_for_long_costs_no_attempt(world):
    job = add_job(world.store)
    world.tick(2)
    world.launcher.down = True
    world.tick(2 * int(SETTINGS.start_timeout_s))
    assert (world.job(job.id).attempt, world.job(job.id).losses) == (1, 0)


def test_a_silent_process_is_stopped_and_its_attempt_lost(world):
    job = world.running()
    world.clock.advance(SETTINGS.heartbeat_timeout_s + 1)
    world.tick(3)
    assert world.launcher.stops == [f"{job.id}-a1"]
    assert world.job(job.id).attempt == 2


def test_a_process_that_cannot_be_stopped_is_fenced_off(world):
    job = world.running()
    hanging = world.launcher.trainers[f"{job.id}-a1"]
    world.launcher.stop = lambda _: None
    world.clock.advance(SETTINGS.heartbeat_timeout_s + 1)
    world.tick(int(FORCE_S) + 4)
    assert world.job(job.id).attempt == 2
    assert not hanging.can_write


def test_a_process_that_never_starts_is_lost_after_the_start_timeout(world):
    job = add_job(world.store)
    world.tick(4)
    assert world.job(job.id).attempt_open
    world.clock.advance(SETTINGS.start_timeout_s)
    world.tick(3)
    assert (world.job(job.id).losses, world.job(job.id).attempt) == (1, 2)


def test_a_trainer_that_fails_ends_the_job_with_its_error(world):
    job = world.running()
    error = JobError(code="out_of_memory", message="The batch does not fit.")
    world.launcher.trainers[f"{job.id}-a1"].fail(error)
    world.tick(2)
    failed = world.job(job.id)
    assert (failed.state, failed.error, failed.attempt_open) == ("failed", error, False)


def test_a_paused_job_rests_until_it_is_resumed_and_then_goes_on(world):
    job = world.running()
    world.intend(job.id, jobs.Paused())
    world.train(2)
    assert (world.job(job.id).state, world.job(job.id).attempt_open) == ("paused", False)
    world.tick(5)
    assert world.launcher.launches == [f"{job.id}-a1"]
    world.intend(job.id, jobs.Resumed())
    world.train(8)
    done = world.job(job.id)
    assert (done.state, done.attempt, done.losses) == ("succeeded", 2, 0)


def test_a_resume_waits_for_the_process_that_obeyed_the_pause(world):
    job = world.running()
    world.intend(job.id, jobs.Paused())
    trainer = world.launcher.trainers[f"{job.id}-a1"]
    trainer.step()
    trainer.state = "alive"
    world.intend(job.id, jobs.Resumed())
    world.tick(3)
    assert world.job(job.id).attempt == 1
    trainer.state = "finished"
    world.tick(2)
    assert (world.job(job.id).attempt, world.job(job.id).losses) == (2, 0)


def test_a_cancelled_job_stays_cancelled_though_its_trainer_has_published(world):
    job = world.running()
    trainer = world.launcher.trainers[f"{job.id}-a1"]
    trainer.at_step = trainer.total_steps
    trainer.step()
    world.intend(job.id, jobs.Cancelled(world.clock()))
    world.tick(3)
    assert (world.job(job.id).state, world.job(job.id).attempt_open) == ("cancelled", False)
    assert world.store.records.versions.query() == []
    assert world.store.blobs.list(f"jobs/{job.id}/a1") == []


def test_a_cancelled_job_whose_process_goes_on_is_stopped_after_a_grace(world):
    job = world.running()
    world.intend(job.id, jobs.Cancelled(world.clock()))
    world.tick(int(GRACE_S))
    assert world.launcher.stops == []
    world.tick(4)
    assert world.launcher.stops == [f"{job.id}-a1"]
    assert not world.job(job.id).attempt_open


def test_a_registration_that_exists_finishes_the_job_without_a_second_version(world):
    job = world.running()
    world.train(5)
    done = world.store.records.jobs.get(job.id)
    assert done.value.state == "succeeded"
    undone = done.value.model_copy(update={"state": "running", "finished_at": None})
    world.store.records.commit(world.store.records.jobs.replace(done, undone))
    world.tick(2)
    again = world.job(job.id)
    assert (again.state, again.version_id) == ("succeeded", done.value.version_id)
    assert len(world.store.records.versions.query()) == 1


def test_a_model_that_moved_to_another_base_meanwhile_fails_the_job(world):
    job = world.running()
    other = {"id": model_id("ada", "bot"), "owner": "ada", "name": "bot", "base": "other/base", "created_at": 1.0}
    table = world.store.records.models
    world.store.records.commit(table.create(table._type.model_validate(other)))
    world.train(6)
    assert world.job(job.id).error.code == "model_base_mismatch"


def by_hand(world: World, **fields: object) -> Job:
    job = add_job(
        world.store,
        at=world.clock(),
        state="running",
        self_launched=True,
        attempt=1,
        attempt_open=True,
        attempt_started_at=world.clock(),
        files_checked=True,
        **fields,
    )
    progress = Progress(id=job.id, owner=job.owner, attempt=1, heartbeat_at=world.clock(), stage="training")
    world.store.records.commit(world.store.records.progress.create(progress))
    return job


def test_a_run_started_by_hand_is_watched_by_its_heartbeat_and_never_launched(world):
    job = by_hand(world)
    world.tick(int(SETTINGS.heartbeat_timeout_s) - 2)
    assert world.job(job.id).state == "running"
    assert world.launcher.launches == []


def test_a_run_started_by_hand_that_falls_silent_is_relaunched_by_control(world):
    job = by_hand(world)
    world.tick(int(SETTINGS.heartbeat_timeout_s) + 5)
    assert world.launcher.launches == [f"{job.id}-a2"]


def test_a_broken_job_does_not_stop_the_others(world, caplog):
    broken = add_job(world.store, at=1.0)
    stored = world.store.records.jobs.get(broken.id)
    half = stored.value.model_copy(update={"state": "running", "attempt": 1, "attempt_open": True, "losses": 0})
    world.store.records.commit(world.store.records.jobs.replace(stored, half))
    world.launcher.observe = lambda _: 1 / 0
    healthy = add_job(world.store, at=2.0)
    world.tick(2)
    assert world.job(healthy.id).state == "queued"
    assert broken.id in caplog.text


def test_the_job_copies_what_the_trainer_says_but_not_at_each_tick(world):
    job = world.running()
    stored = world.store.records.progress.get(job.id)
    world.tick(4)
    for tokens in (100, 200):
        stored = world.store.records.progress.get(job.id)
        value = stored.value.model_copy(update={"trained_tokens": tokens, "estimated_finish": 1.9e9})
        world.store.records.commit(world.store.records.progress.replace(stored, value))
        world.tick()
    assert (world.job(job.id).trained_tokens, world.job(job.id).estimated_finish) == (100, 1.9e9)
    world.tick(3)
    assert world.job(job.id).trained_tokens == 200


def test_events_survive_as_plain_json(world):
    job = world.running()
    for stored in world.store.records.events.query({"job_id": job.id}):
        json.dumps(stored.value.data)
    assert world.job(job.id).spec.base == BASE


PLANNED = Planned(
    settings=(Setting(name="precision", value="bf16", reason="the machine has it"),),
    tokens=40,
    steps=4,
    memory_bytes=1 << 30,
    base_bytes=270 << 20,
)


def test_a_job_is_estimated_when_it_is_let_in_and_measured_against_it_at_its_end(world):
    world.checker.report = CheckReport(ok=True, planned=PLANNED)
    job = add_job(world.store, at=world.clock())
    world.tick(2)
    let_in = world.job(job.id)
    assert (let_in.estimate.tokens, let_in.estimate.steps, let_in.settings) == (40, 4, PLANNED.settings)
    assert [m for m in world.messages(job.id) if m.startswith("Estimate: 40 tokens in 4 steps")]
    world.train(9)
    done = world.job(job.id)
    assert (done.usage.tokens, done.usage.steps, done.usage.memory_bytes) == (40, 4, 1 << 30)
    assert done.usage.seconds > 0
    (last,) = world.store.records.events.query({"job_id": job.id}, descending=True, limit=1)
    assert last.value.message == "The job has successfully completed"
    assert last.value.data["usage"]["seconds"] == done.usage.seconds
    assert last.value.data["estimate_error"] == done.usage.seconds / done.estimate.seconds - 1


def test_the_second_job_of_a_kind_takes_what_was_estimated(world):
    world.checker.report = CheckReport(ok=True, planned=PLANNED)
    for _ in range(2):
        job = add_job(world.store, at=world.clock())
        world.tick(3)
        world.train(9)
    second = world.job(job.id)
    assert second.estimate.based_on.startswith("1 job like it")
    assert second.usage.seconds == pytest.approx(second.estimate.seconds, rel=0.25)
    assert second.estimate.seconds_low < second.usage.seconds < second.estimate.seconds_high


def test_a_job_that_fits_nowhere_fails_before_it_runs(world):
    refused = PLANNED.model_copy(update={"refusal": "base 30 GB + adapter 1 GB = 31 GB, and there are 16 GB"})
    world.checker.report = CheckReport(ok=True, planned=refused)
    job = add_job(world.store)
    world.tick(4)
    failed = world.job(job.id)
    assert (failed.state, failed.error.code, failed.attempt) == ("failed", "does_not_fit", 0)
    assert "= 31 GB" in failed.error.message


def test_a_cancelled_job_keeps_what_it_has_taken(world):
    job = world.running()
    world.train(1)
    world.intend(job.id, jobs.Cancelled(world.clock()))
    world.train(2)
    cancelled = world.job(job.id)
    assert cancelled.usage.steps == cancelled.usage.tokens / 10 > 0 and cancelled.usage.seconds > 0
    assert world.store.records.speeds.query() == []


def waits(world, id: str) -> list[str]:
    return [message for message in world.messages(id) if message.startswith("Waiting")]


def test_a_job_is_told_once_what_it_waits_for_and_again_when_that_changes(world):
    first, second = (add_job(world.store, at=world.clock() + i) for i in range(2))
    world.tick(10)
    world.restart()
    world.tick(10)
    reason = "a free place: 1 job of yours runs, the limit is 1"
    assert world.job(second.id).waiting_for == reason
    assert waits(world, second.id) == [f"Waiting for {reason}"]
    other = add_job(world.store, owner="bob", at=world.clock())
    world.tick(5)
    assert waits(world, other.id) == ["Waiting for free cores: it needs 2, 1 job runs"]
    world.intend(first.id, jobs.Cancelled(world.clock()))
    world.train(3)
    # Ada has just been served: Bob comes first, though Ada's job is older.
    assert (world.job(other.id).attempt, world.job(other.id).waiting_for) == (1, None)
    assert waits(world, second.id)[1:] == ["Waiting for free cores: it needs 2, 1 job runs"]


def test_jobs_of_two_owners_run_side_by_side_where_there_are_cores_for_both(store):
    world = World(store, SETTINGS.model_copy(update={"threads": 1}))
    ids = [add_job(world.store, owner=owner, suffix=None).id for owner in ("ada", "bob", "eve")]
    world.tick(4)
    assert sorted(world.job(id).attempt for id in ids) == [0, 1, 1]
    world.train(9)
    world.tick(2)
    assert [world.job(id).attempt for id in ids] == [1, 1, 1]


def test_with_a_cluster_that_does_not_answer_nobody_is_started_beside_others(store):
    world = World(store, SETTINGS.model_copy(update={"threads": 1}))
    world.running(owner="bob")
    world.launcher.down = True
    job = add_job(world.store, at=world.clock())
    world.tick(5)
    assert (world.job(job.id).attempt, world.job(job.id).waiting_for) == (0, None)
    world.launcher.down = False
    world.tick()
    assert world.job(job.id).attempt == 1
