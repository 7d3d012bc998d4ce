"""The receiver of the documents, run as it is written there, takes what is sent and refuses what is forged."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.control.test_outbox import add_endpoint
from tuneloom.config import WebhookSettings
from tuneloom.control import outbox
from tuneloom.control.webhook_secrets import new_secret
from tuneloom.control.webhook_sender import Sender
from tuneloom.domain import EVENT_TYPES

EXAMPLE = Path(__file__).parents[2] / "examples" / "webhook.py"
SECRET = new_secret()


@pytest.fixture
def receiver():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, EXAMPLE],
        env={**os.environ, "OPENAI_WEBHOOK_SECRET": SECRET, "PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/", process
    process.kill()
    process.communicate(timeout=20)


def test_the_documented_receiver_takes_every_type_once_and_refuses_forgeries(receiver, store):
    url, process = receiver
    endpoint, sender = add_endpoint(store), Sender(WebhookSettings(allow_private=True))
    for n, type in enumerate(EVENT_TYPES):
        row = outbox.delivery(endpoint, type, {"id": f"thing-{n}", "tuneloom": {"model": "m"}}, time.time())
        assert sender.send(url, row, [new_secret()]).tried.status == 400
        for _ in range(2):
            outcome = sender.send(url, row, [SECRET])
            assert outcome.is_success, outcome
        assert process.stdout.readline() == f"{type} thing-{n}\n"
