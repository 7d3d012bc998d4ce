"""Gemini through Vertex AI, by the real client and Google's own ways to credentials, against servers on loopback."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.control.drafting.conftest import Desk, Open
from tests.control.drafting.gemini_server import GeminiServer
from tests.control.drafting.model import Reply, Rows

VERTEX = {"project": "p-1", "location": "europe-west4", "api_key_env": None}
TOKEN = "token-of-the-workload"


class Identity:
    """A server that gives tokens, to service accounts and as a machine's metadata server does."""

    def __init__(self) -> None:
        self.status = 200
        self.paths: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                error = {"error": "invalid_grant", "error_description": "no such account"}
                self.answer({"access_token": TOKEN, "expires_in": 3600} if outer.status == 200 else error)

            def do_GET(self) -> None:
                assert self.headers["metadata-flavor"] == "Google"
                token = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
                account = {"email": "drafter@p-1.iam.gserviceaccount.com", "scopes": [], "aliases": ["default"]}
                self.answer(token if "/token" in self.path else account)

            def answer(self, data: dict[str, Any]) -> None:
                outer.paths.append(self.path)
                body = json.dumps(data).encode()
                self.send_response(outer.status)
                for name, value in (("metadata-flavor", "Google"), ("content-type", "application/json")):
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Identity]:
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    # They say another project, region and key, and are not asked.
    monkeypatch.setenv("GOOGLE_API_KEY", "key-of-somebody")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p-of-somebody")
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "us-east1")
    identity = Identity()
    yield identity
    identity.server.shutdown()
    identity.server.server_close()


@pytest.fixture
def account(identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Identity:
    """A service account, whose file is where Google's libraries look."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = tmp_path / "account.json"
    file.write_text(
        json.dumps(
            {
                "type": "service_account",
                "project_id": "p-of-the-account",
                "private_key_id": "k1",
                "private_key": pem.decode(),
                "client_email": "drafter@p-1.iam.gserviceaccount.com",
                "client_id": "1",
                "token_uri": f"http://{identity.host}/token",
            }
        )
    )
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    return identity


def test_a_draft_is_made_through_vertex_ai_with_the_accounts_token(account: Identity, open_desk: Open):
    desk = open_desk(provider=VERTEX)
    made = desk.made(rows=12, roles=["creative"])
    assert made["status"] == "succeeded" and made["rows"] == 12
    paths = {ask.path for ask in desk.server.asks}
    assert paths == {"/v1beta1/projects/p-1/locations/europe-west4/publishers/google/models/m-1:generateContent"}
    for ask in desk.server.asks:
        assert ask.headers["authorization"] == f"Bearer {TOKEN}" and "x-goog-api-key" not in ask.headers
        assert ask.has_schema and ask.temperature == 1.0
    assert account.paths == ["/token"], "asked once for all calls"
    assert TOKEN not in json.dumps(made) and "p-of-somebody" not in json.dumps(made)


def failed(desk: Desk) -> tuple[str, str]:
    made = desk.made(rows=10)
    assert made["status"] == "failed" and made["ended_by"] == "provider"
    return made["error"]["code"], made["error"]["message"]


def test_a_project_that_may_not_is_told(account: Identity, open_desk: Open):
    desk = open_desk(lambda ask: Reply(status=403, message="aiplatform.endpoints.predict denied"), provider=VERTEX)
    code, message = failed(desk)
    assert code == "provider_key_refused" and "aiplatform.endpoints.predict denied" in message
    assert len(desk.server.asks) == 1


def test_credentials_that_are_refused_or_not_there_are_told_at_once(account: Identity, open_desk: Open, monkeypatch):
    account.status = 400
    desk = open_desk(provider=VERTEX)
    code, message = failed(desk)
    assert code == "provider_key_refused" and "`drafting.providers.test.project`" in message
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    code, message = failed(desk)
    assert code == "provider_key_missing" and "no Application Default Credentials" in message
    assert desk.server.asks == []


def test_an_account_server_that_is_away_is_waited_for(account: Identity, open_desk: Open):
    account.status = 503
    desk = open_desk(provider=VERTEX)
    id = desk.create(rows=10)["id"]
    desk.until(lambda: len(account.paths) > 0)
    account.status = 200
    assert desk.run(id)["status"] == "succeeded"


ASK = """
import sys
from tuneloom.config import DraftProviderSettings
from tuneloom.control.drafting.prompts import Prompt
from tuneloom.control.drafting.providers import open_provider

given = {"kind": "gemini", "project": "p-1", "models": ["m-1"], "base_url": sys.argv[1], "timeout_s": 20}
provider = open_provider("vertex", DraftProviderSettings.model_validate(given), "m-1")
asked = Prompt("Write.", '{"count": 1}')
print(provider.answer(asked, schema={"type": "object"}, temperature=0.5, seed=1, max_tokens=100).text)
"""


def test_a_workload_is_known_by_its_machine(identity: Identity, monkeypatch: pytest.MonkeyPatch):
    """As on GKE: no file, no key, only the metadata server. Its address is read when Google's library is imported."""
    environment = {**os.environ, "GCE_METADATA_HOST": identity.host, "GCE_METADATA_IP": identity.host}
    del environment["NO_GCE_CHECK"]
    environment.pop("GOOGLE_APPLICATION_CREDENTIALS", None)
    with GeminiServer(Rows()) as server:
        done = subprocess.run(
            [sys.executable, "-c", ASK, server.url], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["rows"]) == 1
        (ask,) = server.asks
    assert ask.headers["authorization"] == f"Bearer {TOKEN}"
    assert ask.path == "/v1beta1/projects/p-1/locations/global/publishers/google/models/m-1:generateContent"
    assert any("/token" in path for path in identity.paths)
