import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.conftest import add_job
from tests.control.fakes import FakeClock
from tuneloom.config import TrainSettings
from tuneloom.control.check import Planned
from tuneloom.control.estimate import (
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
from tuneloom.control.speeds import CPU, GPU
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
    step=st.floats(0, 0.05),
    sizes=st.lists(st.integers(2, 10**5).map(lambda steps: 100 * steps), min_size=1, max_size=8),
    wanted=st.integers(2, 10**5).map(lambda steps: 100 * steps),
)
def test_jobs_that_take_a_time_and_so_long_a_step_and_a_token_are_estimated_exactly(rate, fixed, step, sizes, wanted):
    """However long a step itself is taken to be, since all have steps of one size."""
    done = [speed(size, fixed + rate * size + step * size / 100, fixed) for size in sizes]
    found = estimate(planned(wanted, wanted // 100), done, PLAIN)
    assert found.seconds == pytest.approx(fixed + rate * wanted + step * wanted / 100, rel=1e-6, abs=0.2)


@pytest.mark.parametrize("step_s", [0.02, 0.1, 0.4])
def test_jobs_with_steps_of_other_sizes_tell_what_a_step_takes_by_itself(step_s):
    """Of 40 and 640 tokens, at 200 tokens a second; the next job has 2,560 of them in a step."""
    done = [
        speed(tokens, 20 + tokens / 200 + step_s * steps, steps=steps) for tokens, steps in ((8000, 200), (32000, 50))
    ]
    found = estimate(planned(256_000, 100), done, PLAIN)
    assert found.seconds == pytest.approx(20 + 1280 + 100 * step_s, rel=0.05)
    tiny = estimate(planned(1000, 100), done, PLAIN)
    assert tiny.seconds == pytest.approx(20 + 5 + 100 * step_s, rel=0.25)


def test_one_job_with_small_steps_does_not_stand_for_large_ones_token_by_token():
    """Of a tiny base, whose steps of 27 tokens take as long as those of 108."""
    first = speed(2700, 7.0 + 100 * 0.0187, 7.0, steps=100)
    found = estimate(planned(10_800, 100, base_bytes=500_000), [first], PLAIN)
    assert found.seconds == pytest.approx(7.0 + 100 * 0.0187, rel=0.25)


def test_the_reference_of_preferences_is_counted_with_the_rows_and_not_as_a_fixed_time(store, finished):
    """10 steps of 2 s, and before them 1,500 tokens that are scored, which take as long as 500 that are learned."""
    found = estimate(planned(1000, steps=10, reference_tokens=1500), [], PLAIN)
    job = finished.model_copy(update={"estimate": found})
    store.records.commit(*learn_speed(store.records, job, PLAIN, now=5.0))
    (kept,) = read_speeds(store.records, kind_of(job.spec, (), PLAIN))
    assert (kept.fixed_s, kept.evaluated_tokens) == (pytest.approx(20.0), 1500)
    again = estimate(planned(4000, steps=40, reference_tokens=6000), [kept], PLAIN)
    assert again.seconds == pytest.approx(20 + 4 * 30)


def test_activations_that_are_computed_twice_cost_a_third_more():
    twice = (Setting(name="gradient_checkpointing", value=True, reason="memory"),)
    found = estimate(planned(10_000, base_bytes=1, settings=twice), [speed(10_000, 120.0)], PLAIN)
    assert found.seconds == pytest.approx(20 + 100 * 4 / 3, rel=0.01)
    once = estimate(planned(10_000, base_bytes=1), [speed(10_000, 153.0, is_recomputed=True)], PLAIN)
    assert once.seconds == pytest.approx(120, rel=0.01)


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
    assert found.based_on == "1 job like it"
    assert 120 < estimate(planned(10_000, 100), [small_steps], PLAIN).seconds < 420


def test_tokens_that_are_only_scored_count_a_third():
    found = estimate(planned(10_000, evaluated_tokens=30_000, base_bytes=1), [speed(10_000, 120.0)], PLAIN)
    assert found.seconds == pytest.approx(220, rel=0.01)


def test_the_first_of_a_kind_is_a_guess_that_says_so():
    found = estimate(planned(), [], PLAIN)
    steps_s = 100 * (CPU.step_s + CPU.step_s_per_byte * 270_000_000)
    assert found.seconds == pytest.approx(CPU.fixed_s + CPU.s_per_token_and_parameter * 10_000 * 135_000_000 + steps_s)
    assert found.seconds_high / found.seconds == pytest.approx(CPU.factor)
    assert found.seconds / found.seconds_low == pytest.approx(CPU.factor)
    assert "no job like it yet" in found.based_on
    assert estimate(planned(), [], TrainSettings(num_gpus=1)).seconds_high < found.seconds * GPU.factor


def test_costs_follow_the_price_of_the_installation():
    found = estimate(planned(), [speed(10_000, 120.0)], PRICED)
    assert found.cost == pytest.approx(0.1)
    assert found.cost_low < 0.1 < found.cost_high
    assert estimate(planned(), [], PLAIN).cost is None


def test_an_estimate_and_what_it_took_read_like_sentences():
    found = estimate(planned(45_000, 120), [speed(10_000, 60.0, steps=27, estimated_s=54.0)] * 3, PRICED)
    assert describe_estimate(found, PRICED) == (
        "Estimate: 45,000 tokens in 120 steps, 3.3 min (2.9 to 3.8 min), 1.2 GB, 0.17 EUR (0.14 to 0.19); from 3 jobs "
        "like it, whose estimates were off by 11% on average"
    )
    usage = Usage(tokens=45_000, steps=120, seconds=180.0, memory_bytes=1_100_000_000, cost=0.15)
    assert describe_usage(usage, found, PRICED) == (
        "Took 45,000 tokens in 120 steps, 3 min, 1.1 GB, 0.15 EUR; 10% less than estimated, 3.3 min (2.9 to 3.8 min)"
    )
    assert error_of(found, usage) == pytest.approx(-0.1, abs=0.005)
    assert describe_usage(usage, None, PRICED) == "Took 45,000 tokens in 120 steps, 3 min, 1.1 GB, 0.15 EUR"


def test_kinds_differ_where_speed_does():
    plan = [Setting(name="precision", value="bf16", reason=""), Setting(name="rank", value=8, reason="")]
    nf4 = [*plan, Setting(name="quantization", value="nf4", reason="")]
    kinds = {
        kind_of(SPEC, plan, PLAIN),
        kind_of(SPEC, nf4, PLAIN),
        kind_of(SPEC, plan, TrainSettings(num_gpus=1)),
        kind_of(SPEC, plan, TrainSettings(threads=1)),
        kind_of(SPEC, plan, TrainSettings(workers=2)),
        kind_of(SPEC.model_copy(update={"method": "dpo"}), plan, PLAIN),
        kind_of(SPEC.model_copy(update={"base": "c"}), plan, PLAIN),
    }
    assert len(kinds) == 7
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
    twice = Progress(id=finished.id, owner=finished.owner, attempt=1, heartbeat_at=0, starts=2)
    store.records.commit(store.records.progress.create(twice))
    assert learn_speed(store.records, finished, PLAIN, 5.0) == []
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
