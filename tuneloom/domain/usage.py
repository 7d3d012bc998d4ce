"""The records of what was used: by whom, through which key, with which model, for which job.

A writer adds up an hour in parts of its own, `UsagePart`. The roll-up folds parts of past hours into `UsageRow`s, one
for an hour and what was used, and into the `UsageMonth` of the owner; a `UsageFold` says what was taken of a part.
Amounts are whole numbers, so that sums are exact in any order: microseconds, and billionths of the currency's unit.
"""

from datetime import UTC, datetime
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from tuneloom.domain.record import Record

UsageKind = Literal["inference", "training", "drafting"]


class Amounts(BaseModel):
    """How much. `cached_tokens` are part of `input_tokens`; `device_us` microseconds of a device, `cost_nano`
    billionths of the currency's unit, None without a price.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    requests: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    trained_tokens: int = 0
    device_us: int = 0
    cost_nano: int | None = None

    def __add__(self, other: "Amounts") -> "Amounts":
        return self._with(other, 1)

    def __sub__(self, other: "Amounts") -> "Amounts":
        return self._with(other, -1)

    @property
    def device_s(self) -> float:
        return self.device_us / 1e6

    @property
    def cost(self) -> float | None:
        return None if self.cost_nano is None else self.cost_nano / 1e9

    @property
    def is_nothing(self) -> bool:
        return not (self.cost_nano or any(getattr(self, name) for name in _COUNTS))

    def _with(self, other: "Amounts", sign: int) -> "Amounts":
        counts = {name: getattr(self, name) + sign * getattr(other, name) for name in _COUNTS}
        has_cost = self.cost_nano is not None or other.cost_nano is not None
        cost = (self.cost_nano or 0) + sign * (other.cost_nano or 0) if has_cost else None
        return Amounts.model_construct(cost_nano=cost, **counts)


_COUNTS = tuple(name for name in Amounts.model_fields if name != "cost_nano")


class Used(BaseModel):
    """What was used. `model` is a name that never changes its meaning: a base's id, `name@vN`, a checkpoint's name.

    `key_id` is empty for a person who signed in, and where no key is known; `job_id` where there is no job.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: UsageKind
    base: str
    model: str
    key_id: str = ""
    job_id: str = ""


class UsageLine(BaseModel):
    """One line of a part."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    used: Used
    amounts: Amounts


class UsagePart(Record):
    """What one writer has counted of an owner in an hour, in all. Its id begins with the hour; only that writer writes
    it, and the roll-up removes it.
    """

    collection: ClassVar[str] = "usage_parts"
    hour: str
    lines: tuple[UsageLine, ...]


class UsageFold(Record):
    """What the roll-up has taken of a part (its id), for a writer that goes on with it. Removed after a while."""

    collection: ClassVar[str] = "usage_folds"
    lines: tuple[UsageLine, ...]


class UsageRow(Record):
    """What was used in an hour, of all writers. Its id begins with the hour."""

    collection: ClassVar[str] = "usage_rows"
    hour: str
    used: Used
    amounts: Amounts


class UsageMonth(Record):
    """The sums of an owner's rows by day (`01`..`31`). Its id begins with the month."""

    collection: ClassVar[str] = "usage_months"
    days: dict[str, Amounts] = Field(default_factory=dict)


class Price(BaseModel):
    """What a million tokens of a base cost. `cached` None: as `input`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    input: float = Field(ge=0)
    cached: float | None = Field(None, ge=0)
    output: float = Field(ge=0)

    def of(self, amounts: Amounts) -> float:
        """What these tokens cost, in millionths."""
        cached = self.input if self.cached is None else self.cached
        fresh = amounts.input_tokens - amounts.cached_tokens
        return fresh * self.input + amounts.cached_tokens * cached + amounts.output_tokens * self.output


def hour_of(at_s: float) -> str:
    """The hour of a time, in UTC: `2026-11-26T16`. Sorts by time."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H")


def hour_start(hour: str) -> float:
    """When an hour began, in Unix seconds."""
    return datetime.strptime(hour, "%Y-%m-%dT%H").replace(tzinfo=UTC).timestamp()
