from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from tuneloom.config import BaseSettings, GatewaySettings, Pepper, Settings
from tuneloom.control.api import ApiContext, routes
from tuneloom.domain import File, Job, JobSpec, Principal, new_id
from tuneloom.errors import TuneloomError
from tuneloom.store import Store, open_blobs, open_documents
from tuneloom.store.records import Records

BASE = "tiny/llama"
PEPPER = Pepper((b"p" * 32,))


def open_test_store(folder: Path) -> Store:
    return Store(Records(open_documents(f"sqlite:{folder / 'tuneloom.db'}")), open_blobs(f"file:{folder / 'blobs'}"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_test_store(tmp_path)
    yield store
    store.close()


def add_job(
    store: Store, *, owner: str = "ada", suffix: str | None = "bot", at: float = 1.8e9, **fields: object
) -> Job:
    """A job as the API creates it, with its training file."""
    file = File(
        id=new_id("file-"),
        owner=owner,
        filename="rows.jsonl",
        purpose="fine-tune",
        size_bytes=1,
        sha256="0" * 64,
        blob="files/x",
        created_at=at,
    )
    spec = JobSpec(base=BASE, training_file=file.id, suffix=suffix, seed=1)
    job = Job.model_validate(
        {"id": new_id("ftjob-"), "owner": owner, "spec": spec, "requested_model": BASE, "created_at": at, **fields}
    )
    store.records.commit(store.records.files.create(file), store.records.jobs.create(job))
    return job


class Api:
    """The API of control as an app of its own: the key `ada:training,inference:bot` is that owner, scopes, models."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self.pokes = 0
        context = ApiContext(settings, store, PEPPER, self._poke)
        self.app = Starlette(
            routes=routes(context), exception_handlers={TuneloomError: _answer_error}, middleware=[Middleware(StubAuth)]
        )
        self.client = TestClient(self.app, base_url="http://tuneloom")

    def _poke(self) -> None:
        self.pokes += 1

    def call(self, method: str, path: str, *, key: str = "ada:training", **options: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {key}", **options.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.call("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx2.Response:
        return self.call("POST", path, **options)

    def delete(self, path: str, **options: Any) -> httpx2.Response:
        return self.call("DELETE", path, **options)

    def upload(
        self, data: bytes = b"{}\n", name: str = "rows.jsonl", purpose: str = "fine-tune", **options: Any
    ) -> str:
        response = self.post("/v1/files", files={"file": (name, data)}, data={"purpose": purpose}, **options)
        assert response.status_code == 200, response.text
        return response.json()["id"]

    def create_job(self, *, key: str = "ada:training", **body: Any) -> dict[str, Any]:
        body = {"model": BASE, "training_file": self.upload(key=key), **body}
        response = self.post("/v1/fine_tuning/jobs", json=body, key=key)
        assert response.status_code == 200, response.text
        return response.json()


class StubAuth:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            key = Headers(scope=scope)["authorization"].removeprefix("Bearer ")
            owner, scopes, models, ends = [*key.split(":"), "", "", ""][:4]
            principal = Principal(
                owner=owner,
                key_id="key_1",
                scopes=tuple(scopes.split(",")),
                models=tuple(models.split(",")) if models else (),
                expires_at=float(ends) if ends else None,
            )
            scope.setdefault("state", {})["principal"] = principal
        await self.app(scope, receive, send)


def _answer_error(_: Request, error: TuneloomError) -> JSONResponse:
    retry = {} if error.should_retry is None else {"x-should-retry": str(error.should_retry).lower()}
    return JSONResponse(error.body(), status_code=error.status, headers=retry)


@pytest.fixture
def api(store: Store, tmp_path: Path) -> Api:
    settings = Settings(
        home=tmp_path,
        bases=(BaseSettings(id=BASE),),
        base_aliases={"gpt-4o-mini-2024-07-18": BASE},
        gateway=GatewaySettings(max_file_bytes=3 << 20, max_part_bytes=1 << 20, max_body_bytes=1 << 20),
    )
    return Api(store, settings)


def assert_error(response: httpx2.Response, status: int, param: str | None, text: str = "") -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert text in error["message"], error
