"""What is in the outbox is sent at least once, whoever dies; who hangs holds up nobody else. Hours pass by a clock."""

import threading
import time
from collections import Counter
from collections.abc import Iterator

import openai
import pytest

from tests.control.conftest import add_job
from tests.control.fakes import FakeClock
from tests.control.receivers import answers, closes, drips_headers, hangs, receiver
from tests.control.test_outbox import add_endpoint, rows
from tuneloom.config import Settings, WebhookSettings
from tuneloom.control import outbox
from tuneloom.control.deployment import ControlLoop
from tuneloom.control.webhook_dispatcher import LEASE_S, UNSIGNED, Dispatcher
from tuneloom.control.webhook_secrets import new_secret, open_vault
from tuneloom.control.webhook_sender import PAUSES_S, Outcome, Sender
from tuneloom.domain import WebhookDelivery, WebhookTry
from tuneloom.store import Store, open_blobs, open_documents
from tuneloom.store.records import Records

SECRET = new_secret()


class StubSender:
    """Answers by endpoint: a status, None for no answer, or an event to wait for."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.answers: dict[str, int | threading.Event | None] = {}
        self.sent: list[str] = []
        self.under_way = Counter[str]()
        self.most = Counter[str]()
        self.retry_after_s = 0.0
        self.lock = threading.Lock()

    def send(self, url: str, delivery: WebhookDelivery, secrets: list[str]) -> Outcome:
        assert secrets == [SECRET]
        with self.lock:
            self.sent.append(delivery.id)
            for name in ("all", delivery.owner, delivery.endpoint_id):
                self.under_way[name] += 1
                self.most[name] = max(self.most[name], self.under_way[name])
        answer = self.answers.get(delivery.endpoint_id, 200)
        if isinstance(answer, threading.Event):
            assert answer.wait(30)
            answer = 200
        with self.lock:
            for name in ("all", delivery.owner, delivery.endpoint_id):
                self.under_way[name] -= 1
        error = None if answer is not None and 200 <= answer < 300 else f"It answered {answer}."
        tried = WebhookTry(at=self.clock(), seconds=0.1, status=answer, error=error)
        return Outcome(tried, self.retry_after_s)


class World:
    def __init__(self, store: Store, settings: Settings) -> None:
        self.store, self.settings = store, settings
        self.clock = FakeClock()
        self.sender = StubSender(self.clock)
        self.vault = open_vault(settings)
        self.dispatcher = self.control()

    def control(self, sender=None) -> Dispatcher:
        records, settings = self.store.records, self.settings
        return Dispatcher(records, settings.webhooks, lambda: self.vault, sender or self.sender, self.clock)

    def endpoint(self, id: str = "we_1", **fields) -> None:
        add_endpoint(self.store, id, **fields)
        self.change(id, secret=self.vault.seal(SECRET))

    def change(self, id: str, **fields) -> None:
        stored = self.store.records.webhook_endpoints.get(id)
        after = stored.value.model_copy(update=fields)
        self.store.records.commit(self.store.records.webhook_endpoints.replace(stored, after))

    def happen(self, owner: str = "ada") -> None:
        self.clock.advance(0.001)
        writes = outbox.writes(self.store.records, owner, "fine_tuning.job.failed", {"id": "ftjob-1"}, self.clock())
        self.store.records.commit(*writes)

    def tick(self) -> None:
        self.dispatcher.tick()
        assert self.dispatcher.drain(30)

    def row(self) -> WebhookDelivery:
        (row,) = rows(self.store)
        return row

    def endpoint_now(self, id: str = "we_1"):
        return self.store.records.webhook_endpoints.get(id).value


@pytest.fixture
def world(store, tmp_path) -> World:
    return World(store, Settings(home=tmp_path))


def test_what_is_due_is_sent_once(world):
    world.endpoint()
    world.happen()
    world.tick()
    world.tick()
    row = world.row()
    assert world.sender.sent == [row.id]
    assert (row.state, row.attempts, row.lease, row.done_at) == ("delivered", 1, None, world.clock())
    assert [(tried.status, tried.error) for tried in row.tries] == [(200, None)]


def test_a_failing_receiver_is_tried_ten_times_by_the_schedule_and_given_up(world):
    world.endpoint()
    world.sender.answers["we_1"] = 500
    world.happen()
    began = world.clock()
    for n, pause in enumerate(PAUSES_S, 1):
        world.tick()
        row = world.row()
        assert (row.state, row.attempts, len(world.sender.sent)) == ("pending", n, n)
        assert abs(row.next_at - world.clock() - pause) <= 0.1 * pause
        world.clock.at = row.next_at - 0.01
        world.tick()
        assert len(world.sender.sent) == n, "not before its time"
        world.clock.at = row.next_at
    world.tick()
    row = world.row()
    assert (row.state, row.attempts, len(row.tries), row.done_at) == ("dead", 10, 10, world.clock())
    assert len(set(world.sender.sent)) == 1, "one id for all tries"
    assert 0.9 < (world.clock() - began) / sum(PAUSES_S) < 1.1
    world.clock.advance(10 * 86400)
    world.tick()
    assert len(world.sender.sent) == 10
    assert world.endpoint_now().disabled_at is None


def test_it_recovers_and_forgets_that_it_failed(world):
    world.endpoint()
    world.sender.answers["we_1"] = None
    world.happen()
    world.tick()
    assert world.endpoint_now().failing_since == world.clock()
    world.sender.answers["we_1"] = 204
    world.clock.advance(6)
    world.tick()
    row = world.row()
    assert (row.state, [tried.status for tried in row.tries]) == ("delivered", [None, 204])
    assert world.endpoint_now().failing_since is None


def test_retry_after_puts_the_next_try_off(world):
    world.endpoint()
    world.sender.answers["we_1"], world.sender.retry_after_s = 503, 3600.0
    world.happen()
    world.tick()
    assert world.row().next_at == world.clock() + 3600


def test_gone_disables_the_endpoint_at_once(world):
    world.endpoint()
    world.sender.answers["we_1"] = 410
    world.happen()
    world.tick()
    assert world.row().state == "dead"
    endpoint = world.endpoint_now()
    assert endpoint.disabled_at == world.clock() and "410" in endpoint.disabled_reason
    world.happen()
    assert len(rows(world.store)) == 1, "a disabled endpoint is told nothing"
    (entry,) = [stored.value for stored in world.store.records.audit_entries.query({"owner": "ada"})]
    assert (entry.action, entry.actor.kind, entry.target.id) == ("webhook_endpoint.disabled", "system", "we_1")


def test_an_endpoint_that_only_fails_for_days_is_disabled_and_what_waits_is_dead(world):
    world.endpoint()
    world.sender.answers["we_1"] = 500
    for _ in range(8 * 4):
        world.happen()
        for _ in range(4):
            world.tick()
            world.clock.advance(1.5 * 3600)
    endpoint = world.endpoint_now()
    days = (endpoint.disabled_at - endpoint.failing_since) / 86400
    assert 5 < days < 6
    assert endpoint.disabled_reason == f"Nothing was delivered for {days:.1f} days. The last time: It answered 500."
    world.clock.advance(2 * 86400)
    for _ in range(50):
        world.tick()
    assert {row.state for row in rows(world.store)} == {"dead"}
    assert any(row.tries[-1].error == "The endpoint is disabled." for row in rows(world.store))


def test_one_success_in_between_keeps_it_enabled(world):
    world.endpoint()
    for quarter in range(7 * 4):
        world.sender.answers["we_1"] = 200 if quarter == 12 else 500
        world.happen()
        world.tick()
        world.clock.advance(6 * 3600)
    assert world.endpoint_now().disabled_at is None


def test_a_delivery_to_a_deleted_endpoint_ends(world):
    world.endpoint()
    world.happen()
    records = world.store.records
    records.commit(records.webhook_endpoints.delete(records.webhook_endpoints.get("we_1")))
    world.tick()
    assert world.row().state == "dead" and world.sender.sent == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("dies", ["before the lease", "before sending", "after sending"])
def test_a_process_that_dies_at_a_delivery_leaves_it_to_the_next(world, dies, monkeypatch):
    """At least once, and always under the same id; nothing is sent twice while the lease lasts."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    world.endpoint()
    world.happen()

    class Dying(StubSender):
        def send(self, url, delivery, secrets):
            if dies == "after sending":
                world.sender.sent.append(delivery.id)
            raise Killed

    control = world.control(Dying(world.clock))
    if dies == "before the lease":
        monkeypatch.setattr(control._records.webhook_endpoints, "find", lambda _: (_ for _ in ()).throw(Killed))
    control.tick()
    assert control.drain(30)
    monkeypatch.undo()
    before = len(world.sender.sent)
    world.tick()
    if dies != "before the lease":
        assert len(world.sender.sent) == before, "leased"
        world.clock.advance(LEASE_S)
        world.tick()
    row = world.row()
    assert row.state == "delivered"
    assert world.sender.sent == [row.id] * (2 if dies == "after sending" else 1)


