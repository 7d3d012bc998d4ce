"""How many replicas a base should have, from what its engines say of their queues. Delays and limits are Serve's.

Serve pickles this module by value and calls the policy in its controller, several times a second.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

    from tuneloom.engine.base import EngineStats

WAITING_TOKENS = "tuneloom_waiting_tokens"
RUNNING = "tuneloom_running"
WAITING = "tuneloom_waiting"
# A replica more than this full is not one to spare. Below 1, so that a replica's end does not bring it back at once.
FULL_SHARE = 0.7


def load_of(stats: "EngineStats") -> dict[str, float]:
    """What a replica reports to Serve for the policy."""
    # Whoever waits, if only for an adapter, has at least one token to come.
    return {WAITING_TOKENS: max(stats.waiting_tokens, stats.waiting), RUNNING: stats.running, WAITING: stats.waiting}


def desired_replicas(
    current: int,
    *,
    waiting_tokens: float,
    running: float,
    waiting: float,
    unsent: float,
    target_waiting_tokens: int,
    max_sequences: int,
) -> int:
    """The number of replicas for this load; all of it is summed over the base and averaged over time.

    Tokens that wait call for more replicas: each may have `target_waiting_tokens`. What runs keeps those that there are
    from ending, and never adds one: a full batch is how an engine is best used. `unsent`: requests without a replica.
    """
    for_queue = math.ceil(waiting_tokens / target_waiting_tokens)
    for_running = math.ceil(running / (max_sequences * FULL_SHARE))
    is_used = running > 0 or waiting > 0 or unsent > 0
    return max(for_queue, min(current, for_running), int(is_used))


class WaitingTokensPolicy:
    """`desired_replicas` as Serve calls it."""

    def __init__(self, target_waiting_tokens: int, max_sequences: int) -> None:
        self._target_waiting_tokens = target_waiting_tokens
        self._max_sequences = max_sequences

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        if not context.current_num_replicas:
            # Serve itself starts the first one when a request waits; until it runs, nothing is known.
            return context.target_num_replicas, {}
        reported: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        totals = {name: sum(reported.get(name, {}).values()) for name in (WAITING_TOKENS, RUNNING, WAITING)}
        number = desired_replicas(
            context.current_num_replicas,
            waiting_tokens=totals[WAITING_TOKENS],
            running=totals[RUNNING],
            waiting=totals[WAITING],
            unsent=context.total_queued_requests,
            target_waiting_tokens=self._target_waiting_tokens,
            max_sequences=self._max_sequences,
        )
        return number, {}
