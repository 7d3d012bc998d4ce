"""What a run will take, from how fast finished ones were; and what it has taken. No tokens are counted here.

A run of `tokens` takes a fixed time (start, loading, saving) and then so long per token; a token that is only scored
counts as a third. Both come from the last jobs of the same kind, from those with steps of like size if there are any.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuneloom.config import TrainSettings
from tuneloom.control.check import Planned
from tuneloom.domain import Estimate, Job, JobError, JobSpec, Progress, Setting, Speed, Usage
from tuneloom.store.base import Write
from tuneloom.store.records import Records

DOES_NOT_FIT = "does_not_fit"
GUESS = "no job like it yet: a guess by the size of the base"
MAX_SPEEDS = 20
SCORED_SHARE = 1 / 3
# Steps from half to twice the tokens count as alike: small ones cost more per token.
LIKE_STEPS = 2.0
# What the spread of few jobs is mixed with: two jobs' worth of a log-standard deviation of 12 %.
PRIOR_JOBS, PRIOR_SPREAD = 2, 0.12
# The 5 % quantile of a normal distribution: nine of ten lie between it and its mirror image.
TAIL = 1.645


@dataclass(frozen=True)
class Prior:
    """A guess without any job of the kind. `factor`: how far off either way it may be."""

    fixed_s: float
    s_per_token_and_parameter: float
    factor: float


CPU = Prior(20.0, 2.0e-11, 3.0)
# Four operations per token and parameter (forward, and backward through frozen weights) at 30 of an L4's 121 Tflop/s.
GPU = Prior(30.0, 1.3e-13, 4.0)


class Estimator:
    """Estimates jobs by the speeds that are kept, and keeps those of the jobs that succeed."""

    def __init__(self, records: Records, settings: TrainSettings) -> None:
        self._records = records
        self._settings = settings

    def estimate(self, spec: JobSpec, planned: Planned) -> Estimate:
        kind = kind_of(spec, planned.settings, self._settings)
        return estimate(planned, read_speeds(self._records, kind), self._settings)

    def refusal(self, planned: Planned) -> JobError | None:
        """Why a run cannot be let in: more memory than a job may ever have."""
        return JobError(code=DOES_NOT_FIT, message=planned.refusal) if planned.refusal else None

    def describe(self, found: Estimate) -> str:
        return describe_estimate(found, self._settings)

    def usage(self, progress: Progress | None) -> Usage | None:
        return usage_of(progress, self._settings) if progress else None

    def conclude(self, job: Job, now: float) -> tuple[list[str], list[Write]]:
        """What to tell of a job that has succeeded, and to keep of its speed."""
        if job.usage is None:
            return [], []
        line = describe_usage(job.usage, job.estimate, self._settings)
        return [line], learn_speed(self._records, job, self._settings, now)

    def outcome(self, job: Job) -> dict[str, Any] | None:
        """What a run has taken and what was estimated, as data of its last event."""
        if job.usage is None:
            return None
        return {
            "usage": job.usage.model_dump(mode="json"),
            "estimate": job.estimate.model_dump(mode="json") if job.estimate else None,
            "estimate_error": error_of(job.estimate, job.usage),
        }


def estimate(planned: Planned, speeds: Sequence[Speed], settings: TrainSettings) -> Estimate:
    """What a run takes that is planned so. `speeds` are those of its kind."""
    work = _work(planned.tokens, planned.evaluated_tokens)
    alike = _alike(planned, speeds)
    if alike:
        seconds, factor = _fit(work, alike)
        based_on = _jobs_like_it(alike)
    else:
        prior = GPU if settings.num_gpus else CPU
        # Weights are stored in 16 bits, or nearly so for their number.
        seconds = prior.fixed_s + prior.s_per_token_and_parameter * work * planned.base_bytes / 2
        factor, based_on = prior.factor, GUESS
    low, high = seconds / factor, seconds * factor
    return Estimate(
        tokens=planned.tokens,
        evaluated_tokens=planned.evaluated_tokens,
        steps=planned.steps,
        seconds=seconds,
        seconds_low=low,
        seconds_high=high,
        memory_bytes=planned.memory_bytes,
        cost=cost_of(seconds, settings),
        cost_low=cost_of(low, settings),
        cost_high=cost_of(high, settings),
        based_on=based_on,
    )


def read_speeds(records: Records, kind: str) -> list[Speed]:
    """The last jobs of a kind."""
    found = records.speeds.query({"kind": kind}, order_by="created_at", descending=True, limit=MAX_SPEEDS)
    return [stored.value for stored in found]


def kind_of(spec: JobSpec, plan: Sequence[Setting], settings: TrainSettings) -> str:
    """What speed depends on, as one text."""
    formats = {setting.name: setting.value for setting in plan if setting.name in ("precision", "quantization")}
    device = f"gpu x{settings.num_gpus:g}" if settings.num_gpus else f"cpu, {settings.threads or 'all'} threads"
    named = (spec.base, spec.method, formats.get("precision", "auto"), formats.get("quantization", "none"), device)
    return " | ".join(map(str, named))


def usage_of(progress: Progress, settings: TrainSettings) -> Usage | None:
    """What a run has taken so far; None before it has begun to train."""
    if not progress.seconds:
        return None
    return Usage(
        tokens=progress.trained_tokens,
        steps=progress.step,
        seconds=progress.seconds,
        memory_bytes=progress.memory_bytes,
        cost=cost_of(progress.seconds, settings),
    )


def cost_of(seconds: float, settings: TrainSettings) -> float | None:
    return None if settings.price_per_hour is None else settings.price_per_hour * seconds / 3600


def learn_speed(records: Records, job: Job, settings: TrainSettings, now: float) -> list[Write]:
    """The writes that keep how fast a job was; none for one that was interrupted or too short to tell."""
    usage = job.usage
    if usage is None or job.attempt != 1 or records.speeds.find(job.id) is not None:
        return []
    where = {"job_id": job.id, "type": "metrics"}
    ends = [records.events.query(where, order_by="id", descending=last, limit=1) for last in (False, True)]
    if not all(ends):
        return []
    first, last = (found[0].value for found in ends)
    steps = (last.data or {}).get("step", 0) - (first.data or {}).get("step", 0)
    if steps < 1:
        return []
    training_s = (last.created_at - first.created_at) * usage.steps / steps
    evaluated = 0
    if job.estimate is not None and job.estimate.tokens:
        evaluated = round(job.estimate.evaluated_tokens * usage.tokens / job.estimate.tokens)
    speed = Speed(
        id=job.id,
        owner=job.owner,
        kind=kind_of(job.spec, job.settings, settings),
        created_at=now,
        tokens=usage.tokens,
        evaluated_tokens=evaluated,
        steps=usage.steps,
        seconds=usage.seconds,
        fixed_s=max(0.0, usage.seconds - training_s),
        memory_bytes=usage.memory_bytes,
        # How far a guess was off says nothing of estimates that were made from jobs.
        estimated_s=job.estimate.seconds if job.estimate and job.estimate.based_on != GUESS else None,
    )
    return [records.speeds.create(speed)]


def error_of(estimate: Estimate | None, usage: Usage | None) -> float | None:
    """How much longer a run took than estimated, as a share: 0.1 is a tenth longer."""
    return None if estimate is None or usage is None else usage.seconds / estimate.seconds - 1


def describe_estimate(found: Estimate, settings: TrainSettings) -> str:
    parts = [f"{found.tokens:,} tokens in {_count(found.steps, 'step')}", _time_range(found)]
    if found.memory_bytes:
        parts.append(_size(found.memory_bytes))
    if found.cost is not None:
        parts.append(f"{_money(found.cost)} {settings.currency}")
    return f"Estimate: {', '.join(parts)}; from {found.based_on}"


def describe_usage(usage: Usage, before: Estimate | None, settings: TrainSettings) -> str:
    parts = [f"{usage.tokens:,} tokens in {_count(usage.steps, 'step')}", _duration(usage.seconds)]
    if usage.memory_bytes:
        parts.append(_size(usage.memory_bytes))
    if usage.cost is not None:
        parts.append(f"{_money(usage.cost)} {settings.currency}")
    error = error_of(before, usage)
    if before is None or error is None:
        return f"Took {', '.join(parts)}"
    against = f"{abs(error):.0%} {'more' if error > 0 else 'less'} than estimated, {_time_range(before)}"
    return f"Took {', '.join(parts)}; {against}"


def _work(tokens: int, evaluated_tokens: int) -> float:
    return tokens + SCORED_SHARE * evaluated_tokens


def _alike(planned: Planned, speeds: Sequence[Speed]) -> list[Speed]:
    step = planned.tokens / max(1, planned.steps)
    near = [s for s in speeds if 1 / LIKE_STEPS <= (s.tokens / max(1, s.steps)) / max(1.0, step) <= LIKE_STEPS]
    return near or list(speeds)


def _fit(work: float, speeds: Sequence[Speed]) -> tuple[float, float]:
    """Seconds for so much work, and the factor that bounds nine of ten either way."""
    works = [max(1.0, _work(speed.tokens, speed.evaluated_tokens)) for speed in speeds]
    fixed = statistics.median(speed.fixed_s for speed in speeds)
    rate = statistics.median((s.seconds - s.fixed_s) / w for s, w in zip(speeds, works, strict=True))
    misses = [math.log(max(0.1, s.seconds) / (fixed + rate * w)) for s, w in zip(speeds, works, strict=True)]
    jobs = len(speeds)
    variance = (PRIOR_JOBS * PRIOR_SPREAD**2 + sum(miss**2 for miss in misses)) / (PRIOR_JOBS + jobs)
    return fixed + rate * work, math.exp(TAIL * math.sqrt(variance * (1 + 1 / jobs)))


def _jobs_like_it(speeds: Sequence[Speed]) -> str:
    text = _count(len(speeds), "job") + " like it"
    errors = [abs(speed.seconds / speed.estimated_s - 1) for speed in speeds if speed.estimated_s]
    return f"{text}, whose estimates were off by {statistics.mean(errors):.0%} on average" if errors else text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _time_range(found: Estimate) -> str:
    unit, name = _unit(found.seconds)
    low, high = (
        f"{value / unit:.2g}" if value < 10 * unit else f"{value / unit:.0f}"
        for value in (found.seconds_low, found.seconds_high)
    )
    return f"{_duration(found.seconds)} ({low} to {high} {name})"


def _duration(seconds: float) -> str:
    unit, name = _unit(seconds)
    return f"{seconds / unit:.2g} {name}" if seconds < 10 * unit else f"{seconds / unit:.0f} {name}"


def _unit(seconds: float) -> tuple[float, str]:
    if seconds < 120:
        return 1.0, "s"
    return (60.0, "min") if seconds < 7200 else (3600.0, "h")


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.0f} MB"


def _money(amount: float) -> str:
    return f"{amount:.2f}" if amount >= 0.1 else f"{amount:.2g}"
