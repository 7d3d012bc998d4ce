"""Two owners on every route of the application: what is another's is not seen, and looks like what is absent."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from starlette.routing import Route

from tests.serve.conftest import BASE, Service
from tests.serve.tenants import CALLS, DRAFT, JOBS, OURS, ROWS, Call
from tuneloom.config import DraftingSettings, DraftProviderSettings, Settings
from tuneloom.control import api_webhooks
from tuneloom.domain import Checkpoint

CONCURRENT = 200
ADA, EVE = "adalovelace", "evelovelace"
SCOPES = ("inference", "training", "account")
# Answers' headers that differ from call to call for reasons of their own.
OWN_HEADERS = {"x-request-id", "openai-processing-ms", "date"}


@dataclass
class Tenant:
    """An owner with one of each thing. `names` are what the words of `CALLS` stand for; `marks` must not leak."""

    owner: str
    key: str
    names: dict[str, str]
    marks: set[str]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With a provider of drafts, which nobody calls."""
    provider = DraftProviderSettings(kind="openai", base_url="http://127.0.0.1:9/v1", models=("m",))
    return settings.model_copy(update={"drafting": DraftingSettings(providers={"p": provider})})


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_webhooks, "TEST_SLACK_S", -60.0)


async def make_tenant(service: Service, owner: str) -> Tenant:
    key = service.key(owner, SCOPES)
    async with service.http(key) as http:

        async def made(path: str, **options: Any) -> str:
            answer = await http.post(path, **options)
            assert answer.status_code == 200, answer.text
            return answer.json()["id"]

        file = await made(
            "/v1/files",
            files={"file": (f"rows-of-{owner}.jsonl", ROWS.replace(b"yes", f"yes from {owner}".encode()))},
            data={"purpose": "fine-tune"},
        )
        job = await made(JOBS, json={"model": BASE, "training_file": file, "suffix": f"tuned-by-{owner}"})
        upload = {"filename": f"big-{owner}.jsonl", "purpose": "fine-tune", "bytes": 1, "mime_type": "text/jsonl"}
        hook = await made(
            f"{OURS}/webhooks",
            json={"url": f"https://example.com/{owner}-hook", "event_types": ["fine_tuning.job.cancelled"]},
        )
        names = {
            "FILE": file,
            "JOB": job,
            "UPLOAD": await made("/v1/uploads", json=upload),
            "KEY": await made(f"{OURS}/keys", json={"name": f"key-of-{owner}"}),
            "HOOK": hook,
            "DRAFT": await made(f"{OURS}/drafts", json={**DRAFT, "description": f"As said by {owner}."}),
            "EVENT": (await http.get(f"{JOBS}/{job}/events")).json()["data"][0]["id"],
        }
        names["ENTRY"] = (await http.get(f"{OURS}/audit")).json()["data"][0]["id"]
        # Nobody sends here: its row in the log is what counts.
        assert (await http.post(f"{OURS}/webhooks/{hook}/test")).status_code == 503
        names["SENT"] = (await http.get(f"{OURS}/webhooks/{hook}/deliveries")).json()["data"][0]["id"]
    version = service.add_version(owner, f"bot-of-{owner}", 1)
    checkpoint = Checkpoint(
        id=f"ftckpt_{owner}",
        owner=owner,
        job_id=job,
        base=BASE,
        step=2,
        name=f"{version.ft_name}:ckpt-step-2",
        created_at=1.0,
        adapter=version.adapter,
    )
    service.store.records.commit(service.store.records.checkpoints.create(checkpoint))
    names |= {
        "MODEL": version.model,
        "PINNED": version.pinned_name,
        "FT": version.ft_name,
        "CHECK": checkpoint.name,
        "OWNER": owner,
    }
    return Tenant(owner, key, names, {*names.values(), f"-of-{owner}", f"by-{owner}", f"{owner}-hook", f"from {owner}"})


def absent(names: Mapping[str, str]) -> dict[str, str]:
    """Names of the same form that nobody has."""
    return {
        word: name.replace(ADA, "odolovelace") if ADA in name else name[:-6] + "zzzzzz" for word, name in names.items()
    }


def shown(answer: httpx2.Response, names: Mapping[str, str]) -> tuple[int, list[tuple[str, str]], str]:
    """An answer without what it repeats of the question, so that questions about different names may be compared."""
    headers = sorted((k, v) for k, v in answer.headers.items() if k not in OWN_HEADERS and "ratelimit" not in k)
    text = answer.text
    for word, name in sorted(names.items(), key=lambda item: -len(item[1])):
        text = text.replace(name, word)
    return answer.status_code, headers, text


async def ask(http: httpx2.AsyncClient, call: Call, names: Mapping[str, str]) -> httpx2.Response:
    method, path, options = call.fill({**names, "BASE": BASE})
    return await http.request(method, path, **options)


def test_every_route_of_the_application_is_swept(service: Service) -> None:
    routes = {
        (method, route.path)
        for route in service.app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    swept = {(call.method, path) for path, calls in CALLS.items() for call in calls}
    assert routes - swept == set(), "add a call for each to CALLS"
    assert swept - routes == set(), "these routes are gone: remove them from CALLS"


@pytest.mark.anyio
async def test_what_is_foreign_is_answered_like_what_is_absent(service: Service) -> None:
    ada = await make_tenant(service, ADA)
    eve = service.key(EVE, SCOPES)
    nobodys = absent(ada.names)
    async with service.http(eve) as http:
        for calls in CALLS.values():
            for call in calls:
                if not call.words():
                    continue
                foreign, missing = await ask(http, call, ada.names), await ask(http, call, nobodys)
                assert shown(foreign, ada.names) == shown(missing, nobodys), call
                assert foreign.status_code != 500, foreign.text


@pytest.mark.anyio
async def test_two_owners_at_once_never_see_anything_of_each_other(service: Service) -> None:
    ada, eve = await make_tenant(service, ADA), await make_tenant(service, EVE)
    calls = [call for calls in CALLS.values() for call in calls]
    work = [(caller, other, call, names) for caller, other in ((ada, eve), (eve, ada)) for call in calls
            for names in (caller.names, other.names)]  # fmt: skip
    random.Random(1).shuffle(work)
    gate, served = asyncio.Semaphore(CONCURRENT), []

    async with service.http(ada.key) as as_ada, service.http(eve.key) as as_eve:

        async def one(caller: Tenant, other: Tenant, call: Call, names: Mapping[str, str]) -> None:
            async with gate:
                answer = await ask(as_ada if caller is ada else as_eve, call, names)
            text = answer.text
            for name in names.values() if names is other.names else ():
                # What the caller has said itself, an answer may repeat.
                text = text.replace(name, "")
            leaked = {mark for mark in other.marks if mark in text}
            assert not leaked, (caller.owner, call, leaked, answer.text[:500])
            assert answer.status_code != 500, (call, answer.text)
            served.append(answer.status_code)

        await asyncio.gather(*(one(*item) for item in work))
    assert len(served) == len(work) > CONCURRENT and served.count(200) > 20
