"""A base's replicas and adapters as operators read them in JSON. No routes, no Ray."""

from dataclasses import asdict
from typing import Any

from tuneloom.engine.base import AdapterState, EngineStats, TierStats
from tuneloom.errors import TuneloomError


def show_stats(stats: EngineStats) -> dict[str, Any]:
    """One replica's numbers. What only this engine has is in `details`."""
    return {
        "running": stats.running,
        "waiting": stats.waiting,
        "waiting_tokens": stats.waiting_tokens,
        "preemptions": stats.preemptions,
        "steps": stats.steps,
        "step_ms": round(stats.step_ms, 2),
        "step_tokens": round(stats.step_tokens, 1),
        "tokens_per_s": round(stats.tokens_per_s, 1),
        "tokens_generated": stats.tokens_generated,
        "kv_tokens_used": stats.kv_tokens_used,
        "kv_tokens_total": stats.kv_tokens_total,
        "tiers": {name: _show_tier(tier) for name, tier in stats.tiers.items()},
        "details": stats.extra,
    }


def _show_tier(tier: TierStats) -> dict[str, Any]:
    asked = tier.hits + tier.misses
    return {**asdict(tier), "fill_s": round(tier.fill_s, 3), "hit_rate": round(tier.hits / asked, 4) if asked else None}


def show_adapter(replica: str, state: AdapterState, names: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "object": "tuneloom.base.adapter",
        "replica": replica,
        "sha256": state.sha256,
        "models": names,
        "tier": state.tier,
        "rank": state.rank,
        "bytes": state.size_bytes,
        "in_use": state.in_use,
        "pinned": state.is_pinned,
        "last_used_at": int(state.last_used_at),
    }


def show_outcome(replica: str, answer: object) -> dict[str, Any]:
    if isinstance(answer, TuneloomError):
        return {"id": replica, "status": "error", **answer.body()}
    return {"id": replica, "status": "ok"}
