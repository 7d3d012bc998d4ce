"""A plan with smaller micro-batches: the same steps over the same rows, in more passes that each take less memory."""

import math
from dataclasses import replace

from tuneloom.train.plan import Plan, tell


def smaller(plan: Plan) -> int | None:
    """Half the rows of a forward pass; None if it is one row already."""
    return plan.micro_size // 2 or None


def with_micro_size(plan: Plan, size: int, reason: str) -> Plan:
    """`plan` with at most `size` rows a pass, and `reason` told with its settings: as few as make no more passes, so
    that the passes say how many rows they have.
    """
    passes = math.ceil(plan.batch_size / size)
    size = math.ceil(plan.batch_size / passes)
    if size == plan.micro_size:
        return plan
    return tell(replace(plan, micro_size=size), "accumulation_steps", passes, reason)
