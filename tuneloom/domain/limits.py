"""What owners may use: limits, quotas and budgets."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from tuneloom.domain.access import Rates
from tuneloom.domain.record import Record


class Allowance(BaseModel):
    """Everything that may be limited of one owner. None: by the installation's settings; there, None: no limit.

    `rates` of calls of models by all their keys together, `model_rates` of those of each single Model or base.
    `costly_*` what `serve.limits_routes` says, such as creates of jobs and files; `light_per_minute` of all else.
    `max_concurrent*`: calls of models under way; `max_waiting`: those of them that have no first token yet.
    `*_per_month`: since the first of the month, UTC; tokens in and out and trained, and costs as usage counts them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rates: Rates = Rates()
    model_rates: Rates = Rates()
    costly_per_minute: int | None = Field(None, ge=1)
    costly_per_day: int | None = Field(None, ge=1)
    light_per_minute: int | None = Field(None, ge=1)
    max_concurrent: int | None = Field(None, ge=1)
    max_concurrent_per_key: int | None = Field(None, ge=1)
    max_waiting: int | None = Field(None, ge=1)
    max_queued_jobs: int | None = Field(None, ge=1)
    files_bytes: int | None = Field(None, ge=1)
    tokens_per_month: int | None = Field(None, ge=0)
    budget_per_month: float | None = Field(None, ge=0)

    def over(self, default: "Allowance") -> "Allowance":
        """Each limit of this one, or `default`'s where it has none."""
        own = {name: value for name, value in self if value is not None and not isinstance(value, Rates)}
        own["rates"] = over(self.rates, default.rates)
        own["model_rates"] = over(self.model_rates, default.model_rates)
        return default.model_copy(update=own)


class OwnerLimits(Record):
    """What an admin has set for one owner, whose name is the id."""

    collection: ClassVar[str] = "owner_limits"
    allowance: Allowance
    updated_at: float


def over(rates: Rates, default: Rates) -> Rates:
    """Each rate of `rates`, or of `default` where it has none."""
    own = {name: value for name, value in rates if value is not None}
    return default.model_copy(update=own) if own else default
