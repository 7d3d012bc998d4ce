"""What a job has taken, counted once: in the commit after which it has ended and no process of it is left."""

from tuneloom.domain import Amounts, Job, Used
from tuneloom.store.base import Write
from tuneloom.store.records import Records
from tuneloom.store.usage_writer import final_part


def job_over(records: Records, before: Job, after: Job, at: float) -> list[Write]:
    """The write that counts a job's use, for the commit of this change; none if it is not over by it.

    A job is over once and for all, so this comes once. Until then a paused or ending one may still take more.
    """
    usage = after.usage
    if usage is None or _is_over(before) or not _is_over(after):
        return []
    amounts = Amounts(
        trained_tokens=usage.tokens,
        device_us=round(usage.seconds * 1e6),
        cost_nano=None if usage.cost is None else round(usage.cost * 1e9),
    )
    used = Used(kind="training", base=after.spec.base, model=_model(after), job_id=after.id)
    part = final_part(after.owner, after.id, at, used, amounts)
    is_counted = records.usage_parts.find(part.id) or records.usage_folds.find(part.id)
    return [] if is_counted else [part]


def _is_over(job: Job) -> bool:
    return job.is_terminal and not job.attempt_open


def _model(job: Job) -> str:
    """What the job made, or else its base."""
    if job.version_id is None:
        return job.spec.base
    _, name, number = job.version_id.split(":")
    return f"{name}@{number}"
