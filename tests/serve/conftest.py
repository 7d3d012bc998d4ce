import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI

from tests.serve import google as fake_google
from tuneloom.config import BaseSettings, Pepper, Settings
from tuneloom.control import keys
from tuneloom.domain import AdapterRef, Model, Scope, Version, ft_name, model_id, version_id
from tuneloom.engine.base import EngineStats
from tuneloom.errors import Overloaded
from tuneloom.generation import Delta, Finished, Frame, GenerationRequest, Started, Usage
from tuneloom.serve.auth import SignIn
from tuneloom.serve.ingress import Context, make_app
from tuneloom.store import Store, open_store

BASE = "tiny/llama"
PEPPER = Pepper((b"p" * 32,))
STATS = EngineStats(0, 0, 0, 100, 0, 0.0, 0, 0, 0)

Step = Frame | Exception | float


def hello(finish_reason: str = "stop") -> list[Step]:
    """The frames of a short answer."""
    return [
        Started(5),
        [Delta(0, "Hel")],
        [Delta(0, "lo", finish_reason=finish_reason)],
        Finished(Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=3)),
    ]


@dataclass
class FakeBase:
    """A base that plays one script for each call: frames are yielded, errors raised, numbers slept."""

    scripts: list[list[Step]] = field(default_factory=list)
    requests: list[GenerationRequest] = field(default_factory=list)
    closed: int = 0
    is_up: bool = True
    starts_in_s: float = 0.0
    is_asleep: asyncio.Event = field(default_factory=asyncio.Event)
    operations: list[tuple[Any, ...]] = field(default_factory=list)
    answers: dict[str, dict[str, Any]] = field(default_factory=lambda: {"stats": {"r1": STATS}})

    def play(self, *steps: Step) -> None:
        self.scripts.append(list(steps))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Frame, None]:
        self.requests.append(request)
        try:
            for step in self.scripts.pop(0) if self.scripts else hello():
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    self.is_asleep.set()
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.closed += 1

    async def stats(self) -> EngineStats:
        if not self.is_up:
            await asyncio.sleep(60)
        return STATS

    async def wake(self, wait_s: float) -> None:
        if self.starts_in_s:
            await asyncio.sleep(min(wait_s, self.starts_in_s))
            if wait_s < self.starts_in_s:
                raise Overloaded("It is being loaded.", code="model_loading", retry_after_s=7)
            self.starts_in_s = 0.0

    async def is_cold(self) -> bool:
        return bool(self.starts_in_s)

    async def on_each_replica(self, method: str, *arguments: Any, timeout_s: float = 60.0) -> dict[str, Any]:
        """What `answers` has for the method, of each replica."""
        self.operations.append((method, *arguments))
        return self.answers.get(method, {"r1": None, "r2": None})


@dataclass
class Service:
    """The application over a real store and a scripted base."""

    settings: Settings
    store: Store
    base: FakeBase
    app: Any
    pokes: list[None]

    def key(self, owner: str = "ada", scopes: tuple[Scope, ...] = ("inference",), **more: Any) -> str:
        return keys.mint(self.store.records, PEPPER, owner=owner, scopes=scopes, **more).secret

    def add_version(self, owner: str, name: str, number: int = 1, *, active: bool = True) -> Version:
        """A Version with an adapter that exists in name only; the Model is made or moved on to it."""
        version = Version(
            id=version_id(owner, name, number),
            owner=owner,
            model=name,
            number=number,
            base=BASE,
            ft_name=ft_name(BASE, owner, name, f"{number:08d}"),
            adapter=AdapterRef(sha256=f"{number:064x}", uri=f"jobs/{owner}/{name}", rank=4, size_bytes=1),
            created_at=1.0,
        )
        records = self.store.records
        model = Model(
            id=model_id(owner, name),
            owner=owner,
            name=name,
            base=BASE,
            created_at=1.0,
            next_version=number + 1,
            active=number if active else None,
        )
        stored = records.models.find(model.id)
        write = records.models.replace(stored, model) if stored else records.models.create(model)
        records.commit(write, records.versions.create(version))
        return version

    def http(self, key: str | None = None) -> httpx2.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        transport = httpx2.ASGITransport(app=self.app)
        return httpx2.AsyncClient(transport=transport, base_url="http://test", headers=headers, timeout=20)

    def openai(self, key: str, path: str = "/v1", **more: Any) -> AsyncOpenAI:
        options = {"max_retries": 0, **more}
        return AsyncOpenAI(api_key=key, base_url=f"http://test{path}", http_client=self.http(), **options)


async def eventually(is_true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until it is."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if is_true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within {timeout_s} s")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, bases=(BaseSettings(id=BASE),), base_aliases={"gpt-old": BASE, "gpt-gone": "x/y"})


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = open_store(settings)
    yield store
    store.close()


def make_service(settings: Settings, store: Store, people: SignIn | None = None) -> Service:
    base, pokes = FakeBase(), []
    app = make_app(Context(settings, store, PEPPER, lambda _: base, lambda: pokes.append(None), people))
    return Service(settings, store, base, app, pokes)


@pytest.fixture
def service(settings: Settings, store: Store) -> Service:
    return make_service(settings, store)


@pytest.fixture
async def client(service: Service) -> AsyncIterator[AsyncOpenAI]:
    async with service.openai(service.key()) as client:
        yield client


@pytest.fixture
def google() -> Iterator[fake_google.Google]:
    with fake_google.running() as google:
        yield google
