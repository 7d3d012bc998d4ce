import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.conftest import add_job
from tests.control.fakes import FakeClock
from tuneloom.config import TrainSettings
from tuneloom.control.check import Planned
from tuneloom.control.estimate import (
    CPU,
    GPU,
    MAX_SPEEDS,
    Estimator,
    describe_estimate,
    describe_usage,
    error_of,
    estimate,
    kind_of,
    learn_speed,
    read_speeds,
    usage_of,
)
from tuneloom.domain import Event, JobSpec, Progress, Setting, Speed, Usage, event_id

PLAIN = TrainSettings()
PRICED = TrainSettings(price_per_hour=3.0, currency="EUR")
SPEC = JobSpec(base="b", training_file="f", seed=1)


def planned(tokens: int = 10_000, steps: int = 100, **more) -> Planned:
    return Planned(tokens=tokens, steps=steps, **{"memory_bytes": 1_200_000_000, "base_bytes": 270_000_000, **more})


def speed(tokens: int, seconds: float, fixed_s: float = 20.0, id: str = "j", **more) -> Speed:
    known = {"tokens": tokens, "steps": tokens // 100, "evaluated_tokens": 0, "memory_bytes": 1, "created_at": 1.0}
    return Speed.model_validate(
        {"id": id, "owner": "o", "kind": "k", "seconds": seconds, "fixed_s": fixed_s, **known, **more}
    )


def test_the_second_job_of_a_kind_is_estimated_from_the_first():
    """20 s beside the steps and 200 tokens a second."""
    found = estimate(planned(40_000, 400), [speed(10_000, 70.0)], PLAIN)
    assert found.seconds == pytest.approx(220)
    assert (found.tokens, found.steps, found.memory_bytes) == (40_000, 400, 1_200_000_000)
    assert 0.7 < found.seconds_low / found.seconds < 0.85 and 1.2 < found.seconds_high / found.seconds < 1.4
    assert found.based_on == "1 job like it"


@given(
    rate=st.floats(1e-5, 1.0),
    fixed=st.floats(0, 300),
    sizes=st.lists(st.integers(200, 10**7), min_size=1, max_size=8),
    wanted=st.integers(200, 10**7),
)
def test_jobs_that_take_a_time_and_so_long_a_token_are_estimated_exactly(rate, fixed, sizes, wanted):
    done = [speed(size, fixed + rate * size, fixed) for size in sizes]
    found = estimate(planned(wanted, wanted // 100), done, PLAIN)
    assert found.seconds == pytest.approx(fixed + rate * wanted, rel=1e-6, abs=0.2)


@given(noise=st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=12))
def test_the_interval_holds_the_estimate_and_is_wider_for_jobs_that_differ_more(noise):
    even = [speed(10_000, 120.0) for _ in noise]
    uneven = [speed(10_000, 20 + 100 * (1 + share)) for share in noise]
    narrow, wide = (estimate(planned(), jobs, PLAIN) for jobs in (even, uneven))
    for found in (narrow, wide):
        assert found.seconds_low < found.seconds < found.seconds_high
    assert wide.seconds_high / wide.seconds >= narrow.seconds_high / narrow.seconds - 1e-9


def test_more_jobs_of_a_kind_narrow_the_interval():
    widths = [estimate(planned(), [speed(10_000, 120.0)] * n, PLAIN) for n in (1, 4, 16)]
    assert widths[0].seconds_high > widths[1].seconds_high > widths[2].seconds_high


def test_jobs_with_steps_of_like_size_count_alone_where_there_are_any():
    small_steps = speed(10_000, 20 + 400, steps=1000)
    found = estimate(planned(10_000, 100), [small_steps, speed(10_000, 20 + 100)], PLAIN)
    assert found.seconds == pytest.approx(120)
    assert estimate(planned(10_000, 100), [small_steps], PLAIN).seconds == pytest.approx(420)


def test_tokens_that_are_only_scored_count_a_third():
    found = estimate(planned(10_000, evaluated_tokens=30_000), [speed(10_000, 120.0)], PLAIN)
    assert found.seconds == pytest.approx(220)


def test_the_first_of_a_kind_is_a_guess_that_says_so():
    found = estimate(planned(), [], PLAIN)
    assert found.seconds == pytest.approx(CPU.fixed_s + CPU.s_per_token_and_parameter * 10_000 * 135_000_000)
    assert found.seconds_high / found.seconds == found.seconds / found.seconds_low == pytest.approx(CPU.factor)
    assert "no job like it yet" in found.based_on
    assert estimate(planned(), [], TrainSettings(num_gpus=1)).seconds_high < found.seconds * GPU.factor


def test_costs_follow_the_price_of_the_installation():
    found = estimate(planned(), [speed(10_000, 120.0)], PRICED)
    assert found.cost == pytest.approx(0.1)
    assert found.cost_low < 0.1 < found.cost_high
    assert estimate(planned(), [], PLAIN).cost is None


def test_an_estimate_and_what_it_took_read_like_sentences():
    found = estimate(planned(45_000, 120), [speed(10_000, 60.0, estimated_s=54.0)] * 3, PRICED)
    assert describe_estimate(found, PRICED) == (
        "Estimate: 45,000 tokens in 120 steps, 3.3 min (2.9 to 3.9 min), 1.2 GB, 0.17 EUR; from 3 jobs like it, whose "
        "estimates were off by 11% on average"
    )
    usage = Usage(tokens=45_000, steps=120, seconds=180.0, memory_bytes=1_100_000_000, cost=0.15)
    assert describe_usage(usage, found, PRICED) == (
        "Took 45,000 tokens in 120 steps, 3 min, 1.1 GB, 0.15 EUR; 10% less than estimated, 3.3 min (2.9 to 3.9 min)"
    )
    assert error_of(found, usage) == pytest.approx(-0.1)
    assert describe_usage(usage, None, PRICED) == "Took 45,000 tokens in 120 steps, 3 min, 1.1 GB, 0.15 EUR"


def test_kinds_differ_where_speed_does():
    plan = [Setting(name="precision", value="bf16", reason=""), Setting(name="rank", value=8, reason="")]
    nf4 = [*plan, Setting(name="quantization", value="nf4", reason="")]
    kinds = {
        kind_of(SPEC, plan, PLAIN),
        kind_of(SPEC, nf4, PLAIN),
        kind_of(SPEC, plan, TrainSettings(num_gpus=1)),
        kind_of(SPEC, plan, TrainSettings(threads=1)),
        kind_of(SPEC.model_copy(update={"method": "dpo"}), plan, PLAIN),
        kind_of(SPEC.model_copy(update={"base": "c"}), plan, PLAIN),
    }
    assert len(kinds) == 6
    other_rank = [plan[0], Setting(name="rank", value=64, reason="")]
    assert kind_of(SPEC, plan, PLAIN) == kind_of(SPEC, other_rank, PLAIN)


def test_usage_is_what_the_trainer_counted():
    progress = Progress(id="j", owner="o", attempt=1, heartbeat_at=0, step=5, trained_tokens=50, memory_bytes=7)
    assert usage_of(progress, PRICED) is None
    begun = progress.model_copy(update={"seconds": 1800.0})
    assert usage_of(begun, PRICED) == Usage(tokens=50, steps=5, seconds=1800.0, memory_bytes=7, cost=1.5)


@pytest.fixture
def finished(store):
    """A job of 10 steps, 2 s each, that took 50 s in all."""
    job = add_job(store, state="succeeded", attempt=1)
    events = [
        Event(
            id=event_id(1000.0 + 2 * step),
            owner=job.owner,
            job_id=job.id,
            created_at=1000.0 + 2 * step,
            message="",
            type="metrics",
            data={"step": step},
        )
        for step in range(1, 11)
    ]
    store.records.commit(*(store.records.events.create(event) for event in events))
    return job.model_copy(update={"usage": Usage(tokens=1000, steps=10, seconds=50.0, memory_bytes=9)})


def test_the_speed_of_a_finished_job_is_kept_apart_from_what_goes_by_beside_its_steps(store, finished):
    found = estimate(planned(2000, evaluated_tokens=500), [speed(100, 9.0)], PLAIN)
    job = finished.model_copy(update={"estimate": found})
    store.records.commit(*learn_speed(store.records, job, PLAIN, now=5.0))
    (kept,) = read_speeds(store.records, kind_of(job.spec, (), PLAIN))
    assert (kept.seconds, kept.fixed_s, kept.tokens, kept.evaluated_tokens) == (50.0, 30.0, 1000, 250)
    assert kept.estimated_s == found.seconds
    assert learn_speed(store.records, job, PLAIN, now=6.0) == []


def test_how_far_a_guess_was_off_is_not_held_against_later_estimates(store, finished):
    job = finished.model_copy(update={"estimate": estimate(planned(2000), [], PLAIN)})
    store.records.commit(*learn_speed(store.records, job, PLAIN, now=5.0))
    assert read_speeds(store.records, kind_of(job.spec, (), PLAIN))[0].estimated_s is None


def test_interrupted_jobs_and_those_of_one_step_teach_nothing(store, finished):
    assert learn_speed(store.records, finished.model_copy(update={"attempt": 2}), PLAIN, 5.0) == []
    assert learn_speed(store.records, finished.model_copy(update={"usage": None}), PLAIN, 5.0) == []
    other = add_job(store, suffix="one")
    assert learn_speed(store.records, other.model_copy(update={"usage": finished.usage}), PLAIN, 5.0) == []


def test_the_last_jobs_of_a_kind_count(store):
    clock = FakeClock()
    many = [speed(100, 1.0, id=f"j{i}", created_at=clock() + i) for i in range(MAX_SPEEDS + 5)]
    store.records.commit(*(store.records.speeds.create(each) for each in many))
    assert [each.id for each in read_speeds(store.records, "k")] == [f"j{i}" for i in range(MAX_SPEEDS + 4, 4, -1)]
    assert read_speeds(store.records, "other") == []


def test_a_run_that_fits_nowhere_is_refused_in_the_words_of_its_plan(store):
    estimator = Estimator(store.records, PLAIN)
    assert estimator.refusal(planned()) is None
    error = estimator.refusal(planned(refusal="base 9 GB + adapter 1 GB = 10 GB"))
    assert (error.code, error.message) == ("does_not_fit", "base 9 GB + adapter 1 GB = 10 GB")
