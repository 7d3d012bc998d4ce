"""A plan that fits the memory of a machine: what is `auto` gives way, in the order of what it costs the least."""

from collections.abc import Iterator

from tuneloom.bases import Base
from tuneloom.domain import Setting, TrainOptions
from tuneloom.train.memory import Room, check_fits, fits, gigabytes, plan_memory
from tuneloom.train.micro import with_micro_size
from tuneloom.train.plan import Plan, change


def fit_plan(plan: Plan, options: TrainOptions, base: Base, room: Room, before: tuple[Setting, ...] = ()) -> Plan:
    """`plan` with the first choice that fits `room`: fewer rows at a time, then activations computed again, then NF4.

    What an earlier attempt of the job chose, in its settings `before`, is kept, so that it goes on as it began.

    Raises:
        InvalidRequest: none fits; the message has the arithmetic.
    """
    chosen = {setting.name: setting.value for setting in before}
    if chosen.get("quantization") == "nf4" and options.quantization == "auto":
        plan = change(plan, "quantization", "nf4", "as before the restart")
    if chosen.get("gradient_checkpointing"):
        plan = change(plan, "gradient_checkpointing", True, "as before the restart")
    smallest = plan
    for smallest in _choices(plan, options, base, room):
        if fits(plan_memory(base, smallest), room):
            return smallest
    check_fits(base, smallest, room)
    raise AssertionError("the smallest choice has just been found too large")


def _choices(plan: Plan, options: TrainOptions, base: Base, room: Room) -> Iterator[Plan]:
    needed, free = gigabytes(plan_memory(base, plan).total_bytes), gigabytes(room.device_bytes)
    reason = f"the run needs {needed} otherwise, and {free} are free"
    plans = [plan]
    if not plan.gradient_checkpointing:
        plans.append(change(plan, "gradient_checkpointing", True, reason))
    if plan.quantization == "none" and options.quantization == "auto":
        plans += [change(choice, "quantization", "nf4", reason) for choice in plans]
    for choice in plans:
        yield choice
        if options.accumulation_steps is None:
            yield from (with_micro_size(choice, size, reason) for size in range(choice.micro_size - 1, 0, -1))
