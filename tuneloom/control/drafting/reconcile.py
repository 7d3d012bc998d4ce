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
from typing import Any

from tuneloom.config import DraftingSettings
from tuneloom.control import audit, files
from tuneloom.control.drafting.collect import Collected, collect
from tuneloom.control.drafting.outcome import ended, store_file, telling, told
from tuneloom.control.drafting.tasks import DrafterTasks
from tuneloom.domain import Draft, DraftCounts, DraftEnd, Drafter, JobError
from tuneloom.store import Store
from tuneloom.store.base import StoreConflict, Write
from tuneloom.store.records import Stored

logger = logging.getLogger(__name__)

MAX_STEPPED = 50
# How often drafters are asked for rows that are missing once all of them are through.
MAX_ROUNDS = 5
# A drafter with less to spend than this gets nowhere: a prompt alone takes a thousand tokens.
MIN_SHARE_INPUT, MIN_SHARE_OUTPUT = 4000, 4000
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
            after = draft.model_copy(update=over)
            # Nothing was used.
            self._records.commit(self._records.drafts.replace(stored, after), *told(self._records, after, now))
            return
        among = min(len(draft.spec.roles), _affordable(draft, DraftCounts()))
        asked = [(number, quota) for number, quota in enumerate(_shares(draft.spec.rows, among)) if quota]
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
            now = self._clock()
            changes = {"state": "running", "attempt": drafter.attempt + 1, "launched_at": now, "heartbeat_at": None}
            after = drafter.model_copy(update=changes)
            self._places -= 1
            self._records.commit(self._records.drafters.replace(stored, after))
            self._tasks.launch(after)
        elif drafter.state == "running" and self._is_lost(drafter):
            # It may have said its last word since it was read: then this conflicts.
            self._lose(stored)

    def _is_lost(self, drafter: Drafter) -> bool:
        seen = self._tasks.observe(drafter.handle)
        if seen == "alive" and drafter.heartbeat_at is None:
            # It waits for room; the time limit of its draft ends that.
            return False
        last = drafter.heartbeat_at or drafter.launched_at or 0.0
        return seen == "over" or self._clock() - last > self._settings.heartbeat_timeout_s

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
        able = able[: _affordable(draft, spent)]
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
        after = ended(draft, values, collected, self._end_of(draft, drafters), now)
        writes: list[Write] = [self._records.drafters.delete(each) for each in drafters]
        if collected.lines:
            file = store_file(self._store, after, collected, now)
            entry = files.told(audit.SYSTEM, "created", file, sha256=file.sha256, draft=draft.id)
            writes += [self._records.files.create(file), entry]
        writes += telling(self._records, after, now)
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


def _affordable(draft: Draft, spent: DraftCounts) -> int:
    """How many drafters can each make some calls of what is left of the budget; one at least."""
    spec, most = draft.spec, len(draft.spec.roles)
    if spec.max_tokens is not None:
        most = min(most, (spec.max_tokens - spent.tokens) // (MIN_SHARE_INPUT + MIN_SHARE_OUTPUT))
    if spec.max_cost is not None and spec.price is not None:
        left = spec.max_cost - spec.price.cost(spent.input_tokens, spent.output_tokens)
        share = spec.price.cost(MIN_SHARE_INPUT, MIN_SHARE_OUTPUT)
        most = min(most, int(left / share)) if share else most
    return max(1, most)


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
