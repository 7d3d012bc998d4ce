"""What jobs take is counted with their end, once, whatever the end is."""

from typing import Any

import pytest

from tests.control.test_reconcile import SETTINGS, World
from tuneloom.config import UsageSettings
from tuneloom.control import jobs
from tuneloom.control.sweep import sweep_usage
from tuneloom.domain import Amounts, Job, JobError, Used
from tuneloom.store import Store, usage
from tuneloom.store.usage import Usage
from tuneloom.store.usage_writer import final_part

PRICED = SETTINGS.model_copy(update={"price_per_hour": 36.0})


@pytest.fixture
def world(store: Store) -> World:
    return World(store, PRICED)


def counted(world: World) -> list[Usage]:
    return usage.read(world.store.records, "2000", "2100")


def check(world: World, job: Job, model: str) -> None:
    (one,) = counted(world)
    assert job.usage is not None and job.usage.seconds > 0
    assert (one.owner, one.used.kind, one.used.base) == ("ada", "training", job.spec.base)
    assert (one.used.model, one.used.job_id) == (model, job.id)
    assert one.amounts.trained_tokens == job.usage.tokens > 0
    assert one.amounts.device_s == pytest.approx(job.usage.seconds)
    assert one.amounts.cost == pytest.approx(job.usage.seconds / 100) == pytest.approx(job.usage.cost)
    assert usage.spent(world.store.records, "ada", world.clock()).trained_tokens == job.usage.tokens


def test_a_job_that_succeeds_is_counted_when_its_process_is_gone(world: World):
    job = world.running()
    world.train(5)
    while world.job(job.id).attempt_open:
        if not world.job(job.id).is_terminal:
            assert counted(world) == []
        world.train(1)
    world.tick(5)
    check(world, world.job(job.id), "bot@v1")


def test_a_job_that_fails_is_counted(world: World):
    job = world.running()
    world.train(2)
    for trainer in world.launcher.trainers.values():
        trainer.fail(JobError(code="boom", message="It broke."))
    world.tick(5)
    assert world.job(job.id).state == "failed"
    check(world, world.job(job.id), job.spec.base)


def test_a_job_that_is_lost_too_often_is_counted_up_to_its_last_sign(world: World):
    job = world.running()
    for _ in range(SETTINGS.max_losses + 1):
        for trainer in world.launcher.trainers.values():
            trainer.step()
            trainer.state = "failed"
        seconds = world.store.records.progress.get(job.id).value.seconds
        world.tick(4)
    assert world.job(job.id).state == "failed"
    check(world, world.job(job.id), job.spec.base)
    assert counted(world)[0].amounts.device_s == pytest.approx(seconds)


def test_a_running_job_that_is_cancelled_is_counted_when_it_has_stopped(world: World):
    job = world.running()
    world.train(2)
    world.intend(job.id, jobs.Cancelled(world.clock()))
    assert counted(world) == []
    world.train(3)
    check(world, world.job(job.id), job.spec.base)


def test_a_paused_job_that_is_cancelled_by_the_api_is_counted(api: Any):
    world = World(api.store, PRICED)
    job = world.running()
    world.train(2)
    world.intend(job.id, jobs.Paused())
    world.train(3)
    assert not world.job(job.id).attempt_open and counted(world) == []
    for status in (200, 409):
        answer = api.post(f"/v1/fine_tuning/jobs/{job.id}/cancel")
        assert answer.status_code == status
        (one,) = counted(world)
        assert one.amounts.device_s == pytest.approx(world.job(job.id).usage.seconds)


def test_a_job_that_never_trained_is_not_counted(world: World, api: Any):
    job = api.create_job(suffix="bot")
    api.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    world.tick(3)
    assert world.job(job["id"]).state == "cancelled" and counted(world) == []


def test_control_folds_past_hours_and_keeps_them_as_long_as_the_settings_say(store: Store):
    now = 1.8e9
    used = Used(kind="inference", base="b", model="b")
    for days in (0, 5):
        part = final_part("ada", f"x{days}", now - days * 24 * 3600 - 2 * 3600, used, Amounts(requests=1))
        store.records.commit(part)
    sweep_usage(store, UsageSettings(retention_days=6), lambda: now)
    assert store.records.usage_parts.query() == [] and len(store.records.usage_rows.query()) == 2
    sweep_usage(store, UsageSettings(retention_days=4), lambda: now)
    assert len(store.records.usage_rows.query()) == 1
