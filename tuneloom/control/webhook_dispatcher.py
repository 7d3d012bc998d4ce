"""Sends what is due in the outbox, each delivery at least once.

A row is leased by a commit before it is sent, so that of two controls one sends it. A sender that dies in between
leaves a lease that runs out, and the row is sent again under the same `webhook-id`. A receiver that hangs holds threads
of its endpoint's and owner's share, and nobody else's.
"""

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from tuneloom.config import WebhookSettings
from tuneloom.control import audit
from tuneloom.control.retry import retry
from tuneloom.control.webhook_secrets import Vault
from tuneloom.control.webhook_sender import PAUSES_S, Outcome, pause_s
from tuneloom.domain import Actor, AuditTarget, WebhookDelivery, WebhookEndpoint, WebhookTry
from tuneloom.errors import TuneloomError
from tuneloom.store.base import Range, StoreConflict, Write
from tuneloom.store.records import Records, Stored

logger = logging.getLogger(__name__)

# Longer than a try may take with the resolver's own limit, which is not ours.
LEASE_S = 120.0
# A look goes through so many due rows. Where a whole page is due, those of it that must wait for busy endpoints or
# owners are put off, each a little more, so that they do not hide what is behind them.
PAGE = 100
MAX_PAGES = 10
PUT_OFF_S = 5.0
PUT_OFF_EACH_S = 0.2
SWEEP_BATCH = 200
KEPT_TRIES = 10
# What its owner reads; where the keys are is the operator's to know.
UNSIGNED = "It could not be signed: the service cannot read the secret. Its operator's log says why."


class Post(Protocol):
    def send(self, url: str, delivery: WebhookDelivery, secrets: list[str]) -> Outcome: ...


