"""How long steps take, and what follows from it: how much prompt fits a step, and whose sequences sit one out.

Everything is learned from the steps themselves; the same measurements give the same decisions. Knows counts and
milliseconds, no sequences.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Share of a new measurement in a running mean.
_GAIN = 0.2
# A measurement beyond this multiple of what was expected counts as this multiple: a pause of the machine is no cost.
OUTLIER = 4.0
# An owner is held to this share of n times its own time, for what no step shows: its wait to begin, and the hand-over.
_MARGIN = 0.9
# A measured time is taken anew after this much time of steps.
_STALE_MS = 10_000.0


@dataclass
class _Point:
    rows: float
    ms: float
    measured_at_ms: float


@dataclass
class StepCost:
    """A running estimate of a step's milliseconds from its decode rows and prompt tokens.

    Times of steps that only decode are kept by the power of two of their rows; what prompt tokens add is one mean.
    """

    _points: dict[int, _Point] = field(default_factory=dict)
    _prompt_ms: float = 0.0
    _prompt_tokens: float = 0.0
    _total_ms: float = 0.0

    def observe(self, rows: int, prompt_tokens: int, ms: float) -> None:
        self._total_ms += ms
        if prompt_tokens:
            self._observe_prompt(rows, prompt_tokens, ms)
        elif rows:
            self._observe_rows(rows, ms)

    def rows_ms(self, rows: int) -> float | None:
        """Time of a step that decodes `rows`; None while no step as small was measured (anew)."""
        if not rows:
            return 0.0
        points = sorted(self._points.items())
        below = [p for bucket, p in points if bucket <= rows.bit_length()]
        above = [p for bucket, p in points if bucket > rows.bit_length()]
        if not below:
            return None
        low = below[-1]
        if rows <= low.rows or not above:
            return low.ms * max(1.0, rows / low.rows) if not above else low.ms
        high = above[0]
        return low.ms + (high.ms - low.ms) * (rows - low.rows) / (high.rows - low.rows)

    def is_stale(self, rows: int) -> bool:
        """Whether a step of `rows` was not measured, or too long ago to speak for it."""
        point = self._points.get(rows.bit_length())
        return point is None or self._total_ms - point.measured_at_ms > _STALE_MS

    def step_ms(self, rows: int, prompt_tokens: int) -> float | None:
        decoding = self.rows_ms(rows)
        return None if decoding is None else decoding + prompt_tokens * self.prompt_token_ms

    @property
    def prompt_token_ms(self) -> float:
        return self._prompt_ms / self._prompt_tokens if self._prompt_tokens else 0.0

    def prompt_tokens_within(self, ms: float, rows: int) -> float:
        """How many prompt tokens a step of `ms` has room for beside `rows`; without end while nothing is known."""
        each = self.prompt_token_ms
        left = ms - (self.rows_ms(rows) or self._least_ms())
        return max(0.0, left / each) if each else float("inf")

    def _least_ms(self) -> float:
        return min((point.ms for point in self._points.values()), default=0.0)

    def _observe_rows(self, rows: int, ms: float) -> None:
        bucket = rows.bit_length()
        point = self._points.get(bucket)
        if point is None:
            self._points[bucket] = _Point(rows, ms, self._total_ms)
            return
        point.ms += (min(ms, OUTLIER * point.ms) - point.ms) * _GAIN
        point.rows += (rows - point.rows) * _GAIN
        point.measured_at_ms = self._total_ms

    def _observe_prompt(self, rows: int, tokens: int, ms: float) -> None:
        added = max(0.0, ms - (self.rows_ms(rows) or 0.0))
        if self._prompt_tokens:
            added = min(added, OUTLIER * tokens * self.prompt_token_ms)
        keep = 1 - _GAIN
        self._prompt_ms = self._prompt_ms * keep + added
        self._prompt_tokens = self._prompt_tokens * keep + tokens


@dataclass(frozen=True)
class Load:
    """What one owner has to do in a step: rows that decode, and prompt tokens."""

    rows: int
    prompt_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.rows + self.prompt_tokens


@dataclass
class Pace:
    """Holds each of `n` owners to no less than the n-th part of the speed that it would have alone.

    A large step of many sequences takes longer than the small one of a few. An owner with few would pay for the many
    of another; so while it is behind, those that are ahead sit steps out. Nobody gets far ahead or behind: what a pause
    or a load has done is not made up for. Where steps take the same time whatever is in them, nobody sits out.
    """

    cost: StepCost
    _lag_ms: dict[str, float] = field(default_factory=dict)
    _longest_ms: float = 0.0

    def resting(self, loads: Mapping[str, Load], num_owners: int) -> frozenset[str]:
        """The owners that this step leaves out."""
        if len(loads) < 2:
            return frozenset()
        total = sum(load.num_tokens for load in loads.values())
        small = [owner for owner, load in loads.items() if load.num_tokens * num_owners < total]
        # A step of its own is how an owner's time alone becomes known.
        unknown = [o for o in small if not loads[o].prompt_tokens and self.cost.is_stale(loads[o].rows)]
        behind = set(unknown[:1]) or {owner for owner in small if self._lag_ms.get(owner, 0.0) > 0}
        return frozenset(loads) - behind if behind else frozenset()

    def observe(self, present: Mapping[str, Load], resting: frozenset[str], num_owners: int, ms: float) -> None:
        """Account a step of `ms`: what each owner did in it, and who sat it out."""
        expected = self.cost.step_ms(
            sum(load.rows for load in present.values()), sum(load.prompt_tokens for load in present.values())
        )
        if expected:
            ms = min(ms, OUTLIER * expected)
        self._longest_ms = max(ms, self._longest_ms * (1 - _GAIN))
        self._lag_ms = {owner: lag for owner, lag in self._lag_ms.items() if owner in present or owner in resting}
        for owner in [*present, *resting]:
            load = present.get(owner)
            alone = 0.0 if load is None else self.cost.step_ms(load.rows, load.prompt_tokens)
            if alone is not None:
                lag = self._lag_ms.get(owner, 0.0) + ms - _MARGIN * num_owners * alone
                self._lag_ms[owner] = max(-self._longest_ms, min(self._longest_ms, lag))
