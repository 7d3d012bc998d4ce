"""Limits as a client meets them: what it hears, when it is refused, what comes back, what holds for whom."""

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from tests.serve.conftest import BASE, Service, eventually, hello, make_service
from tuneloom.config import LimitsSettings, Settings
from tuneloom.domain import Allowance, OwnerLimits, Principal, Rates, Target
from tuneloom.errors import Overloaded
from tuneloom.generation import Delta, Finished, Started, Usage
from tuneloom.serve.limits import model_of
from tuneloom.serve.limits_admission import estimate
from tuneloom.serve.limits_routes import cost_of
from tuneloom.serve.openai import parse_chat, parse_completion
from tuneloom.store import Store

pytestmark = pytest.mark.anyio
MESSAGES: Any = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
DURATION = re.compile(r"(\d+h)?(\d+m)?\d+(\.\d+)?s|\d+ms")

Open = Callable[..., Service]


@pytest.fixture
def opened(settings: Settings, store: Store) -> Open:
    """A gateway with these fields of `limits`."""

    def open_with(**limits: Any) -> Service:
        return make_service(settings.model_copy(update={"limits": LimitsSettings(**limits)}), store)

    return open_with


async def ask(service: Service, key: str, **body: Any) -> httpx2.Response:
    async with service.http(key) as http:
        return await http.post(CHAT, json={"model": BASE, "messages": MESSAGES, **body})


def set_limits(service: Service, owner: str = "ada", **allowance: Any) -> None:
    record = OwnerLimits(id=owner, owner=owner, allowance=Allowance(**allowance), updated_at=time.time())
    service.store.records.commit(service.store.records.owner_limits.create(record))


def rates(requests: int | None = None, tokens: int | None = None) -> Rates:
    return Rates(requests_per_minute=requests, tokens_per_minute=tokens)


# What a client hears.


async def test_headers_tell_the_tightest_limits_on_success_and_on_refusal(opened: Open) -> None:
    service = opened(key=rates(5), owner=Allowance(rates=Rates(requests_per_minute=2, requests_per_day=9)))
    key = service.key()
    first, second, refused = [await ask(service, key) for _ in range(3)]

    assert [r.headers["x-ratelimit-limit-requests"] for r in (first, second, refused)] == ["2", "2", "2"]
    assert [r.headers["x-ratelimit-remaining-requests"] for r in (first, second, refused)] == ["1", "0", "0"]
    assert all(DURATION.fullmatch(r.headers["x-ratelimit-reset-requests"]) for r in (first, second, refused))
    assert "x-ratelimit-limit-tokens" not in first.headers
    assert refused.status_code == 429


async def test_a_refusal_says_limit_used_requested_and_when(opened: Open) -> None:
    service = opened(owner=Allowance(rates=rates(1)))
    key = service.key()
    await ask(service, key)
    refused = await ask(service, key)

    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("requests", "rate_limit_exceeded", None)
    for part in ("owner `ada`", "requests per minute", "Limit 1", "Used 1", "Requested 1", "Try again in "):
        assert part in error["message"]
    # A minute later there is room again, and a client of OpenAI's waits no longer than that.
    assert 0 < int(refused.headers["retry-after-ms"]) <= 60_000
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert "x-should-retry" not in refused.headers


async def test_tokens_have_headers_and_a_type_of_their_own(opened: Open) -> None:
    service = opened(owner=Allowance(rates=rates(100, tokens=1000)))
    key = service.key()
    answer = await ask(service, key, max_tokens=600)
    # "hi" and its role are taken for six tokens.
    assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
    assert answer.headers["x-ratelimit-remaining-tokens"] == "394"
    assert answer.headers["x-ratelimit-remaining-requests"] == "99"

    # It was 7 in the end.
    answer = await ask(service, key, max_tokens=600)
    assert answer.headers["x-ratelimit-remaining-tokens"] == "387"

    service.base.play(Started(900), [Delta(0, "x", finish_reason="stop")], Finished(Usage(900, 50)))
    await ask(service, key, max_tokens=100)
    refused = await ask(service, key, max_tokens=600)
    error = refused.json()["error"]
    assert (refused.status_code, error["type"]) == (429, "tokens")
    assert "tokens per minute: Limit 1000, Used 964, Requested 606" in error["message"]


