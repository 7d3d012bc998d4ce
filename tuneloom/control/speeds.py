"""How fast jobs of one kind are, from those that have ended. Pure.

A run takes a fixed time (loading, saving, checks), so long for each step whatever is in it, and so long per token: one
that is only scored counts a third, one whose activations are computed twice four thirds.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tuneloom.domain import Speed

SCORED_SHARE, RECOMPUTED_SHARE = 1 / 3, 4 / 3
# Steps from half to twice the tokens count as alike: small ones cost more per token.
LIKE_STEPS = 2.0
# What the spread of few jobs is mixed with: two jobs' worth of a log-standard deviation of 12 %.
PRIOR_JOBS, PRIOR_SPREAD = 2, 0.12
# The 5 % quantile of a normal distribution: nine of ten lie between it and its mirror image.
TAIL = 1.645


@dataclass(frozen=True)
class Prior:
    """A guess without any job of the kind. `factor`: how far off either way it may be.

    A step takes `step_s` whatever is in it, and besides `step_s_per_byte` of the base, whose weights it reads.
    """

    fixed_s: float
    s_per_token_and_parameter: float
    step_s: float
    step_s_per_byte: float
    factor: float


CPU = Prior(20.0, 2.0e-11, 0.015, 4e-10, 3.0)
# Four operations per token and parameter (forward, and backward through frozen weights) at 30 of an L4's 121 Tflop/s.
GPU = Prior(30.0, 1.3e-13, 0.1, 1e-11, 4.0)
# What the time of a step may be, in that of the prior, where jobs tell; how much more likely the prior itself is, as
# the variance that a factor of e costs; and the most that it may be of the shortest steps there were.
STEP_FACTORS, STEP_PENALTY, MAX_STEP_SHARE = (0.0, *(2 ** (power / 4) for power in range(-20, 13))), 0.002, 0.8


@dataclass(frozen=True)
class Work:
    """What a run computes. `scored` tokens are those of evaluations and of a reference."""

    trained: int
    scored: int
    steps: int
    is_recomputed: bool

    @property
    def tokens_like(self) -> float:
        """As many tokens, trained on as usual, take as long."""
        return self.trained * (RECOMPUTED_SHARE if self.is_recomputed else 1.0) + SCORED_SHARE * self.scored

    @property
    def step_tokens(self) -> float:
        return max(1.0, self.trained / max(1, self.steps))


@dataclass(frozen=True)
class _Ran:
    """A job of the past: its work, the seconds in which it was done, and the rest."""

    speed: Speed
    work: Work
    working_s: float

    def rate(self, step_s: float) -> float:
        """Seconds for a token beside the time of steps."""
        return max(0.0, self.working_s - step_s * self.work.steps) / max(1.0, self.work.tokens_like)

    def seconds(self, fixed_s: float, step_s: float, rate: float) -> float:
        """What it would have been estimated at."""
        return max(0.1, fixed_s + step_s * self.work.steps + rate * self.work.tokens_like)


def _ran(speed: Speed) -> _Ran:
    work = Work(speed.tokens, speed.evaluated_tokens, speed.steps, speed.is_recomputed)
    return _Ran(speed, work, max(1e-3, speed.seconds - speed.fixed_s))


@dataclass(frozen=True)
class Fit:
    """Seconds, the factor that bounds nine of ten runs either way, and the jobs that they were taken from."""

    seconds: float
    factor: float
    jobs: tuple[Speed, ...]


def fit(work: Work, speeds: Sequence[Speed], prior_step_s: float) -> Fit:
    """What `work` takes by `speeds`, one at least, where a step may take `prior_step_s` beside its tokens."""
    jobs = [_ran(speed) for speed in speeds]
    step_s = _step_time(jobs, prior_step_s)
    jobs = [job for job in jobs if _is_like(job.work, work)] or jobs
    fixed_s = statistics.median(job.speed.fixed_s for job in jobs)
    rate = statistics.median(job.rate(step_s) for job in jobs)
    misses = [math.log(max(0.1, job.speed.seconds) / job.seconds(fixed_s, step_s, rate)) for job in jobs]
    variance = (PRIOR_JOBS * PRIOR_SPREAD**2 + sum(miss**2 for miss in misses)) / (PRIOR_JOBS + len(jobs))
    factor = math.exp(TAIL * math.sqrt(variance * (1 + 1 / len(jobs))))
    seconds = fixed_s + step_s * work.steps + rate * work.tokens_like
    return Fit(seconds, factor, tuple(job.speed for job in jobs))


def _step_time(jobs: Sequence[_Ran], prior_s: float) -> float:
    """The seconds of a step beside its tokens with which these jobs took most nearly as long per token."""
    limit = MAX_STEP_SHARE * min(job.working_s / max(1, job.work.steps) for job in jobs)

    def cost(step_s: float) -> float:
        rates = [math.log(job.rate(step_s)) for job in jobs]
        center = statistics.median(rates)
        unlikely = math.log(max(step_s, prior_s / 16) / prior_s) ** 2
        return sum((rate - center) ** 2 for rate in rates) + STEP_PENALTY * unlikely

    return min((min(limit, factor * prior_s) for factor in STEP_FACTORS), key=cost)


def _is_like(one: Work, other: Work) -> bool:
    return 1 / LIKE_STEPS <= one.step_tokens / other.step_tokens <= LIKE_STEPS
