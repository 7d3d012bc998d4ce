import pytest

from tuneloom.control import jobs
from tuneloom.control.jobs import TRANSITIONS, History, apply
from tuneloom.domain import TERMINAL, UNFINISHED, Hyperparameters, Job, JobError, JobSpec, Usage
from tuneloom.errors import Conflict

STATES = [*UNFINISHED, *sorted(TERMINAL)]
ERROR = JobError(code="x", message="x")
EVENTS = [
    jobs.FilesAccepted(),
    jobs.Waits("a free place"),
    jobs.Launched(5.0),
    jobs.Started(),
    jobs.Advanced(10, 99.0, Hyperparameters()),
    jobs.Yielded(),
    jobs.Lost(),
    jobs.Closed(),
    jobs.Published(5.0, "ft:x", "v", ("file-1",), 10, Hyperparameters()),
    jobs.Failed(5.0, ERROR),
    jobs.Cancelled(5.0),
    jobs.Paused(),
    jobs.Resumed(),
]


def job(state: str, **fields: object) -> Job:
    spec = JobSpec(base="b", training_file="file-1", seed=1)
    return Job.model_validate(
        {
            "id": "ftjob-1",
            "owner": "ada",
            "spec": spec,
            "requested_model": "b",
            "created_at": 1.0,
            "state": state,
            **fields,
        }
    )


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_in_every_state_moves_the_job_or_is_a_conflict_named_by_the_state(event, state):
    if state in TRANSITIONS[type(event)]:
        after = apply(job(state, files_checked=True), event)
        assert after.state == TRANSITIONS[type(event)][state]
        return
    with pytest.raises(Conflict) as caught:
        apply(job(state), event)
    assert caught.value.code == state
    assert caught.value.should_retry is False


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_a_terminal_state_is_left_by_no_event(state):
    for event in EVENTS:
        assert TRANSITIONS[type(event)].get(state, state) == state


def test_a_job_resumes_where_its_files_were_left():
    assert apply(job("paused", files_checked=True), jobs.Resumed()).state == "queued"
    assert apply(job("paused"), jobs.Resumed()).state == "validating_files"


def test_a_launch_counts_the_attempt_and_a_loss_closes_it():
    launched = apply(job("queued", files_checked=True), jobs.Launched(7.0))
    assert (launched.attempt, launched.attempt_open, launched.submission_id) == (1, True, "ftjob-1-a1")
    lost = apply(launched, jobs.Lost())
    assert (lost.state, lost.attempt_open, lost.losses) == ("queued", False, 1)


def test_a_cancel_ends_the_job_at_once_while_its_process_may_still_live():
    cancelled = apply(job("running", attempt=1, attempt_open=True), jobs.Cancelled(9.0))
    assert (cancelled.state, cancelled.finished_at, cancelled.attempt_open) == ("cancelled", 9.0, True)


def test_lines_of_one_history_sort_in_the_order_they_were_made():
    history = History(job("queued"), 1_800_000_000.123456)
    ids = [history.line(str(i)).id for i in range(200)]
    assert ids == sorted(ids)


def test_what_a_job_waits_for_is_forgotten_once_it_runs_rests_or_ends():
    waiting = apply(job("queued"), jobs.Waits("a free place"))
    assert waiting.waiting_for == "a free place"
    for event in (jobs.Launched(5.0), jobs.Paused(), jobs.Cancelled(5.0), jobs.Failed(5.0, ERROR)):
        assert apply(waiting, event).waiting_for is None


def test_what_a_run_has_taken_is_kept_when_nothing_new_is_known():
    usage = Usage(tokens=1, steps=1, seconds=1.0, memory_bytes=1)
    running = apply(job("running", attempt=1, attempt_open=True), jobs.Advanced(1, 1.0, None, usage=usage))
    assert running.usage == usage
    cancelled = apply(running, jobs.Cancelled(2.0))
    assert apply(cancelled, jobs.Closed()).usage == usage
