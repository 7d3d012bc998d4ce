"""How a draft has ended: its record at the end, its File, and what others are told of it. No decisions to end it."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from tuneloom.control import outbox
from tuneloom.control.drafting.collect import Collected
from tuneloom.control.drafting.prompts import PROMPTS_SHA256
from tuneloom.domain import (
    ROLE_TEMPERATURES,
    Draft,
    DraftEnd,
    Drafter,
    DrafterReport,
    EventType,
    File,
    JobError,
)
from tuneloom.store import Store
from tuneloom.store.base import Write
from tuneloom.store.records import Records
from tuneloom.store.usage_writer import record_draft


def ended(draft: Draft, drafters: list[Drafter], collected: Collected, reason: DraftEnd | None, now: float) -> Draft:
    rows, error = len(collected.lines), next((each.error for each in drafters if each.error is not None), None)
    is_whole = rows == draft.spec.rows
    ended_by: DraftEnd = "target" if is_whole else reason or _reason(drafters, error)
    state = "cancelled" if ended_by == "cancelled" else "succeeded" if rows else "failed"
    counts = collected.counts(drafters)
    if state == "failed" and error is None:
        error = JobError(code=f"draft_{ended_by}", message=_MESSAGES[ended_by])
    changes = {
        "state": state,
        "finished_at": now,
        "partial": bool(rows) and not is_whole,
        "ended_by": ended_by,
        "rows": rows,
        "counts": counts,
        "drafters": tuple(_report(each) for each in drafters),
        "file_id": draft.target_file if rows else None,
        # A draft that is whole has met no error that matters.
        "error": None if is_whole else error,
    }
    after = draft.model_copy(update=changes)
    return after.model_copy(update={"provenance": _provenance(after) if rows else None})


_MESSAGES: dict[DraftEnd, str] = {
    "budget": "The budget was spent before there was a row that could be kept, or is too small for a call.",
    "time_limit": "The time was over before there was a row that could be kept.",
    "exhausted": "The model gave no rows that could be kept. `counts.dropped` says why.",
    "provider": "The provider gave no rows.",
}


def store_file(store: Store, draft: Draft, collected: Collected, now: float) -> File:
    """The File of a draft that has ended, its bytes stored and its record not yet."""
    blob = f"files/{draft.target_file}"
    # Whoever collects the same batches writes the same bytes.
    sha256 = store.blobs.write(blob, b"".join(collected.lines))
    return File(
        id=draft.target_file,
        owner=draft.owner,
        filename=f"{draft.id}.jsonl",
        purpose="fine-tune",
        size_bytes=sum(map(len, collected.lines)),
        sha256=sha256,
        blob=blob,
        created_at=now,
        provenance=draft.provenance,
    )


def telling(records: Records, draft: Draft, now: float) -> list[Write]:
    """What usage and webhooks are told in the commit that ends a draft."""
    return [*told(records, draft, now), _usage(draft, now)]


def _reason(drafters: list[Drafter], error: JobError | None) -> DraftEnd:
    outcomes = {each.outcome for each in drafters}
    if error is not None:
        return "lost" if error.code == "drafter_lost" else "provider"
    return "budget" if "budget" in outcomes else "exhausted"


def _report(drafter: Drafter) -> DrafterReport:
    names = ("number", "role", "state", "losses", "counts", "outcome", "model_version", "error")
    return DrafterReport(**{name: getattr(drafter, name) for name in names})


_EVENTS: Mapping[str, EventType] = {
    "succeeded": "tuneloom.draft.completed",
    "failed": "tuneloom.draft.failed",
    "cancelled": "tuneloom.draft.cancelled",
}


def told(records: Records, draft: Draft, now: float) -> list[Write]:
    """What webhooks are sent of a draft that has ended."""
    data: dict[str, Any] = {"id": draft.id, "file_id": draft.file_id, "rows": draft.rows, "ended_by": draft.ended_by}
    if draft.error is not None:
        data["error"] = draft.error.model_dump(include={"code", "message"})
    return outbox.writes(records, draft.owner, _EVENTS[draft.state], data, now)


def _usage(draft: Draft, now: float) -> Write:
    counts, price = draft.counts, draft.spec.price
    return record_draft(
        draft.owner,
        draft.id,
        now,
        model=draft.spec.model,
        key_id=draft.key_id,
        input_tokens=counts.input_tokens,
        output_tokens=counts.output_tokens,
        requests=counts.calls,
        cost=None if price is None else price.cost(counts.input_tokens, counts.output_tokens),
    )


def _provenance(draft: Draft) -> dict[str, Any]:
    """How the rows came to be, as it stays with the File."""
    spec = draft.spec
    return {
        "kind": "draft",
        "draft": draft.id,
        "provider": spec.provider,
        "model": spec.model,
        "model_versions": sorted({each.model_version for each in draft.drafters if each.model_version}),
        "prompts_sha256": PROMPTS_SHA256,
        "description": spec.description,
        "topics": list(spec.topics),
        "format": spec.format,
        "language": spec.language,
        "roles": {role: spec.roles.count(role) for role in ROLE_TEMPERATURES if role in spec.roles},
        "temperatures": {role: ROLE_TEMPERATURES[role] for role in ROLE_TEMPERATURES if role in spec.roles},
        "seed": spec.seed,
        "seed_file": spec.seed_file,
        "seed_rows": spec.seed_rows,
        "similarity": spec.similarity,
        "rows": draft.rows,
        "partial": draft.partial,
        "counts": draft.counts.model_dump(),
        "tuneloom": version("tuneloom"),
        "created_at": draft.created_at,
        "started_at": draft.started_at,
        "finished_at": draft.finished_at,
    }