class Dispatcher:
    """Call `tick` again and again from one thread; it starts threads and never waits for one."""

    def __init__(
        self,
        records: Records,
        settings: WebhookSettings,
        vault: Callable[[], Vault],
        sender: Post,
        clock: Callable[[], float] = time.time,
        *,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._records = records
        self._table = records.webhook_deliveries
        self._settings = settings
        self._vault = vault
        self._sender = sender
        self._clock = clock
        self._wake = wake
        self._lock = threading.Lock()
        self._sending: dict[str, WebhookDelivery] = {}

    def tick(self) -> None:
        """Start as many of the due deliveries as may be under way, fairly by owner."""
        now, after = self._clock(), None
        for _ in range(MAX_PAGES):
            page = self._table.query(
                {"state": "pending"}, order_by="next_at", bounds=Range(at_most=now), limit=PAGE, after=after
            )
            passed = self._start_some(page)
            if len(page) < PAGE or len(self._sending) >= self._settings.max_sending:
                return
            self._put_off(passed, now)
            after = page[-1].value

    def drain(self, timeout_s: float) -> bool:
        """Wait for the deliveries that are under way; whether all have ended in time."""
        until = time.monotonic() + timeout_s
        while self._sending and time.monotonic() < until:
            time.sleep(0.01)
        return not self._sending

    def sweep(self) -> None:
        """Remove rows that ended long ago."""
        bounds = Range(at_most=self._clock() - self._settings.keep_s)
        old = self._table.query(order_by="done_at", bounds=bounds, limit=SWEEP_BATCH)
        if not old:
            return
        with suppress(StoreConflict):  # one was replayed just now; the next round goes on
            self._records.commit(*(self._table.delete(stored) for stored in old))

    def _start_some(self, page: list[Stored[WebhookDelivery]]) -> list[Stored[WebhookDelivery]]:
        """Start those that may be; the others come back."""
        settings, passed = self._settings, list[Stored[WebhookDelivery]]()
        with self._lock:
            owners = Counter(row.owner for row in self._sending.values())
            endpoints = Counter(row.endpoint_id for row in self._sending.values())
            waiting = [stored for stored in page if stored.value.id not in self._sending]
        turns = Counter[str]()
        ranked = []
        for stored in waiting:
            # The first of each owner before the second of any.
            turns[stored.value.owner] += 1
            ranked.append((owners[stored.value.owner] + turns[stored.value.owner], len(ranked), stored))
        for _, _, stored in sorted(ranked, key=lambda each: each[:2]):
            row = stored.value
            if (
                owners.total() >= settings.max_sending
                or owners[row.owner] >= settings.max_sending_per_owner
                or endpoints[row.endpoint_id] >= settings.max_sending_per_endpoint
            ):
                passed.append(stored)
                continue
            owners[row.owner] += 1
            endpoints[row.endpoint_id] += 1
            self._start(stored)
        return passed

    def _start(self, stored: Stored[WebhookDelivery]) -> None:
        id = stored.value.id
        with self._lock:
            self._sending[id] = stored.value
        try:
            threading.Thread(target=self._run, args=(stored,), name=f"webhook-{id}", daemon=True).start()
        except RuntimeError:  # the system gives no more threads
            with self._lock:
                del self._sending[id]
            raise

    def _put_off(self, passed: Sequence[Stored[WebhookDelivery]], now: float) -> None:
        places = Counter[str]()
        later = []
        for stored in passed:
            at = now + PUT_OFF_S + PUT_OFF_EACH_S * places[stored.value.endpoint_id]
            places[stored.value.endpoint_id] += 1
            later.append(self._table.replace(stored, stored.value.model_copy(update={"next_at": at})))
        if not later:
            return
        with suppress(StoreConflict):  # one was replayed just now; the next look goes on
            self._records.commit(*later)

    # One delivery, in a thread of its own

    def _run(self, stored: Stored[WebhookDelivery]) -> None:
        try:
            self._deliver(stored)
        except StoreConflict:
            logger.info("delivery is another sender's: %s", stored.value.id)
        except Exception:
            # Its lease runs out, and it is tried again.
            logger.exception("delivery could not be tried: %s", stored.value.id)
        finally:
            with self._lock:
                del self._sending[stored.value.id]
            self._wake()

    def _deliver(self, stored: Stored[WebhookDelivery]) -> None:
        row, now = stored.value, self._clock()
        endpoint = self._records.webhook_endpoints.find(row.endpoint_id)
        if endpoint is None or endpoint.value.disabled_at is not None:
            self._records.commit(self._table.replace(stored, _given_up(row, now, "The endpoint is disabled.")))
            return
        if row.attempts > len(PAUSES_S) + 1:
            self._records.commit(self._table.replace(stored, _given_up(row, now, "Its senders died, again and again.")))
            return
        lease = {"lease": secrets.token_hex(8), "next_at": now + LEASE_S, "attempts": row.attempts + 1}
        leased = row.model_copy(update=lease)
        self._records.commit(self._table.replace(stored, leased))
        outcome = self._try(endpoint.value, leased, now)
        retry(lambda: self._record(leased, outcome))

    def _try(self, endpoint: WebhookEndpoint, row: WebhookDelivery, now: float) -> Outcome:
        try:
            keys = self._vault().secrets_of(endpoint, now)
        except TuneloomError as error:
            logger.error("delivery cannot be signed: %s: %s", row.id, error)
            return Outcome(WebhookTry(at=now, seconds=0.0, error=UNSIGNED))
        return self._sender.send(endpoint.url, row, keys)

    def _record(self, leased: WebhookDelivery, outcome: Outcome) -> None:
        """What came of a try, unless the row is not ours any more: replayed since, or taken by another."""
        stored = self._table.find(leased.id)
        if stored is None or stored.value.lease != leased.lease:
            return
        now = self._clock()
        row = stored.value.model_copy(
            update={"lease": None, "tries": (*stored.value.tries, outcome.tried)[-KEPT_TRIES:]}
        )
        pause = None if row.is_test or outcome.is_gone else pause_s(row.attempts, outcome.retry_after_s)
        if outcome.is_success:
            row = _ended(row, "delivered", now)
        elif pause is None:
            row = _ended(row, "dead", now)
        else:
            row = row.model_copy(update={"next_at": now + pause})
        self._records.commit(self._table.replace(stored, row), *self._judge(row, outcome, now))
        if row.state == "dead":
            logger.warning("delivery given up: %s: %s", row.id, outcome.tried.error)

    def _judge(self, row: WebhookDelivery, outcome: Outcome, now: float) -> list[Write]:
        """Note when an endpoint began to fail, and end that note or the endpoint. Mostly nothing changes."""
        stored = self._records.webhook_endpoints.find(row.endpoint_id)
        if stored is None:
            return []
        endpoint = stored.value
        is_given_up = row.state == "dead" and not row.is_test
        failing_since = None if outcome.is_success else endpoint.failing_since or now
        reason = None
        if outcome.is_gone:
            reason = "The receiver answered 410 (Gone)."
        elif is_given_up and failing_since is not None and now - failing_since > self._settings.disable_after_s:
            days = (now - failing_since) / 86400
            reason = f"Nothing was delivered for {days:.1f} days. The last time: {outcome.tried.error}"
        if endpoint.disabled_at is None and reason is not None:
            return self._disable(stored, reason, failing_since, now)
        if failing_since == endpoint.failing_since:
            return []
        changed = endpoint.model_copy(update={"failing_since": failing_since})
        return [self._records.webhook_endpoints.replace(stored, changed)]

    def _disable(
        self, stored: Stored[WebhookEndpoint], reason: str, failing_since: float | None, now: float
    ) -> list[Write]:
        endpoint = stored.value
        logger.warning("webhook disabled: %s: %s", endpoint.id, reason)
        disabled = endpoint.model_copy(
            update={"disabled_at": now, "disabled_reason": reason, "failing_since": failing_since, "updated_at": now}
        )
        target = AuditTarget(owner=endpoint.owner, type="webhook_endpoint", id=endpoint.id, name=endpoint.name)
        entry = audit.entry(
            Actor(kind="system", id="webhooks"), "webhook_endpoint.disabled", target, {"reason": reason}
        )
        return [self._records.webhook_endpoints.replace(stored, disabled), entry]


def _given_up(row: WebhookDelivery, now: float, why: str) -> WebhookDelivery:
    """A row that is not even tried."""
    last = WebhookTry(at=now, seconds=0.0, error=why)
    return _ended(row.model_copy(update={"tries": (*row.tries, last)[-KEPT_TRIES:]}), "dead", now)


def _ended(row: WebhookDelivery, state: str, now: float) -> WebhookDelivery:
    return row.model_copy(update={"state": state, "done_at": now, "lease": None})
