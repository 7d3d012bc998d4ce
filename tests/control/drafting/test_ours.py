"""This installation's own API as the provider: the real ingress, keys and structured output, a scripted base."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import uvicorn

from tests.control.conftest import open_test_store
from tests.control.drafting.conftest import Threads
from tests.control.drafting.model import row
from tests.serve.conftest import BASE, Service, make_service
from tuneloom.config import BaseSettings, DraftingSettings, Settings
from tuneloom.control.drafting.reconcile import Drafts
from tuneloom.generation import Delta, Finished, Started, Usage
from tuneloom.store import Store


@pytest.fixture
def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_test_store(tmp_path)
    yield store
    store.close()


@pytest.fixture
def service(port: int, store: Store, tmp_path: Path) -> Iterator[Service]:
    provider = {
        "kind": "openai",
        "base_url": f"http://127.0.0.1:{port}/v1",
        "models": [BASE],
        "api_key_file": str(tmp_path / "draft-key"),
        "max_output_tokens": 400,
    }
    drafting = DraftingSettings.model_validate({"providers": {"ours": provider}})
    service = make_service(Settings(home=tmp_path, bases=(BaseSettings(id=BASE),), drafting=drafting), store)
    (tmp_path / "draft-key").write_text(service.key())
    server = uvicorn.Server(uvicorn.Config(service.app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield service
    server.should_exit = True
    thread.join(10)


@pytest.mark.anyio
async def test_our_own_models_draft_rows(service: Service, store: Store):
    text = json.dumps({"rows": [row("chat", number) for number in range(10)]})
    half = len(text) // 2
    service.base.play(
        Started(50),
        [Delta(0, text[:half])],
        [Delta(0, text[half:], finish_reason="stop")],
        Finished(Usage(prompt_tokens=50, completion_tokens=90, cached_tokens=0)),
    )
    async with service.http(service.key(scopes=("training",))) as client:
        body = {"description": "support", "format": "chat", "rows": 10, "seed": 5}
        created = await client.post("/v1/tuneloom/drafts", json=body)
        assert created.status_code == 200, created.text
        control = Drafts(store, Threads(store, service.settings.drafting), service.settings.drafting)
        deadline = time.monotonic() + 20
        while (draft := store.records.drafts.get(created.json()["id"]).value).is_open:
            assert time.monotonic() < deadline
            control.tick()
            await anyio.sleep(0.01)
        control.close()
        assert draft.state == "succeeded" and draft.rows == 10, draft
        assert (draft.counts.input_tokens, draft.counts.output_tokens) == (50, 90)
        assert draft.provenance is not None and draft.provenance["model_versions"] == [BASE]
        content = await client.get(f"/v1/files/{draft.file_id}/content")
    assert [json.loads(line) for line in content.text.splitlines()] == [row("chat", number) for number in range(10)]
    (asked,) = service.base.requests
    # Its form, its length and its seed have come through to the base.
    assert (asked.params.temperature, asked.params.seed, asked.params.max_tokens) == (0.7, 5, 400)
    assert asked.response_format is not None
