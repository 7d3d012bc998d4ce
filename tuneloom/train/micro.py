"""A plan with smaller micro-batches: the same steps over the same rows, in more passes that each take less memory."""

from dataclasses import replace

from tuneloom.train.plan import Plan, tell


def smaller(plan: Plan) -> int | None:
    """Half the rows of a forward pass; None if it is one row already."""
    return plan.micro_size // 2 or None


def with_micro_size(plan: Plan, size: int, reason: str) -> Plan:
    """`plan` with `size` rows a pass, and `reason` told with its settings."""
    if size == plan.micro_size:
        return plan
    fewer = replace(plan, micro_size=size)
    return tell(fewer, "accumulation_steps", fewer.accumulation_steps, reason)