def test_a_delivery_that_kills_its_senders_is_given_up(world, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    world.endpoint()
    world.happen()

    class Dying(StubSender):
        def send(self, url, delivery, secrets):
            raise Killed

    world.dispatcher = world.control(Dying(world.clock))
    for _ in range(15):
        world.tick()
        world.clock.advance(LEASE_S)
    row = world.row()
    assert (row.state, row.tries[-1].error) == ("dead", "Its senders died, again and again.")


def test_two_controls_send_each_delivery_once(world):
    for n in range(5):
        world.endpoint(f"we_{n}", owner=f"owner{n}")
        for _ in range(4):
            world.happen(f"owner{n}")
    other = world.control()
    for _ in range(40):
        threads = [threading.Thread(target=each.tick) for each in (world.dispatcher, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert world.dispatcher.drain(30) and other.drain(30)
    assert {row.state for row in rows(world.store)} == {"delivered"}
    assert len(world.sender.sent) == len(set(world.sender.sent)) == 20


def test_a_late_sender_does_not_overwrite_what_came_after_it(world):
    """Its lease ran out while it was away; the row is somebody else's and delivered."""
    world.endpoint()
    world.happen()
    held = world.sender.answers["we_1"] = threading.Event()
    world.dispatcher.tick()
    wait_for(lambda: world.sender.sent)
    world.clock.advance(LEASE_S)
    other = StubSender(world.clock)
    second = world.control(other)
    second.tick()
    assert second.drain(30)
    done = world.row()
    assert done.state == "delivered" and done.attempts == 2
    held.set()
    assert world.dispatcher.drain(30)
    assert world.row() == done


def test_a_receiver_that_hangs_holds_up_nobody_else(world):
    """Fifty endpoints of one owner hang with hundreds due before those of others: at most her share is taken."""
    held = threading.Event()
    for n in range(20):
        world.endpoint(f"we_{n}", owner="mallory")
        world.sender.answers[f"we_{n}"] = held
    for _ in range(15):
        world.happen("mallory")
    world.endpoint("we_ada")
    world.happen("ada")
    for _ in range(3):
        world.dispatcher.tick()
    ada = next(row.id for row in rows(world.store) if row.owner == "ada")
    wait_for(lambda: next(row.state for row in rows(world.store) if row.id == ada) == "delivered")
    assert world.sender.most["mallory"] == 4 and max(world.sender.most[f"we_{n}"] for n in range(20)) == 1
    held.set()
    assert world.dispatcher.drain(30)
    for _ in range(200):
        world.clock.advance(1)
        world.tick()
    assert {row.state for row in rows(world.store)} == {"delivered"}, "what was put off was not forgotten"


def test_owners_take_turns(world):
    world.settings = world.settings.model_copy(update={"webhooks": WebhookSettings(max_sending=4)})
    world.dispatcher = world.control()
    held = threading.Event()
    for owner in ("ada", "bob"):
        for n in range(4):
            world.endpoint(f"we_{owner}{n}", owner=owner)
            world.sender.answers[f"we_{owner}{n}"] = held
    world.happen("ada")
    world.happen("bob")
    world.dispatcher.tick()
    wait_for(lambda: world.sender.under_way["all"] == 4)
    assert (world.sender.most["ada"], world.sender.most["bob"]) == (2, 2)
    held.set()
    assert world.dispatcher.drain(30)
    assert world.sender.most["all"] == 4


def test_a_secret_that_cannot_be_read_is_a_failure_like_others(world, caplog):
    world.endpoint()
    world.change("we_1", secret="nonsense")
    world.happen()
    world.tick()
    row = world.row()
    assert (row.state, world.sender.sent, row.tries[0].error) == ("pending", [], UNSIGNED)
    assert "cannot be decrypted" in caplog.text and "webhooks.key_file" not in UNSIGNED


def test_what_ended_long_ago_is_swept(world):
    world.endpoint()
    world.happen()
    world.tick()
    world.sender.answers["we_1"] = 500
    world.happen()
    world.tick()
    world.clock.advance(30 * 86400 - 1)
    world.dispatcher.sweep()
    assert len(rows(world.store)) == 2
    world.clock.advance(2)
    world.dispatcher.sweep()
    assert [row.state for row in rows(world.store)] == ["pending"]


def test_a_store_that_is_away_is_no_end(world, monkeypatch):
    world.endpoint()
    world.happen()
    with monkeypatch.context() as patch:
        patch.setattr(world.store.records.webhook_deliveries, "_documents", None)
        with pytest.raises(AttributeError):
            world.dispatcher.tick()
    world.tick()
    assert world.row().state == "delivered"


def test_a_thread_that_cannot_start_holds_no_place(world, monkeypatch):
    world.endpoint()
    world.happen()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            world.dispatcher.tick()
    world.tick()
    assert world.row().state == "delivered"


@pytest.fixture
def cloud(firestore_url, tmp_path) -> Iterator[World]:
    store = Store(Records(open_documents(firestore_url)), open_blobs(f"file:{tmp_path / 'blobs'}"))
    yield World(store, Settings(home=tmp_path))
    store.close()


def test_on_firestore_two_controls_send_each_delivery_once_and_try_again(cloud):
    for n in range(3):
        cloud.endpoint(f"we_{n}", owner=f"owner{n}")
        for _ in range(2):
            cloud.happen(f"owner{n}")
    cloud.sender.answers["we_2"] = 500
    other = cloud.control()
    for _ in range(4):
        for each in (cloud.dispatcher, other):
            each.tick()
        assert cloud.dispatcher.drain(60) and other.drain(60)
    assert Counter(row.state for row in rows(cloud.store)) == {"delivered": 4, "pending": 2}
    assert len(cloud.sender.sent) == len(set(cloud.sender.sent)) == 6
    cloud.sender.answers["we_2"] = 200
    cloud.clock.advance(6)
    for _ in range(2):
        cloud.tick()
    assert Counter(row.state for row in rows(cloud.store)) == {"delivered": 6}
    cloud.clock.advance(31 * 86400)
    cloud.dispatcher.sweep()
    assert rows(cloud.store) == []


def test_real_receivers_that_misbehave_get_it_in_the_end(store, tmp_path):
    """A loop as control runs it, with real connections: 500, 302 inward, a hang, a drip, a cut, and at last 200."""
    settings = Settings(home=tmp_path, webhooks=WebhookSettings(allow_private=True, timeout_s=2))
    world = World(store, settings)
    with (
        receiver() as inside,
        receiver(answers(500), answers(302, location=inside.url), hangs, drips_headers, closes) as seen,
    ):
        world.endpoint()
        world.change("we_1", url=seen.url)
        job = add_job(store)
        world.clock.at = time.time()
        store.records.commit(
            *outbox.writes(store.records, "ada", "fine_tuning.job.cancelled", {"id": job.id}, world.clock())
        )
        dispatcher = world.control(Sender(settings.webhooks, clock=time.time))
        loop = ControlLoop([dispatcher], dispatcher.sweep, 0.01, name="outbox")
        loop.start()
        for tries in range(1, 6):
            wait_for(lambda tries=tries: len(world.row().tries) == tries)
            world.clock.advance(90_000)
        wait_for(lambda: world.row().state == "delivered")
        loop.check_health()
        loop.stop()
        client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
        events = [client.webhooks.unwrap(request.body, request.headers) for request in seen.seen]
        assert {(event.type, event.data.id) for event in events} == {("fine_tuning.job.cancelled", job.id)}
        assert len({request.headers["webhook-id"] for request in seen.seen}) == 1 and len(seen.seen) == 6
        assert inside.seen == []
        assert [tried.status for tried in world.row().tries] == [500, 302, None, None, None, 200]


def wait_for(condition, limit_s: float = 20.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)
