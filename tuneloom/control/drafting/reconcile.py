"""Carries drafts on: level-triggered, one idempotent step for each at each tick. Nothing is remembered that matters.

    queued -> running      its drafters are written down, each with its share of rows and budget
    running                drafters that wait are launched, within `max_tasks`; lost ones again, `max_losses` times
    all drafters over      their rows are collected; what is still missing is asked for in another round
    running -> succeeded | failed | cancelled      its File, if there are rows, in the same commit

A drafter's record is the fence: who closes it or counts its attempt up has shut out its process, whatever that does.
"""

import concurrent.futures
import logging
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from tuneloom.config import DraftingSettings
from tuneloom.control import outbox
from tuneloom.control.drafting.collect import Collected, collect
from tuneloom.control.drafting.prompts import PROMPTS_SHA256
from tuneloom.control.drafting.tasks import DrafterTasks
from tuneloom.domain import (
    ROLE_TEMPERATURES,
    Draft,
    DraftCounts,
    DraftEnd,
    Drafter,
    DrafterReport,
    EventType,
    File,
    JobError,
)
from tuneloom.store import Store
from tuneloom.store.base import StoreConflict, Write
from tuneloom.store.records import Records, Stored
from tuneloom.store.usage_writer import record_draft

logger = logging.getLogger(__name__)

MAX_STEPPED = 50
# How often drafters are asked for rows that are missing once all of them are through.
MAX_ROUNDS = 5
# Errors that all drafters of a draft would meet: one is enough to close the others.
COMMON = ("provider_key_missing", "provider_key_refused", "provider_missing", "provider_refused")


