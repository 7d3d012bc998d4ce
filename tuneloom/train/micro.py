"""A plan with smaller micro-batches: the same steps over the same rows, in more passes that each take less memory."""

from dataclasses import replace

from tuneloom.train.plan import Plan, tell


def smaller(plan: Plan) -> int | None:
    """About half the rows of a forward pass, a divisor of the batch; None if it is one row already."""
    if plan.micro_size == 1:
        return None
    return max(size for size in range(1, plan.micro_size // 2 + 1) if plan.batch_size % size == 0)


def with_micro_size(plan: Plan, size: int, reason: str) -> Plan:
    """`plan` with `size` rows a pass, and `reason` told with its settings."""
    if size == plan.micro_size:
        return plan
    return replace(tell(plan, "accumulation_steps", plan.batch_size // size, reason), micro_size=size)
