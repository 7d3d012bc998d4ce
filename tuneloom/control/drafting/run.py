"""One drafter's loop: ask, read, sift, keep, until its quota is made or nothing comes of it. No Ray."""

import logging
import time
from collections import Counter
from typing import Any

from tuneloom.config import DraftingSettings, DraftProviderSettings
from tuneloom.control.drafting import shapes
from tuneloom.control.drafting.ledger import Fenced, Ledger, read_rows
from tuneloom.control.drafting.prompts import Prompt, prompt
from tuneloom.control.drafting.providers import Answer, Provider, ProviderFailure, open_provider
from tuneloom.control.drafting.replies import Reply, read_reply
from tuneloom.control.drafting.sieve import Sieve
from tuneloom.domain import ROLE_TEMPERATURES, DraftCounts, Drafter, DraftSpec, JobError
from tuneloom.rows import raw_rows
from tuneloom.rows.parse import parse
from tuneloom.store import Store

logger = logging.getLogger(__name__)

ROWS_PER_CALL = 10
# Calls in a row that give no row before a drafter ends, and that fail.
MAX_EMPTY, MAX_FAILED = 4, 3
# After a call that failed with all its attempts, as a multiple of the provider's `retry_delay_s`.
FAILED_WAIT = 8
# Less room for a reply is not worth a call.
MIN_OUTPUT_TOKENS = 64


def draft(store: Store, settings: DraftingSettings, drafter_id: str, attempt: int) -> None:
    """Run one attempt of a drafter to its end, or until it is fenced. Its record tells how it went."""
    try:
        ledger = Ledger(store, drafter_id, attempt)
    except Fenced:
        return
    spec = store.records.drafts.get(ledger.drafter.draft_id).value.spec
    with ledger.beating(settings.heartbeat_s):
        try:
            configured = _configured(settings, spec)
            provider = open_provider(spec.provider, configured, spec.model)
            try:
                outcome = _Drafting(store, spec, ledger, provider, configured.retry_delay_s * FAILED_WAIT).run()
            finally:
                provider.close()
            ledger.end(outcome)
        except ProviderFailure as failure:
            _end_failed(ledger, failure.error)
        except Fenced:
            logger.info("drafter ended from outside: %s", drafter_id)
        except Exception:
            logger.exception("drafter failed: %s", drafter_id)
            _end_failed(
                ledger, JobError(code="server_error", message="The drafter failed. The server's log tells why.")
            )


def _configured(settings: DraftingSettings, spec: DraftSpec) -> DraftProviderSettings:
    configured = settings.providers.get(spec.provider)
    if configured is None:
        raise ProviderFailure(
            "provider_missing", f"`drafting.providers` has no `{spec.provider}` any more.", is_final=True
        )
    return configured


def _end_failed(ledger: Ledger, error: JobError) -> None:
    try:
        ledger.end(None, error)
    except Fenced:
        logger.info("drafter ended from outside: %s", ledger.drafter.id)


class _Drafting:
    def __init__(self, store: Store, spec: DraftSpec, ledger: Ledger, provider: Provider, failed_wait_s: float) -> None:
        self._spec, self._ledger, self._provider, self._failed_wait_s = spec, ledger, provider, failed_wait_s
        seeds = read_seeds(store, spec)
        self._examples = [shapes.from_row(spec.format, row) for row in seeds]
        self._sieve = Sieve(spec, seeds)
        self._written: list[str] = []
        for batch in ledger.drafter.batches:
            for row in read_rows(store.blobs, batch):
                self._sieve.is_new(row)
                self._written.append(shapes.text_of(row))

    def run(self) -> Any:
        """Why it ended. Raises ProviderFailure."""
        empty = failed = 0
        while (missing := self._drafter.quota - len(self._written)) > 0:
            if empty == MAX_EMPTY:
                return "exhausted"
            asked = self._prompt(min(missing, ROWS_PER_CALL))
            room = self._room(asked)
            if room < MIN_OUTPUT_TOKENS:
                return "budget"
            self._ledger.reserve(asked.likely_tokens, room)
            try:
                answer = self._ask(asked, room)
            except ProviderFailure as failure:
                self._ledger.add([], DraftCounts(calls=1), None)
                failed += 1
                if failure.is_final or failed == MAX_FAILED:
                    raise
                self._wait(max(self._failed_wait_s * failed, failure.retry_after_s))
                continue
            failed = 0
            kept = self._keep(min(missing, ROWS_PER_CALL), missing, asked, answer)
            empty = 0 if kept else empty + 1
        return "quota"

    @property
    def _drafter(self) -> Drafter:
        return self._ledger.drafter

    def _prompt(self, count: int) -> Prompt:
        start = self._drafter.number * 3 + len(self._drafter.batches)
        shift = start % len(self._examples) if self._examples else 0
        examples = self._examples[shift:] + self._examples[:shift]
        return prompt(self._spec, self._drafter.role, count=count, examples=examples, written=self._written)

    def _ask(self, asked: Prompt, room: int) -> Answer:
        return self._provider.answer(
            asked,
            schema=shapes.schema(self._spec.format),
            temperature=ROLE_TEMPERATURES[self._drafter.role],
            # Another for each call, the same when the draft is made again.
            seed=(self._spec.seed + 7919 * self._drafter.number + self._drafter.counts.calls) % 2**31,
            max_tokens=room,
        )

    def _room(self, asked: Prompt) -> int:
        """The longest reply that the budget and the provider allow."""
        drafter, room = self._drafter, self._spec.max_output_tokens
        if drafter.token_limit is not None:
            room = min(room, drafter.token_limit - drafter.counts.tokens - asked.likely_tokens)
        if drafter.cost_limit is not None and self._spec.price is not None:
            price, counts = self._spec.price, drafter.counts
            spent = price.cost(counts.input_tokens + asked.likely_tokens, counts.output_tokens)
            left = (drafter.cost_limit - spent) * 1e6
            room = min(room, int(left / price.output) if price.output else room if left >= 0 else 0)
        return room

    def _keep(self, requested: int, missing: int, asked: Prompt, answer: Answer) -> int:
        """Keep what is of use of an answer; returns how many rows that is."""
        if answer.ended == "blocked" and not answer.text:
            reply = Reply(received=1, dropped=Counter(blocked=1))
        else:
            reply = read_reply(self._spec.format, answer.text)
        kept, dropped = [], Counter(reply.dropped)
        for row in reply.rows:
            reason = "surplus" if len(kept) == missing else self._sieve.reason(row)
            if reason is None:
                kept.append(row)
            else:
                dropped[reason] += 1
        counts = DraftCounts(
            calls=1,
            requested=requested,
            received=reply.received,
            repaired=reply.repaired,
            kept=len(kept),
            dropped=dict(dropped),
            # A provider that does not count is taken to have used what was reserved for the prompt.
            input_tokens=asked.likely_tokens if answer.input_tokens is None else answer.input_tokens,
            output_tokens=len(answer.text.encode()) // 2 if answer.output_tokens is None else answer.output_tokens,
        )
        self._ledger.add(kept, counts, answer.model_version)
        self._written += [shapes.text_of(row) for row in kept]
        return len(kept)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._ledger.is_fenced:
                raise Fenced(self._drafter.id)
            time.sleep(min(left, 0.5))


def read_seeds(store: Store, spec: DraftSpec) -> list[dict[str, Any]]:
    if spec.seeds is None:
        return []
    with store.blobs.open(spec.seeds) as file:
        return [parse(row.raw or b"") for row in raw_rows(file)]