async def test_the_owners_tokens_are_told_as_the_projects(opened: Open) -> None:
    service = opened(key=rates(tokens=300), owner=Allowance(rates=rates(100, tokens=1000)))
    answered = await ask(service, service.key(), max_tokens=100)
    refused = await ask(service, service.key(), max_tokens=1000)
    # Seven were used in the end, and the refused took none.
    for answer, left in ((answered, "894"), (refused, "993")):
        assert answer.headers["x-ratelimit-limit-tokens"] == "300"
        assert answer.headers["x-ratelimit-limit-project-tokens"] == "1000"
        assert answer.headers["x-ratelimit-remaining-project-tokens"] == left
        assert DURATION.fullmatch(answer.headers["x-ratelimit-reset-project-tokens"])
    assert "x-ratelimit-limit-project-tokens" not in (await ask(opened(key=rates(9)), service.key())).headers


async def test_what_never_fits_is_not_tried_again(opened: Open) -> None:
    service = opened(owner=Allowance(rates=rates(tokens=50)))
    key = service.key()
    assert (await ask(service, key)).status_code == 200
    refused = await ask(service, key, messages=[{"role": "user", "content": "word " * 100}])
    assert refused.status_code == 429 and "too large" in refused.json()["error"]["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers


async def test_no_more_of_an_answer_is_reserved_than_the_setting_says(opened: Open) -> None:
    service = opened(owner=Allowance(rates=rates(tokens=1000)), reserved_tokens=100)
    key = service.key()
    assert (await ask(service, key, max_tokens=900)).headers["x-ratelimit-remaining-tokens"] == str(1000 - 106)
    two = await ask(service, service.key("bob"), max_tokens=20, n=2)
    assert two.headers["x-ratelimit-remaining-tokens"] == str(1000 - 46)


def test_prompts_are_taken_for_a_quarter_of_their_characters() -> None:
    chat = parse_chat({"model": "m", "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 7})
    assert estimate(chat, 1024) == (101 + 4, 7)
    tools = [{"type": "function", "function": {"name": "f", "description": "y" * 400}}]
    with_tools = parse_chat({"model": "m", "messages": [{"role": "user", "content": "x" * 400}], "tools": tools})
    assert estimate(with_tools, 1024)[0] > 200
    tokens = parse_completion({"model": "m", "prompt": [[1, 2, 3], [4, 5]], "n": 2, "max_tokens": 10})
    assert estimate(tokens, 1024) == (5, 40)
    assert estimate(parse_completion({"model": "m", "prompt": ""}), 1024) == (1, 16)
    # Nobody has said how long.
    unsaid = parse_chat({"model": "m", "messages": [{"role": "user", "content": ""}]})
    assert (estimate(unsaid, 1024)[1], estimate(unsaid, 100)[1]) == (256, 100)


async def test_browsers_may_read_the_headers(opened: Open) -> None:
    service = opened(owner=Allowance(rates=rates(9)))
    async with service.http(service.key()) as http:
        answer = await http.post(
            CHAT, json={"model": BASE, "messages": MESSAGES}, headers={"origin": "https://console.example"}
        )
    exposed = answer.headers["access-control-expose-headers"].lower()
    for what in ("limit", "remaining", "reset"):
        assert f"x-ratelimit-{what}-requests" in exposed and f"x-ratelimit-{what}-tokens" in exposed


async def test_the_sdk_comes_back_by_itself_and_succeeds(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    # Minutes of two seconds, so that the refusal is over soon.
    monkeypatch.setattr("limits.RateLimitItemPerMinute.get_expiry", lambda item: 2)
    service = opened(owner=Allowance(rates=rates(2)))
    async with service.openai(service.key(), max_retries=2) as client:
        started = time.monotonic()
        for _ in range(3):
            answer = await client.chat.completions.create(model=BASE, messages=MESSAGES)
            assert answer.choices[0].message.content == "Hello"
        assert time.monotonic() - started > 1
    assert len(service.base.requests) == 3

    async with service.openai(service.key(), max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(3):
                await client.chat.completions.create(model=BASE, messages=MESSAGES)
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")


async def test_who_is_not_limited_hears_nothing_of_limits(service: Service) -> None:
    answer = await ask(service, service.key())
    assert [name for name in answer.headers if name.startswith("x-ratelimit")] == []


# What holds for whom.


async def test_key_owner_and_model_have_limits_of_their_own(opened: Open) -> None:
    service = opened(key=rates(2), owner=Allowance(rates=rates(6), model_rates=rates(3)))
    service.add_version("ada", "bot")
    first, second, third, fourth = (service.key() for _ in range(4))

    async def status(key: str, model: str = BASE) -> int:
        return (await ask(service, key, model=model)).status_code

    # Two by the key, three by the model, six by the owner.
    assert [await status(first) for _ in range(3)] == [200, 200, 429]
    assert [await status(second), await status(second)] == [200, 429]
    assert [await status(second, name) for name in ("bot", "bot@v1")] == [200, 429]
    assert [await status(third, name) for name in ("bot", "bot@v1")] == [200, 200]
    refused = await ask(service, fourth, model="bot@v1")
    assert "model `bot`" in refused.json()["error"]["message"]
    assert (await status(service.key("bob"))) == 200


@pytest.mark.parametrize(
    "version, model",
    [
        (None, "a/base:1"),
        ("ada:bot:v3", "bot"),
        ("ft:a/base:1:ada:bot:00000001:ckpt-step-2", "bot"),
        ("ft:a/base:1:ada::00000001:ckpt-step-2", "00000001"),
    ],
)
def test_all_names_of_a_model_count_for_it(version: str | None, model: str) -> None:
    assert model_of(Target(name="whatever", base="a/base:1", version=version)) == model


async def test_a_key_with_rates_of_its_own(opened: Open) -> None:
    service = opened(key=rates(1))
    key = service.key(rates=rates(3))
    assert [(await ask(service, key)).status_code for _ in range(4)] == [200, 200, 200, 429]


async def test_the_owner_local_has_only_what_an_admin_sets(opened: Open) -> None:
    service = opened(key=rates(1), owner=Allowance(rates=rates(1), max_concurrent=1, light_per_minute=1))
    key = service.key("local")
    assert [(await ask(service, key)).status_code for _ in range(4)] == [200] * 4
    set_limits(service, "local", rates=rates(2))
    await eventually_refused(service, key)


async def eventually_refused(service: Service, key: str) -> None:
    deadline = time.monotonic() + 6
    while (await ask(service, key)).status_code == 200:
        assert time.monotonic() < deadline, "a change counts within 5 s"
        await asyncio.sleep(0.2)


async def test_anonymous_people_share_the_limits_of_their_address(settings: Settings, store: Store) -> None:
    limits = LimitsSettings(
        anonymous={"rates": {"requests_per_minute": 2}},
        anonymous_address=rates(3),
        trusted_proxies=("10.0.0.0/8",),
    )
    service = make_service(settings.model_copy(update={"limits": limits}), store, people=Anonymous())

    async def status(person: str, address: str) -> int:
        transport = httpx2.ASGITransport(app=service.app, client=("10.0.0.1", 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
            headers = {"authorization": f"Bearer {person}.x.y", "x-forwarded-for": address}
            answer = await http.post(CHAT, json={"model": BASE, "messages": MESSAGES}, headers=headers)
        return answer.status_code

    assert [await status("eyJhbmEx", "198.51.100.1") for _ in range(3)] == [200, 200, 429]
    assert [await status("eyJhbmEy", "198.51.100.1") for _ in range(2)] == [200, 429]
    assert await status("eyJhbmEz", "198.51.100.2") == 200


async def test_whoever_signs_in_anonymously_again_creates_no_more_from_one_address(
    settings: Settings, store: Store
) -> None:
    limits = LimitsSettings(anonymous_address=rates(3), trusted_proxies=("127.0.0.0/8",))
    service = make_service(settings.model_copy(update={"limits": limits}), store, people=Anonymous())

    async def status(method: str, person: int, address: str) -> int:
        async with service.http(f"eyJhbm{person}.x.y") as http:
            headers = {"x-forwarded-for": address}
            return (await http.request(method, "/v1/fine_tuning/jobs", json={}, headers=headers)).status_code

    created = [await status("POST", person, "198.51.100.1") for person in range(5)]
    assert 429 not in created[:3] and created[3:] == [429, 429]
    assert await status("POST", 9, "198.51.100.2") != 429
    assert await status("GET", 9, "198.51.100.1") != 429
    async with service.http("eyJhbm9.x.y") as http:
        body = (await http.get("/v1/tuneloom/limits")).json()
    told = [each["limit"] for each in body["rates"] if each["whose"] == "this address"]
    assert told == ["requests per minute"]


class Anonymous:
    """Whoever comes has signed in anonymously, as whom the token's beginning says."""

    async def authenticate(self, token: str, headers: object) -> Principal:
        owner = token.split(".")[0]
        return Principal(owner=owner, key_id="", scopes=("inference",), kind="anonymous")


async def test_wrong_keys_are_limited_by_address_and_who_is_known_gets_on(opened: Open) -> None:
    service = opened(refused_per_minute=3)
    known, new = service.key(), service.key()
    assert (await ask(service, known)).status_code == 200

    assert [(await ask(service, f"sk-wrong{i}")).status_code for i in range(5)] == [401] * 3 + [429] * 2
    refused = await ask(service, new)
    assert refused.status_code == 429 and "wrong keys from this address" in refused.json()["error"]["message"]
    assert (await ask(service, known)).status_code == 200
    async with service.http() as http:
        assert (await http.get("/v1/models")).status_code == 401


async def test_calls_that_fail_count_as_requests(opened: Open) -> None:
    service = opened(owner=Allowance(rates=rates(3)))
    key = service.key()
    bad = [await ask(service, key, model="no-such-model") for _ in range(2)]
    assert [answer.status_code for answer in bad] == [404, 404]
    assert (await ask(service, key)).status_code == 200
    assert [(await ask(service, key, model="no-such-model")).status_code for _ in range(2)] == [429, 429]
    assert len(service.base.requests) == 1


# What each route costs.


@pytest.mark.parametrize(
    "method, path, cost",
    [
        ("POST", "/v1/chat/completions", "call"),
        ("POST", "/v1/my/model/completions", "call"),
        ("GET", "/v1/chat/completions", "light"),
        ("POST", "/v1/fine_tuning/jobs", "spending"),
        ("POST", "/v1/fine_tuning/jobs/ftjob-1/cancel", "light"),
        ("POST", "/v1/fine_tuning/jobs/ftjob-1/resume", "spending"),
        ("POST", "/v1/tuneloom/drafts", "spending"),
        ("POST", "/v1/tuneloom/drafts/draft_1/cancel", "light"),
        ("POST", "/v1/tuneloom/webhooks/whe_1/test", "costly"),
        ("POST", "/v1/webhook_endpoints/whe_1/test", "costly"),
        ("POST", "/v1/tuneloom/webhooks/whe_1/deliveries/whd_1/replay", "costly"),
        ("POST", "/v1/organization/admin_api_keys", "costly"),
        ("POST", "/v1/files", "costly"),
        ("GET", "/v1/files", "light"),
        ("POST", "/v1/uploads", "costly"),
        ("POST", "/v1/uploads/upload_1/parts", "light"),
        ("POST", "/v1/tuneloom/files/file-1/check", "costly"),
        ("POST", "/v1/tuneloom/estimate", "costly"),
        ("POST", "/v1/tuneloom/keys", "costly"),
        ("DELETE", "/v1/tuneloom/keys/key_1", "light"),
        ("GET", "/v1/models", "light"),
        ("GET", "/v1/nothing", "light"),
    ],
)
def test_what_a_route_costs(method: str, path: str, cost: str) -> None:
    assert cost_of(method, path) == cost


async def test_reading_and_costly_things_do_not_eat_the_calls(opened: Open) -> None:
    service = opened(owner=Allowance(rates=rates(1), costly_per_minute=2, light_per_minute=3))
    key = service.key(scopes=("inference", "training"))
    async with service.http(key) as http:
        reads = [(await http.get("/v1/files")).status_code for _ in range(4)]
        uploads = [(await http.post("/v1/uploads", json={})).status_code for _ in range(3)]
        health = [(await http.get("/healthz")).status_code for _ in range(9)]
    assert reads == [200, 200, 200, 429]
    assert uploads == [400, 400, 429]
    assert health == [200] * 9
    assert (await ask(service, key)).status_code == 200


async def test_costly_things_are_limited_by_day_as_well(opened: Open) -> None:
    service = opened(owner=Allowance(costly_per_day=1))
    async with service.http(service.key(scopes=("training",))) as http:
        answers = [await http.post("/v1/uploads", json={}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [400, 429]
    assert "requests per day" in answers[1].json()["error"]["message"]
    assert answers[1].headers["x-ratelimit-limit-requests"] == "1"


# What comes back.


async def left_of(service: Service, key: str) -> int:
    """The tokens that a call finds, less what it takes itself."""
    await asyncio.sleep(0.05)
    answer = await ask(service, key, max_tokens=1)
    taken = 6 + 1
    return int(answer.headers["x-ratelimit-remaining-tokens"]) + taken


async def test_a_base_that_fails_costs_no_tokens(opened: Open) -> None:
    service = opened(owner=Allowance(rates=rates(tokens=10_000)))
    key = service.key()
    service.base.play(Overloaded("No."))
    assert (await ask(service, key, max_tokens=500)).status_code == 503
    assert await left_of(service, key) == 10_000


async def test_a_base_that_does_not_start_gives_all_of_it_back(opened: Open) -> None:
    service = opened(owner=Allowance(rates=rates(tokens=10_000), max_concurrent=1))
    key = service.key()
    service.base.starts_in_s = 5
    assert (await ask(service, key, max_tokens=500)).status_code == 503
    service.base.starts_in_s = 0
    assert await left_of(service, key) == 10_000


async def test_a_client_that_leaves_pays_for_what_it_got(opened: Open) -> None:
    service = opened(owner=Allowance(rates=rates(tokens=10_000), max_concurrent=1))
    key = service.key()
    service.base.play(Started(100), [Delta(0, "x" * 80)], 30.0)
    server = await Server.start(service.app)
    try:
        async with service_client(server, key) as client:
            stream = await client.chat.completions.create(model=BASE, messages=MESSAGES, stream=True, max_tokens=500)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
        await eventually(lambda: service.base.closed == 1)
        assert await left_of(service, key) == 10_000 - 120
    finally:
        await server.stop()


class Server:
    """The application behind uvicorn, for what only a real connection can do."""

    def __init__(self, server: Any, task: "asyncio.Task[None]", port: int) -> None:
        self.server, self.task, self.port = server, task, port

    @classmethod
    async def start(cls, app: Any) -> "Server":
        import uvicorn

        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
        server.install_signal_handlers = lambda: None
        task = asyncio.create_task(server.serve())
        await eventually(lambda: server.started)
        return cls(server, task, server.servers[0].sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self.server.should_exit = True
        await self.task


def service_client(server: Server, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key=key, base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0)


# Calls under way.


async def test_calls_under_way_are_limited_by_owner_and_by_key(opened: Open) -> None:
    service = opened(owner=Allowance(max_concurrent=3, max_concurrent_per_key=2))
    first, second = service.key(), service.key()
    for _ in range(3):
        service.base.play(Started(1), 2.0, *hello()[1:])
    under_way = [asyncio.create_task(ask(service, key)) for key in (first, first, second)]
    await eventually(lambda: len(service.base.requests) == 3)

    by_key, by_owner = await ask(service, first), await ask(service, second)
    assert (by_key.status_code, by_owner.status_code) == (429, 429)
    assert "owner `ada`: 3 requests under way, the limit is 3" in by_owner.json()["error"]["message"]
    assert by_owner.headers["retry-after"] == "1"
    assert (await ask(service, service.key("bob"))).status_code == 200

    assert [(await task).status_code for task in under_way] == [200] * 3
    # Those that were refused held nothing.
    assert [(await ask(service, first)).status_code for _ in range(3)] == [200] * 3


async def test_calls_that_wait_for_their_first_token_are_limited(opened: Open) -> None:
    service = opened(owner=Allowance(max_waiting=1))
    key = service.key()
    service.base.play(Started(1), 2.0, *hello()[1:])
    waiting = asyncio.create_task(ask(service, key))
    await eventually(lambda: len(service.base.requests) == 1)
    refused = await ask(service, key)
    assert refused.status_code == 429 and "waiting for a first token" in refused.json()["error"]["message"]
    assert (await waiting).status_code == 200

    # One that writes already does not wait.
    service.base.play(Started(1), [Delta(0, "a")], 2.0, *hello()[1:])
    writing = asyncio.create_task(ask(service, key))
    await service.base.is_asleep.wait()
    await eventually(lambda: len(service.base.requests) == 2)
    await asyncio.sleep(0.1)
    assert (await ask(service, key)).status_code == 200
    assert (await writing).status_code == 200


# Quotas and budgets.


@pytest.mark.parametrize(
    "allowance, spent, is_refused",
    [
        ({"tokens_per_month": 1000}, {"input_tokens": 500, "output_tokens": 300, "trained_tokens": 200}, True),
        ({"tokens_per_month": 1001}, {"input_tokens": 500, "output_tokens": 300, "trained_tokens": 200}, False),
        ({"tokens_per_month": 0}, {}, True),
        ({"budget_per_month": 10.0}, {"cost": 10.0}, True),
        ({"budget_per_month": 10.0}, {"cost": 9.99}, False),
        ({"budget_per_month": 10.0}, {"cost": None}, False),
        ({}, {"cost": 1e9, "input_tokens": 10**12}, False),
    ],
)
async def test_who_has_used_up_the_month_is_refused_for_good(
    opened: Open, monkeypatch: pytest.MonkeyPatch, allowance: dict[str, Any], spent: dict[str, Any], is_refused: bool
) -> None:
    from tuneloom.store.usage import Spent

    asked = []

    def read(records: object, owner: str, since_s: float) -> Spent:
        asked.append((owner, since_s))
        return Spent(**spent)

    monkeypatch.setattr("tuneloom.serve.limits.usage.spent", read)
    service = opened(owner=Allowance(**allowance))
    key = service.key(scopes=("inference", "training"))
    answer = await ask(service, key)
    async with service.http(key) as http:
        job = await http.post("/v1/fine_tuning/jobs", json={})
        assert (await http.get("/v1/files")).status_code == 200
    if not is_refused:
        assert (answer.status_code, job.status_code) == (200, 400)
        return
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (429, "insufficient_quota", "insufficient_quota")
    assert answer.headers["x-should-retry"] == "false"
    assert re.search(r"begins anew on \d{4}-\d\d-01", error["message"])
    assert job.status_code == 429
    # Once for all of it, since the first of the month.
    assert [owner for owner, _ in asked] == ["ada"]
    assert time.gmtime(asked[0][1])[2:6] == (1, 0, 0, 0)


async def test_the_sdk_does_not_try_again_when_the_quota_is_spent(opened: Open) -> None:
    service = opened(owner=Allowance(tokens_per_month=0))
    requests = 0

    async def count(request: object) -> None:
        nonlocal requests
        requests += 1

    async with service.http() as http:
        http.event_hooks["request"].append(count)
        client = openai.AsyncOpenAI(api_key=service.key(), base_url="http://test/v1", http_client=http, max_retries=3)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model=BASE, messages=MESSAGES)
    assert caught.value.code == "insufficient_quota"
    assert requests == 1


def test_more_gateways_than_one_need_a_redis_for_limits_that_were_set(settings: Settings) -> None:
    data = settings.model_dump(mode="json")
    data["gateway"]["replicas"] = 2
    assert Settings.model_validate(data).gateway.replicas == 2
    data["limits"]["owner"]["rates"]["requests_per_minute"] = 5
    with pytest.raises(ValueError, match=r"limits\.redis_url"):
        Settings.model_validate(data)
    data["limits"]["redis_url"] = "redis://127.0.0.1:6379/0"
    assert Settings.model_validate(data).limits.redis_url


@pytest.mark.parametrize(
    "limits, said",
    [
        ({"redis_url": "http://x"}, "redis://"),
        ({"redis_url": "redis://:secret@x/0"}, "redis_password_file"),
        ({"trusted_proxies": ["everywhere"]}, "everywhere"),
        ({"owner": {"requests_per_minute": 1}}, "requests_per_minute"),
    ],
)
def test_wrong_settings_are_refused(limits: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LimitsSettings(**limits)


def test_a_file_changes_single_limits_and_null_takes_one_away() -> None:
    limits = LimitsSettings(owner={"max_concurrent": 4, "light_per_minute": None})
    assert (limits.owner.max_concurrent, limits.owner.costly_per_minute, limits.owner.light_per_minute) == (4, 60, None)
    assert LimitsSettings.model_validate(limits.model_dump(mode="json")) == limits


def test_what_is_set_for_an_owner_stands_over_the_defaults() -> None:
    default = Allowance(rates=Rates(requests_per_minute=1, tokens_per_minute=2), max_concurrent=3)
    own = Allowance(rates=Rates(requests_per_minute=9), files_bytes=5)
    assert own.over(default) == Allowance(
        rates=Rates(requests_per_minute=9, tokens_per_minute=2), max_concurrent=3, files_bytes=5
    )
