"""What a run will take, from how fast finished ones were; and what it has taken. No tokens are counted here.

How a run's time is made up is the question of `speeds`; here it is taken from the last jobs of the same kind.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from tuneloom.config import TrainSettings
from tuneloom.control.check import Planned
from tuneloom.control.speeds import CPU, GPU, SCORED_SHARE, Work, fit
from tuneloom.domain import Estimate, Job, JobError, JobSpec, Progress, Setting, Speed, Usage
from tuneloom.store.base import Write
from tuneloom.store.records import Records

DOES_NOT_FIT = "does_not_fit"
GUESS = "no job like it yet: a guess by the size of the base"
MAX_SPEEDS = 20


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
    prior = GPU if settings.num_gpus else CPU
    work = Work(
        planned.tokens,
        planned.evaluated_tokens + planned.reference_tokens,
        planned.steps,
        is_recomputed(planned.settings),
    )
    step_s = prior.step_s + prior.step_s_per_byte * planned.base_bytes
    if speeds:
        found = fit(work, speeds, step_s)
        seconds, factor, based_on = found.seconds, found.factor, _jobs_like_it(found.jobs)
    else:
        # Weights are stored in 16 bits, or nearly so for their number.
        seconds = prior.fixed_s + prior.s_per_token_and_parameter * work.tokens_like * planned.base_bytes / 2
        seconds += step_s * planned.steps
        factor, based_on = prior.factor, GUESS
    low, high = seconds / factor, seconds * factor
    return Estimate(
        tokens=planned.tokens,
        evaluated_tokens=planned.evaluated_tokens,
        reference_tokens=planned.reference_tokens,
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


def is_recomputed(settings: Sequence[Setting]) -> bool:
    """Whether activations are computed twice instead of kept."""
    return any(setting.name == "gradient_checkpointing" and setting.value is True for setting in settings)


def read_speeds(records: Records, kind: str) -> list[Speed]:
    """The last jobs of a kind."""
    found = records.speeds.query({"kind": kind}, order_by="created_at", descending=True, limit=MAX_SPEEDS)
    return [stored.value for stored in found]


def kind_of(spec: JobSpec, plan: Sequence[Setting], settings: TrainSettings) -> str:
    """What speed depends on, as one text."""
    formats = {setting.name: setting.value for setting in plan if setting.name in ("precision", "quantization")}
    device = f"gpu x{settings.num_gpus:g}" if settings.num_gpus else f"cpu, {settings.threads or 'all'} threads"
    if settings.workers > 1:
        device = f"{settings.workers} x {device}"
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
    usage, progress = job.usage, records.progress.find(job.id)
    is_interrupted = job.attempt != 1 or (progress is not None and progress.value.starts > 1)
    if usage is None or is_interrupted or records.speeds.find(job.id) is not None:
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
    evaluated = reference = 0
    if job.estimate is not None and job.estimate.tokens:
        evaluated = round(job.estimate.evaluated_tokens * usage.tokens / job.estimate.tokens)
        reference = job.estimate.reference_tokens
    work = Work(usage.tokens, evaluated, usage.steps, is_recomputed(job.settings))
    # The reference was computed before the first step, as fast as what is scored in between.
    training_s *= 1 + SCORED_SHARE * reference / max(1.0, work.tokens_like)
    speed = Speed(
        id=job.id,
        owner=job.owner,
        kind=kind_of(job.spec, job.settings, settings),
        created_at=now,
        tokens=usage.tokens,
        evaluated_tokens=evaluated + reference,
        steps=usage.steps,
        is_recomputed=work.is_recomputed,
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
        bounds = (
            f" ({_money(found.cost_low)} to {_money(found.cost_high)})" if found.cost_low and found.cost_high else ""
        )
        parts.append(f"{_money(found.cost)} {settings.currency}{bounds}")
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
