"""How drafts look on the wire."""

from typing import Any

from tuneloom.domain import Draft, DraftCounts, Drafter, DrafterReport


def show_draft(draft: Draft, drafters: list[Drafter]) -> dict[str, Any]:
    """`drafters` are those of a draft that runs; one that has ended holds what is left of them."""
    spec, price = draft.spec, draft.spec.price
    counts = sum((each.counts for each in drafters), DraftCounts()) if drafters else draft.counts
    cost = None if price is None else price.cost(counts.input_tokens, counts.output_tokens)
    return {
        "id": draft.id,
        "object": "tuneloom.draft",
        "created_at": int(draft.created_at),
        "started_at": None if draft.started_at is None else int(draft.started_at),
        "finished_at": None if draft.finished_at is None else int(draft.finished_at),
        "status": draft.state,
        "is_cancelling": draft.cancel_requested_at is not None and not draft.is_terminal,
        "partial": draft.partial,
        "ended_by": draft.ended_by,
        "error": None if draft.error is None else draft.error.model_dump(include={"code", "message"}),
        "rows": draft.rows if draft.is_terminal else counts.kept,
        "file_id": draft.file_id,
        "counts": counts.model_dump(),
        "cost": cost,
        "currency": None if price is None else price.currency,
        "round": draft.round,
        "drafters": [_show_drafter(each) for each in drafters or draft.drafters],
        "request": {
            **spec.model_dump(exclude={"seeds", "price", "max_output_tokens", "roles", "rows"}),
            "rows": spec.rows,
            "drafters": len(spec.roles),
            "roles": list(spec.roles),
        },
        "provenance": draft.provenance,
    }


def _show_drafter(drafter: Drafter | DrafterReport) -> dict[str, Any]:
    return {
        "number": drafter.number,
        "role": drafter.role,
        "status": drafter.state,
        "outcome": drafter.outcome,
        "losses": drafter.losses,
        "counts": drafter.counts.model_dump(),
        "error": None if drafter.error is None else drafter.error.model_dump(include={"code", "message"}),
    }
