import threading
import time

import pytest

from tests.train.conftest import Lab
from tuneloom.domain import Event
from tuneloom.store.base import StoreConflict
from tuneloom.train.progress import FenceLost, Voice


def voice(lab: Lab, job_id: str, now: list[float] | None = None) -> Voice:
    return Voice(lab.store.records, job_id, 1, clock=time.time if now is None else lambda: now[0])


def test_metrics_are_written_with_the_step_they_reach(lab: Lab) -> None:
    job, now = lab.add_job(), [1000.0]
    speaker = voice(lab, job.id, now)
    speaker.metrics(1, "one", {"step": 1}, trained_tokens=5)
    speaker.metrics(2, "two", {"step": 2}, trained_tokens=9)
    assert (lab.steps(job.id), lab.progress(job.id).logged_step) == ([1], 1)
    now[0] += 1
    speaker.metrics(3, "three", {"step": 3}, trained_tokens=12)
    progress = lab.progress(job.id)
    assert lab.steps(job.id) == [1, 2, 3]
    assert (progress.logged_step, progress.step, progress.trained_tokens, progress.heartbeat_at) == (3, 3, 12, 1001.0)


def test_a_heartbeat_takes_what_waits_with_it(lab: Lab) -> None:
    job = lab.add_job()
    speaker = voice(lab, job.id)
    speaker.metrics(1, "one", {"step": 1})
    speaker.metrics(2, "two", {"step": 2}, trained_tokens=9)
    speaker.heartbeat()
    assert lab.steps(job.id) == [1, 2]
    assert lab.progress(job.id).trained_tokens == 9


def test_a_step_that_was_told_before_a_restart_is_not_told_again(lab: Lab) -> None:
    job = lab.add_job()
    voice(lab, job.id).metrics(1, "one", {"step": 1})
    again = voice(lab, job.id)
    again.metrics(1, "one", {"step": 1})
    again.metrics(2, "two", {"step": 2})
    again.heartbeat()
    assert lab.steps(job.id) == [1, 2]


def test_driver_and_worker_of_one_attempt_share_the_record(lab: Lab) -> None:
    job = lab.add_job()
    driver, worker = voice(lab, job.id), voice(lab, job.id)
    driver.say("from the driver", stage="starting")
    worker.say("from the worker", stage="loading")
    driver.heartbeat()
    assert lab.progress(job.id).stage == "loading"
    assert [event.message for event in lab.events(job.id)] == ["from the driver", "from the worker"]


def test_the_last_word_is_read_after_control_has_closed_the_attempt(lab: Lab) -> None:
    job = lab.add_job()
    speaker = voice(lab, job.id)
    speaker.say(stage="published", outcome="published")
    stored = lab.store.records.progress.get(job.id)
    closed = stored.value.model_copy(update={"stage": "closed"})
    lab.store.records.commit(lab.store.records.progress.replace(stored, closed))
    assert speaker.last_word().outcome == "published"
    with pytest.raises(FenceLost):
        speaker.progress()


@pytest.mark.parametrize("ending", ["replaced", "closed"])
def test_nothing_is_written_once_the_attempt_is_given_up(lab: Lab, ending: str) -> None:
    job = lab.add_job()
    speaker = voice(lab, job.id)
    speaker.say(stage="training")
    if ending == "replaced":
        lab.next_attempt(job.id)
    else:
        stored = lab.store.records.progress.get(job.id)
        closed = stored.value.model_copy(update={"stage": "closed"})
        lab.store.records.commit(lab.store.records.progress.replace(stored, closed))
    before = lab.progress(job.id)
    with pytest.raises(FenceLost):
        speaker.say("too late", stage="training")
    assert lab.progress(job.id) == before
    assert lab.events(job.id) == []


def test_what_cannot_be_written_beside_it_leaves_the_record_alone(lab: Lab) -> None:
    job = lab.add_job()
    event = Event(id="ftevent-1", owner="local", job_id=job.id, created_at=1.0, message="first")
    create = lab.store.records.events.create(event)
    lab.store.records.commit(create)
    with pytest.raises(StoreConflict):
        voice(lab, job.id).say(writes=(create,), stage="training")
    assert lab.progress(job.id).stage == "launching"


def test_many_voices_at_once_lose_nothing(lab: Lab) -> None:
    job = lab.add_job()

    def speak(number: int) -> None:
        speaker = voice(lab, job.id)
        for line in range(5):
            speaker.say(f"{number}.{line}")

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(event.message for event in lab.events(job.id)) == [
        f"{n}.{line}" for n in range(4) for line in range(5)
    ]


def test_the_job_record_says_what_is_wanted(lab: Lab) -> None:
    job = lab.add_job()
    speaker = voice(lab, job.id)
    assert speaker.intent() == "run"
    lab.change_job(job.id, state="paused")
    assert speaker.intent() == "pause"
    lab.change_job(job.id, state="cancelled")
    assert speaker.intent() == "cancel"
    lab.change_job(job.id, state="failed")
    with pytest.raises(FenceLost):
        speaker.intent()
