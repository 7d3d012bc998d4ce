"""What a run will do, before it starts: the trainer's own plan on the rows that a check has read. No torch.

The machine of the check stands for those that train; `train.memory_bytes` says it where they differ.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuneloom.bases import Base
from tuneloom.config import Settings, TrainSettings
from tuneloom.domain import JobSpec
from tuneloom.errors import InvalidRequest
from tuneloom.train.fit import fit_plan
from tuneloom.train.memory import Room, plan_memory
from tuneloom.train.plan import Plan, make_plan
from tuneloom.train.report import Totals
from tuneloom.train.start import Start

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Lengths:
    """Of the rows to train on, their longest sequences (num_rows,)."""

    lengths: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class Planned:
    """A plan, the tokens of all its epochs and of all its evaluations, those of which DPO computes a reference, and why
    it does not fit if it does not.
    """

    plan: Plan
    tokens: int
    evaluated_tokens: int
    reference_tokens: int
    memory: dict[str, int]
    base_bytes: int
    refusal: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "settings": [setting.model_dump(mode="json") for setting in self.plan.settings],
            "tokens": self.tokens,
            "evaluated_tokens": self.evaluated_tokens,
            "reference_tokens": self.reference_tokens,
            "steps": self.plan.total_steps,
            "memory_bytes": sum(self.memory.values()),
            "memory_parts": self.memory,
            "base_bytes": self.base_bytes,
            "refusal": self.refusal,
        }


def plan_run(
    train: TrainSettings,
    spec: JobSpec,
    base: Base,
    rows: Lengths,
    training: Totals,
    validation: Totals,
    start: Start | None,
) -> Planned:
    """Plan the training of `spec` on such rows.

    Raises:
        InvalidRequest: settings contradict each other, the data or the adapter to start from.
    """
    use_gpu = train.num_gpus > 0
    plan = make_plan(spec, rows, base, has_bf16=has_bf16(train), use_gpu=use_gpu, start=start)  # type: ignore[arg-type]
    room, refusal = _room(train), None
    if room is not None:
        try:
            plan = fit_plan(plan, spec.options, base, room)
        except InvalidRequest as error:
            refusal = error.message
    memory = plan_memory(base, plan)
    parts = {item.name: item.size_bytes for item in memory.items}
    if not train.num_gpus:
        parts["program"] = memory.process_bytes - memory.total_bytes
    return Planned(
        plan=plan,
        tokens=training.tokens * plan.n_epochs,
        evaluated_tokens=validation.tokens * _evaluations(plan) if validation.rows else 0,
        reference_tokens=training.tokens + validation.tokens if spec.method == "dpo" else 0,
        memory=parts,
        base_bytes=base.size_bytes,
        refusal=refusal,
    )


def check_rank(settings: Settings, base: Base, plan: Plan) -> None:
    """Refuse what would be trained and then not be served. Raises InvalidRequest."""
    served = next((each.engine for each in settings.bases if each.id == base.id), None)
    if served is not None and plan.rank > served.max_rank:
        raise InvalidRequest(
            f"The adapter would have the rank {plan.rank}, and `{base.id}` is served with ranks up to "
            f"{served.max_rank} (`engine.max_rank`). Use a lower `tuneloom.rank`.",
            param="tuneloom.rank",
        )


def has_bf16(train: TrainSettings, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """What `models.has_fast_bf16` will say: every GPU that is bought today has it, of CPUs the flags tell."""
    if train.num_gpus:
        return True
    flags = next((line for line in _lines(cpuinfo) if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_tile" in flags


def _room(train: TrainSettings) -> Room | None:
    """The memory that a job may have; None where only the trainer sees the device."""
    if train.memory_bytes is not None:
        return Room("a job", train.memory_bytes)
    if train.num_gpus:
        return None
    limit = next(iter(_lines(_CGROUP_LIMIT)), "max").strip()
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Room("this machine", min(whole, int(limit)) if limit.isdigit() else whole)


def _evaluations(plan: Plan) -> int:
    every = plan.evaluate_every_steps
    return plan.n_epochs if every is None else math.ceil(plan.total_steps / every)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
