"""`tuneloom webhooks` against the API itself, on a port, with the part of control that sends beside it."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import uvicorn

from tests.control.conftest import Api, open_test_store
from tests.control.receivers import Receiver, answers, receiver
from tests.test_cli import Shell, shell  # noqa: F401 - a fixture
from tuneloom import cluster
from tuneloom.config import Settings, WebhookSettings
from tuneloom.control.deployment import ControlLoop
from tuneloom.control.webhook_dispatcher import Dispatcher
from tuneloom.control.webhook_secrets import open_vault
from tuneloom.control.webhook_sender import Sender


@pytest.fixture
def seen() -> Iterator[Receiver]:
    with receiver(answers(204), answers(503)) as running:
        yield running


@pytest.fixture
def running(shell: Shell, tmp_path: Path) -> Iterator[Api]:  # noqa: F811
    """The API, as `tuneloom up` would have left word of it."""
    store = open_test_store(tmp_path)
    settings = Settings(home=shell.home, webhooks=WebhookSettings(allow_private=True, timeout_s=2))
    api = Api(store, settings)
    dispatcher = Dispatcher(store.records, settings.webhooks, lambda: open_vault(settings), Sender(settings.webhooks))
    loop = ControlLoop([dispatcher], dispatcher.sweep, 0.02, name="outbox")
    loop.start()
    server = uvicorn.Server(uvicorn.Config(api.app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    cluster.write_private(shell.home / "admin-key", "local:admin\n")
    state = cluster.ClusterState(
        id="c1",
        started_at=0,
        host="127.0.0.1",
        port=server.servers[0].sockets[0].getsockname()[1],
        gcs_address="127.0.0.1:1",
        dashboard_port=1,
        folder=shell.home,
    )
    cluster.write_state(shell.home, state)
    yield api
    server.should_exit = True
    thread.join(20)
    loop.stop()
    assert dispatcher.drain(20)
    store.close()


def test_an_endpoint_is_made_tested_watched_and_replayed(shell: Shell, running: Api, seen: Receiver):  # noqa: F811
    assert shell("webhooks", "list") == 0 and shell.out == ""
    assert shell("webhooks", "create", seen.url, "--name", "ours", "--event", "fine_tuning.job.failed") == 0
    secret, id = shell.out.strip(), shell.err.split()[1]
    assert secret.startswith("whsec_") and secret not in shell.err
    assert shell("webhooks", "list") == 0
    assert shell.out.splitlines()[1].split() == [id, seen.url, "ours", f"whsec_...{secret[-4:]}", "ok"]

    assert shell("webhooks", "test", id) == 0 and shell.out == "the receiver answered 204\n"
    request = seen.seen[0]
    openai.OpenAI(api_key="none").webhooks.verify_signature(request.body, request.headers, secret=secret)
    assert shell("webhooks", "test", id) == 1 and shell.out == "the receiver answered 503\n"
    assert shell("webhooks", "deliveries", id, "--state", "dead") == 0
    line = shell.out.splitlines()[1]
    assert "tuneloom.webhook.test" in line and line.endswith("The receiver answered 503.")
    assert shell("webhooks", "list") == 0 and "failing since" in shell.out

    assert shell("webhooks", "replay", id, line.split()[0]) == 0 and "is due" in shell.out
    until = time.monotonic() + 20
    while len(seen.seen) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert seen.seen[2].headers["webhook-id"] == line.split()[0]
    assert shell("webhooks", "deliveries", id, "--json") == 0
    assert [row["webhook_endpoint_id"] for row in json.loads(shell.out)] == [id, id]
    assert shell("webhooks", "rotate", id, "--overlap", "0") == 0 and shell.out.strip() != secret
    assert shell("webhooks", "enable", id) == 0 and shell("webhooks", "delete", id) == 0
    assert shell("webhooks", "deliveries", id) == 1 and "No such webhook endpoint" in shell.err


def test_the_apis_own_words_reach_the_user(shell: Shell, running: Api):  # noqa: F811
    assert shell("webhooks", "create", "https://example.com/#x") == 1
    assert "Invalid `url`: it has a fragment" in shell.err and shell.out == ""
    assert shell("webhooks", "create", "https://example.com/") == 0
    assert "tuneloom.draft.failed" in shell.err, "all types without a choice"