class Drafts:
    """Call `tick` again and again from one thread. A second one on the same store does no harm."""

    def __init__(
        self,
        store: Store,
        tasks: DrafterTasks,
        settings: DraftingSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._records = store.records
        self._tasks = tasks
        self._settings = settings
        self._clock = clock
        # Sifting a thousand rows takes seconds, in which jobs are not to wait.
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="drafts")
        self._collecting: dict[str, concurrent.futures.Future[Collected]] = {}
        self._places = self._places_each = 0

    def tick(self) -> None:
        found = self._records.drafts.query({"is_open": True}, order_by="created_at", limit=MAX_STEPPED)
        drafters = {stored.value.id: self._drafters(stored.value) for stored in found}
        self._places = self._settings.max_tasks - sum(_count(each, "running") for each in drafters.values())
        wanting = sum(any(not s.value.is_over for s in each) for each in drafters.values())
        self._places_each = max(1, self._settings.max_tasks // max(1, wanting))
        for stored in found:
            try:
                self._step(stored, drafters[stored.value.id])
            except StoreConflict:
                logger.info("draft changed meanwhile, the next tick goes on: %s", stored.value.id)
            except Exception:
                # One draft is not to hold up the others.
                logger.exception("draft cannot be carried on: %s", stored.value.id)
        for gone in self._collecting.keys() - drafters.keys():
            del self._collecting[gone]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _step(self, stored: Stored[Draft], drafters: list[Stored[Drafter]]) -> None:
        draft = stored.value
        if draft.is_terminal:
            self._tidy(stored)
        elif draft.state == "queued":
            self._begin(stored)
        elif any(not each.value.is_over for each in drafters):
            if (reason := self._end_of(draft, drafters)) is not None:
                self._close(drafters)
                # The reason is found again at the next tick.
                logger.info("draft closed: %s: %s", draft.id, reason)
            else:
                room = min(self._places, self._places_each - _count(drafters, "running"))
                waiting = [each for each in drafters if each.value.state == "waiting"][: max(0, room)]
                for each in drafters:
                    self._carry(each, may_launch=each in waiting)
        elif (collected := self._collected(draft, drafters)) is not None:
            self._conclude(stored, drafters, collected)

    def _drafters(self, draft: Draft) -> list[Stored[Drafter]]:
        if draft.is_terminal or draft.state == "queued":
            return []
        found = self._records.drafters.query({"draft_id": draft.id})
        return sorted(found, key=lambda stored: stored.value.number)

    def _begin(self, stored: Stored[Draft]) -> None:
        draft, now = stored.value, self._clock()
        if draft.cancel_requested_at is not None:
            over = {"state": "cancelled", "ended_by": "cancelled", "finished_at": now}
            self._records.commit(self._records.drafts.replace(stored, draft.model_copy(update=over)))
            return
        quotas = _shares(draft.spec.rows, len(draft.spec.roles))
        asked = [(number, quota) for number, quota in enumerate(quotas) if quota]
        limits = _limits(draft, DraftCounts(), len(asked))
        new = [
            Drafter(
                id=f"{draft.id}-d{number}",
                owner=draft.owner,
                draft_id=draft.id,
                number=number,
                role=draft.spec.roles[number],
                quota=quota,
                **limits,
            )
            for number, quota in asked
        ]
        after = draft.model_copy(update={"state": "running", "started_at": now})
        self._records.commit(
            self._records.drafts.replace(stored, after), *(self._records.drafters.create(each) for each in new)
        )
        logger.info("draft begun: %s: %d drafters", draft.id, len(new))

    def _end_of(self, draft: Draft, drafters: Sequence[Stored[Drafter]]) -> DraftEnd | None:
        """Why drafters that are not through have to end."""
        if draft.cancel_requested_at is not None:
            return "cancelled"
        if self._is_late(draft):
            return "time_limit"
        if any(each.value.error is not None and each.value.error.code in COMMON for each in drafters):
            return "provider"
        return None

    def _is_late(self, draft: Draft) -> bool:
        assert draft.started_at is not None
        return self._clock() >= draft.started_at + draft.spec.time_limit_s

    def _close(self, drafters: Sequence[Stored[Drafter]]) -> None:
        """Shut the processes out, then end them. What they have kept until here counts."""
        for stored in drafters:
            drafter = stored.value
            if not drafter.is_over:
                closed = _settled(drafter).model_copy(update={"state": "closed"})
                self._records.commit(self._records.drafters.replace(stored, closed))
                self._tasks.stop(drafter.handle)

    def _carry(self, stored: Stored[Drafter], *, may_launch: bool) -> None:
        drafter = stored.value
        if drafter.is_over:
            self._tasks.stop(drafter.handle)
        elif may_launch:
            changes = {"state": "running", "attempt": drafter.attempt + 1, "heartbeat_at": self._clock()}
            after = drafter.model_copy(update=changes)
            self._places -= 1
            self._records.commit(self._records.drafters.replace(stored, after))
            self._tasks.launch(after)
        elif drafter.state == "running" and self._is_lost(drafter):
            # It may have said its last word since it was read: then this conflicts.
            self._lose(stored)

    def _is_lost(self, drafter: Drafter) -> bool:
        seen = self._tasks.observe(drafter.handle)
        silent_s = self._clock() - (drafter.heartbeat_at or 0.0)
        return seen == "over" or (silent_s > self._settings.heartbeat_timeout_s)

    def _lose(self, stored: Stored[Drafter]) -> None:
        drafter = stored.value
        changes: dict[str, Any] = {"losses": drafter.losses + 1, "state": "waiting"}
        if drafter.losses >= self._settings.max_losses:
            message = f"The drafter's process was lost {drafter.losses + 1} times."
            changes |= {"state": "failed", "error": JobError(code="drafter_lost", message=message)}
        after = _settled(drafter).model_copy(update=changes)
        self._records.commit(self._records.drafters.replace(stored, after))
        self._tasks.stop(drafter.handle)
        logger.info("drafter lost: %s", drafter.handle)

    def _collected(self, draft: Draft, drafters: Sequence[Stored[Drafter]]) -> Collected | None:
        """The rows of drafters that are all over, or None while they are being sifted."""
        future = self._collecting.get(draft.id)
        if future is None:
            values = [each.value for each in drafters]
            future = self._collecting[draft.id] = self._pool.submit(collect, self._store, draft.spec, values)
        if not future.done():
            return None
        del self._collecting[draft.id]
        return future.result()

    def _conclude(self, stored: Stored[Draft], drafters: list[Stored[Drafter]], collected: Collected) -> None:
        draft = stored.value
        missing = draft.spec.rows - len(collected.lines)
        # Those who made what they were asked for, and can spend more, are asked again.
        able = [each for each in drafters if each.value.outcome == "quota"]
        may = self._end_of(draft, drafters) is None and draft.round < MAX_ROUNDS
        if missing and may and able:
            self._ask_again(stored, able, drafters, missing)
        else:
            self._finish(stored, drafters, collected)

    def _ask_again(
        self, stored: Stored[Draft], able: list[Stored[Drafter]], drafters: list[Stored[Drafter]], missing: int
    ) -> None:
        draft = stored.value
        spent = sum((each.value.counts for each in drafters), DraftCounts())
        shares = [(each, share) for each, share in zip(able, _shares(missing, len(able)), strict=True) if share]
        writes: list[Write] = []
        for each, share in shares:
            drafter = each.value
            more = {
                "quota": sum(batch.rows for batch in drafter.batches) + share,
                "state": "waiting",
                "outcome": None,
                **_limits(draft, spent, len(shares), drafter.counts),
            }
            writes.append(self._records.drafters.replace(each, drafter.model_copy(update=more)))
        after = draft.model_copy(update={"round": draft.round + 1})
        self._records.commit(self._records.drafts.replace(stored, after), *writes)
        logger.info("draft goes into another round: %s: %d rows are missing", draft.id, missing)

    def _finish(self, stored: Stored[Draft], drafters: list[Stored[Drafter]], collected: Collected) -> None:
        draft, now = stored.value, self._clock()
        values = [each.value for each in drafters]
        after = _ended(draft, values, collected, self._end_of(draft, drafters), now)
        writes: list[Write] = [self._records.drafters.delete(each) for each in drafters]
        if collected.lines:
            blob = f"files/{draft.target_file}"
            # Whoever collects the same batches writes the same bytes.
            sha256 = self._store.blobs.write(blob, b"".join(collected.lines))
            file = File(
                id=draft.target_file,
                owner=draft.owner,
                filename=f"{draft.id}.jsonl",
                purpose="fine-tune",
                size_bytes=sum(map(len, collected.lines)),
                sha256=sha256,
                blob=blob,
                created_at=now,
                provenance=after.provenance,
            )
            writes.append(self._records.files.create(file))
        writes += [*_told(self._records, after, now), _usage(after, now)]
        self._records.commit(self._records.drafts.replace(stored, after), *writes)
        for drafter in values:
            self._tasks.stop(drafter.handle)
        logger.info("draft ended: %s: %s by %s, %d rows", draft.id, after.state, after.ended_by, after.rows)

    def _tidy(self, stored: Stored[Draft]) -> None:
        """The rows are in the File; their pieces and the seeds go."""
        for blob in self._store.blobs.list(f"drafts/{stored.value.id}"):
            self._store.blobs.delete(blob.key)
        after = stored.value.model_copy(update={"is_open": False})
        self._records.commit(self._records.drafts.replace(stored, after))


def _count(drafters: Sequence[Stored[Drafter]], state: str) -> int:
    return sum(stored.value.state == state for stored in drafters)


def _settled(drafter: Drafter) -> Drafter:
    """What a call that was under way may have taken counts as spent."""
    counts = drafter.counts
    spent = {
        "input_tokens": counts.input_tokens + drafter.reserved_input,
        "output_tokens": counts.output_tokens + drafter.reserved_output,
    }
    return drafter.model_copy(
        update={"counts": counts.model_copy(update=spent), "reserved_input": 0, "reserved_output": 0}
    )


def _shares(total: int, among: int) -> list[int]:
    """Whole numbers that differ by one at most, the larger first."""
    share, rest = divmod(total, among)
    return [share + (index < rest) for index in range(among)]


def _limits(draft: Draft, spent: DraftCounts, among: int, own: DraftCounts | None = None) -> dict[str, Any]:
    """What each of so many drafters may spend in all: its own until here, and its share of what is left."""
    own, spec = own or DraftCounts(), draft.spec
    limits: dict[str, Any] = {}
    if spec.max_tokens is not None:
        limits["token_limit"] = own.tokens + max(0, spec.max_tokens - spent.tokens) // among
    if spec.max_cost is not None and spec.price is not None:
        left = spec.max_cost - spec.price.cost(spent.input_tokens, spent.output_tokens)
        limits["cost_limit"] = spec.price.cost(own.input_tokens, own.output_tokens) + max(0.0, left) / among
    return limits


def _ended(draft: Draft, drafters: list[Drafter], collected: Collected, reason: DraftEnd | None, now: float) -> Draft:
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
    "budget": "The budget was spent before there was a row that could be kept.",
    "time_limit": "The time was over before there was a row that could be kept.",
    "exhausted": "The model gave no rows that could be kept. `counts.dropped` says why.",
    "provider": "The provider gave no rows.",
}


def _reason(drafters: list[Drafter], error: JobError | None) -> DraftEnd:
    outcomes = {each.outcome for each in drafters}
    if error is not None:
        return "lost" if error.code == "drafter_lost" else "provider"
    return "budget" if "budget" in outcomes else "exhausted"


def _report(drafter: Drafter) -> DrafterReport:
    names = ("number", "role", "state", "losses", "counts", "outcome", "model_version", "error")
    return DrafterReport(**{name: getattr(drafter, name) for name in names})


def _told(records: Records, draft: Draft, now: float) -> list[Write]:
    """What webhooks are sent; nothing of a draft whose owner has ended it."""
    if draft.state == "cancelled":
        return []
    data = {"id": draft.id, "file_id": draft.file_id, "rows": draft.rows, "ended_by": draft.ended_by}
    type: EventType = "tuneloom.draft.completed" if draft.state == "succeeded" else "tuneloom.draft.failed"
    return outbox.writes(records, draft.owner, type, data, now)


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
