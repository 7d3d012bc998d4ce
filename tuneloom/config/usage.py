"""What use costs, and how long it is known hour by hour."""

from pydantic import Field

from tuneloom.config.section import Section
from tuneloom.domain import Amounts, Price


class UsageSettings(Section):
    """Prices are in `train.currency`. What was used keeps the price of its time."""

    retention_days: int = Field(400, ge=2, description="how long usage is kept by the hour; sums of days stay")
    prices: dict[str, Price] = Field(
        {}, description="by base, for calls of it and of its adapters: `input`, `cached` and `output`, a million tokens"
    )
    price_per_hour: float | None = Field(
        None, ge=0, description="what an hour of a base's device costs, on top of tokens; training has its own price"
    )

    def priced(self, base: str, amounts: Amounts) -> Amounts:
        """What was used of a base, with its cost; None stays where there is no price at all."""
        price = self.prices.get(base)
        if price is None and self.price_per_hour is None:
            return amounts
        cost = 1000 * price.of(amounts) if price else 0.0
        cost += amounts.device_us * (self.price_per_hour or 0.0) / 3.6
        return amounts.model_copy(update={"cost_nano": round(cost)})
