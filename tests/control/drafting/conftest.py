import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.control.conftest import BASE, Api
from tests.control.drafting.gemini_server import GeminiServer
from tests.control.drafting.model import ModelServer, Rows
from tests.control.drafting.openai_server import OpenAIServer
from tuneloom.config import BaseSettings, DraftingSettings, DraftProviderSettings, Settings
from tuneloom.control.drafting.reconcile import Drafts
from tuneloom.control.drafting.run import draft
from tuneloom.domain import Drafter
from tuneloom.store import Store

KEY = "secret-key-of-the-provider"
DRAFTS = "/v1/tuneloom/drafts"


class Threads:
    """`DrafterTasks` in threads of this process, running what a Ray task runs."""

    def __init__(self, store: Store, settings: DraftingSettings) -> None:
        self._store, self._settings = store, settings
        self.launched: list[str] = []
        self._threads: dict[str, threading.Thread] = {}
        self._started: list[threading.Thread] = []

    def launch(self, drafter: Drafter) -> None:
        self.launched.append(drafter.handle)
        arguments = (self._store, self._settings, drafter.id, drafter.attempt)
        self._threads[drafter.handle] = threading.Thread(target=draft, args=arguments, daemon=True)
        self._threads[drafter.handle].start()
        self._started.append(self._threads[drafter.handle])

    def observe(self, handle: str) -> Literal["alive", "over", "unknown"]:
        thread = self._threads.get(handle)
        return "unknown" if thread is None else "alive" if thread.is_alive() else "over"

    def stop(self, handle: str) -> None:
        self._threads.pop(handle, None)

    def forget(self) -> None:
        """As another control, which started none of them."""
        self._threads = {}

    def join(self) -> None:
        """Wait for all that were ever started; those that are stopped end at their next write."""
        for thread in self._started:
            thread.join(10)


class Desk:
    """The API, a provider, and control with drafters in threads. `drafting` overrides settings."""

    def __init__(
        self, store: Store, server: ModelServer, home: Path, drafting: dict[str, Any], provider: dict[str, Any]
    ):
        given = {"kind": server.kind, "base_url": server.url, "models": ["m-1", "m-2"], "api_key_env": "DRAFT_KEY"}
        given |= {"timeout_s": 5, "attempts": 4, "retry_delay_s": 0.02, **provider}
        self.server = server
        self.settings = DraftingSettings.model_validate(
            {"providers": {"test": DraftProviderSettings.model_validate(given)}, "max_tasks": 50, "heartbeat_s": 0.2}
            | drafting
        )
        self.store = store
        self.api = Api(store, Settings(home=home, bases=(BaseSettings(id=BASE),), drafting=self.settings))
        self.tasks = Threads(store, self.settings)
        self.control = Drafts(store, self.tasks, self.settings)

    def create(self, *, key: str = "ada:training", **body: Any) -> dict[str, Any]:
        body = {"description": "support of a router", "format": "instruction", "rows": 10, **body}
        answer = self.api.post(DRAFTS, json=body, key=key)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, id: str) -> dict[str, Any]:
        return self.api.get(f"{DRAFTS}/{id}").json()

    def run(self, id: str, timeout_s: float = 30) -> dict[str, Any]:
        """The draft at its end."""
        self.until(lambda: not self.store.records.drafts.get(id).value.is_open, timeout_s)
        return self.get(id)

    def until(self, is_true: Callable[[], bool], timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_true():
            assert time.monotonic() < deadline, self.store.records.drafts.query()
            self.control.tick()
            time.sleep(0.01)

    def made(self, **body: Any) -> dict[str, Any]:
        return self.run(self.create(**body)["id"])

    def rows(self, id: str) -> list[dict[str, Any]]:
        """The rows of a File."""
        content = self.api.get(f"/v1/files/{id}/content")
        assert content.status_code == 200
        return [json.loads(line) for line in content.content.splitlines()]


Open = Callable[..., Desk]


@pytest.fixture
def open_desk(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Makes a desk with a model, by default on the Gemini server."""
    monkeypatch.setenv("DRAFT_KEY", KEY)
    servers: list[ModelServer] = []
    desks: list[Desk] = []

    def make(
        model: Any = None, kind: str = "gemini", *, provider: dict[str, Any] | None = None, **drafting: Any
    ) -> Desk:
        server = (GeminiServer if kind == "gemini" else OpenAIServer)(model or Rows())
        servers.append(server.__enter__())
        desks.append(Desk(store, server, tmp_path, drafting, provider or {}))
        return desks[-1]

    yield make
    for desk in desks:
        desk.control.close()
        desk.tasks.join()
    for server in servers:
        server.__exit__()
