"""A plan with smaller micro-batches: the same steps over the same rows, in more passes that each take less memory."""

from dataclasses import replace

from tuneloom.domain import Setting
from tuneloom.train.plan import Plan


def smaller(plan: Plan) -> int | None:
    """About half the rows of a forward pass, a divisor of the batch; None if it is one row already."""
    if plan.micro_size == 1:
        return None
    return max(size for size in range(1, plan.micro_size // 2 + 1) if plan.batch_size % size == 0)


def with_micro_size(plan: Plan, size: int, reason: str) -> Plan:
    """`plan` with `size` rows a pass, and `reason` told with its settings."""
    if size == plan.micro_size:
        return plan
    passes = Setting(name="accumulation_steps", value=plan.batch_size // size, reason=reason)
    settings = tuple(passes if setting.name == passes.name else setting for setting in plan.settings)
    return replace(plan, micro_size=size, settings=settings)
