"""The outbox as control runs it: looked at as often as the settings say, at a poke, and after each delivery."""

import subprocess
import sys
import time
from types import SimpleNamespace

import openai
import pytest
import ray

from tests.control.conftest import Api, add_job
from tests.control.receivers import answers, hangs, receiver
from tests.control.test_outbox import add_endpoint, rows
from tests.control.test_webhook_dispatcher import wait_for
from tuneloom.config import Settings, WebhookSettings
from tuneloom.control import outbox
from tuneloom.control.deployment import Control, outbox_loop
from tuneloom.control.webhook_dispatcher import LEASE_S, Dispatcher
from tuneloom.control.webhook_secrets import new_secret, open_vault
from tuneloom.control.webhook_sender import Sender
from tuneloom.errors import TuneloomError

SENDER = """
import sys, threading
from tuneloom.config import Settings
from tuneloom.control.deployment import outbox_loop
from tuneloom.store.records import Records
from tuneloom.store import open_documents

loop, _ = outbox_loop(Records(open_documents(sys.argv[1])), Settings.model_validate_json(sys.argv[2]))
loop.start()
threading.Event().wait(60)
"""


def settings(tmp_path, **options) -> Settings:
    return Settings(home=tmp_path, webhooks=WebhookSettings(allow_private=True, **options))


def happen(store, tree: Settings, url: str, times: int = 1) -> None:
    if store.records.webhook_endpoints.find("we_1") is None:
        add_endpoint(store)
        stored = store.records.webhook_endpoints.get("we_1")
        after = stored.value.model_copy(update={"url": url, "secret": open_vault(tree).seal(new_secret())})
        store.records.commit(store.records.webhook_endpoints.replace(stored, after))
    for _ in range(times):
        writes = outbox.writes(store.records, "ada", "tuneloom.draft.completed", {"id": "draft_1"}, time.time())
        store.records.commit(*writes)


def states(store) -> list[str]:
    return [row.state for row in rows(store)]


@pytest.mark.parametrize("poll_s", [0.02, 3600.0])
def test_it_looks_as_often_as_is_set_or_when_it_is_poked(store, tmp_path, poll_s):
    tree = settings(tmp_path, poll_s=poll_s)
    loop, webhooks = outbox_loop(store.records, tree)
    looks, tick = [], webhooks.tick
    webhooks.tick = lambda: looks.append(tick())
    with receiver() as seen:
        loop.start()
        wait_for(lambda: looks)  # the first one, at the start, has been
        happen(store, tree, seen.url)
        if poll_s > 60:
            time.sleep(0.2)
            assert states(store) == ["pending"]
            loop.poke()
        wait_for(lambda: states(store) == ["delivered"])
        loop.stop()
        assert webhooks.drain(20)


def test_a_backlog_of_one_endpoint_is_sent_without_waiting_for_the_next_look(store, tmp_path):
    tree = settings(tmp_path, poll_s=3600.0)
    with receiver() as seen:
        happen(store, tree, seen.url, times=5)
        loop, webhooks = outbox_loop(store.records, tree)
        loop.start()
        wait_for(lambda: states(store) == ["delivered"] * 5)
        loop.stop()
        assert webhooks.drain(20)


def test_more_of_one_endpoint_are_sent_at_once_if_that_is_set(store, tmp_path):
    tree = settings(tmp_path, poll_s=0.02, max_sending_per_endpoint=3, max_sending_per_owner=2, timeout_s=5)
    with receiver(hangs, hangs, answers(200)) as seen:
        happen(store, tree, seen.url, times=3)
        loop, webhooks = outbox_loop(store.records, tree)
        loop.start()
        wait_for(lambda: len(seen.seen) == 2)
        time.sleep(0.2)
        assert len(seen.seen) == 2, "the owner's share"
        loop.check_health()
        seen.over.set()
        loop.stop()
        assert webhooks.drain(20)


def test_control_sends_what_a_job_of_the_api_tells(store, tmp_path, monkeypatch):
    """The whole process but its Ray: a job is cancelled beside it, and the receiver verifies the event."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    tree = settings(tmp_path, poll_s=3600.0)
    with receiver() as seen:
        control = Control(tree.model_dump(mode="json"))
        try:
            api = Api(store, tree)
            body = {"url": seen.url, "event_types": ["fine_tuning.job.cancelled"]}
            made = api.post("/v1/tuneloom/webhooks", json=body, key="ada:account").json()
            job = add_job(store)
            assert api.post(f"/v1/fine_tuning/jobs/{job.id}/cancel").status_code == 200
            control.poke()
            wait_for(lambda: len(seen.seen) == 1)
            control.check_health()
        finally:
            control.__del__()
    (request,) = seen.seen
    client = openai.OpenAI(api_key="none", webhook_secret=made["signing_secret"])
    assert client.webhooks.unwrap(request.body, request.headers).data.id == job.id
    with pytest.raises(TuneloomError, match="ended"):
        control.check_health()


def test_a_process_that_is_killed_while_a_receiver_holds_it_leaves_nothing_unsent(store, tmp_path):
    """SIGKILL after the request is whole at the receiver and before its answer: sent again under the same id."""
    tree = settings(tmp_path, timeout_s=30)
    with receiver(hangs) as seen:
        happen(store, tree, seen.url)
        url = f"sqlite:{tmp_path / 'tuneloom.db'}"
        process = subprocess.Popen([sys.executable, "-c", SENDER, url, tree.model_dump_json()])
        try:
            wait_for(lambda: len(seen.seen) == 1, limit_s=60)
        finally:
            process.kill()
            process.wait(20)
        (row,) = rows(store)
        assert (row.state, row.attempts, row.tries) == ("pending", 1, ()) and row.lease is not None
        vault, sender = open_vault(tree), Sender(tree.webhooks)
        early = Dispatcher(store.records, tree.webhooks, lambda: vault, sender)
        early.tick()
        assert early.drain(20) and len(seen.seen) == 1, "leased by one who may still live"
        late = Dispatcher(store.records, tree.webhooks, lambda: vault, sender, lambda: time.time() + LEASE_S)
        late.tick()
        assert late.drain(20) and states(store) == ["delivered"]
        first, second = seen.seen
        assert first.headers["webhook-id"] == second.headers["webhook-id"] == row.id and first.body == second.body
