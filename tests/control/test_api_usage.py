"""Pages of usage and costs, asked for by the real client and by hand."""

from typing import Any

import pytest
from openai import OpenAI

from tests.control.conftest import Api, assert_error
from tuneloom.config import Settings, TrainSettings
from tuneloom.domain import Amounts, Used, hour_start
from tuneloom.store import Store
from tuneloom.store.usage_rollup import roll_up
from tuneloom.store.usage_writer import UsageWriter, final_part

NOON = int(hour_start("2026-11-26T12"))
MIDNIGHT = NOON - 12 * 3600
HOUR, DAY = 3600, 24 * 3600
ADMIN = "root:admin"
COMPLETIONS = "/v1/organization/usage/completions"
COSTS = "/v1/organization/costs"
OWN = "/v1/tuneloom/usage"


def used(model: str, key_id: str = "key_1") -> Used:
    return Used(kind="inference", base="tiny/llama", model=model, key_id=key_id)


def tokens(count: int) -> Amounts:
    return Amounts(
        requests=1, input_tokens=count, cached_tokens=count // 2, output_tokens=1, device_us=500_000, cost_nano=count
    )


@pytest.fixture(params=["in parts", "rolled up"])
def filled(api: Api, request: pytest.FixtureRequest) -> Api:
    """Use of two owners on two days, and a job; the same answers whether it was folded or not."""
    now = float(MIDNIGHT)
    writer = UsageWriter(api.store.records, lambda: now)
    writer.add("ada", used("bot@v1"), tokens(10))
    writer.add("ada", used("bot@v2", "key_2"), tokens(20))
    now = float(NOON)
    writer.add("ada", used("bot@v1"), tokens(100))
    writer.add("bob", used("tiny/llama", ""), tokens(1000))
    now = float(NOON + 2 * DAY)
    writer.add("bob", used("tiny/llama", ""), tokens(5000))
    assert writer.flush()
    job = Used(kind="training", base="tiny/llama", model="bot@v1", job_id="ftjob_1")
    took = Amounts(trained_tokens=777, device_us=60_000_000, cost_nano=500_000_000)
    api.store.records.commit(final_part("ada", "ftjob_1", NOON, job, took))
    if request.param == "rolled up":
        assert roll_up(api.store.records, NOON + 3 * DAY) > 0
    return api


@pytest.fixture
def client(filled: Api) -> OpenAI:
    return OpenAI(
        api_key=ADMIN, admin_api_key=ADMIN, base_url="http://tuneloom/v1", http_client=filled.client, max_retries=0
    )


def get(api: Api, path: str, key: str = ADMIN, **params: Any) -> Any:
    answer = api.get(path, key=key, params={"start_time": MIDNIGHT, "end_time": MIDNIGHT + 3 * DAY, **params})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_client_reads_days_with_empty_ones_between(client: OpenAI):
    page = client.admin.organization.usage.completions(start_time=MIDNIGHT, end_time=MIDNIGHT + 3 * DAY)
    assert (page.object, page.has_more, page.next_page) == ("page", False, None)
    assert [(bucket.start_time, bucket.end_time) for bucket in page.data] == [
        (MIDNIGHT + day * DAY, MIDNIGHT + (day + 1) * DAY) for day in range(3)
    ]
    assert [len(bucket.results) for bucket in page.data] == [1, 0, 1]
    (result,) = page.data[0].results
    assert result.object == "organization.usage.completions.result"
    assert (result.input_tokens, result.input_cached_tokens, result.output_tokens) == (1130, 565, 4)
    assert result.num_model_requests == 4
    assert (result.project_id, result.user_id, result.api_key_id, result.model) == (None, None, None, None)


def test_the_client_groups_and_filters(client: OpenAI):
    ask = client.admin.organization.usage.completions
    span: dict[str, Any] = {"start_time": MIDNIGHT, "end_time": MIDNIGHT + DAY}
    (day,) = ask(**span, group_by=["project_id", "user_id", "api_key_id", "model"]).data
    rows = [(r.project_id, r.user_id, r.api_key_id, r.model, r.input_tokens) for r in day.results]
    assert rows == [
        ("ada", "ada", "key_1", "bot@v1", 110),
        ("ada", "ada", "key_2", "bot@v2", 20),
        ("bob", "bob", None, "tiny/llama", 1000),
    ]

    def count(**filters: Any) -> int:
        (day,) = ask(**span, **filters).data
        return sum(result.input_tokens for result in day.results)

    assert count(models=["bot@v1", "tiny/llama"]) == 1110
    assert count(api_key_ids=["key_2"]) == 20
    assert count(project_ids=["ada"]) == count(user_ids=["ada"]) == 130
    assert count(project_ids=["ada", "bob"]) == 1130
    assert count(project_ids=["ada"], user_ids=["bob"]) == 0
    assert count(models=["none"]) == 0


def test_what_openai_tells_apart_and_we_have_one_of_can_be_grouped_by(client: OpenAI):
    ask = client.admin.organization.usage.completions
    span: dict[str, Any] = {"start_time": MIDNIGHT, "end_time": MIDNIGHT + DAY}
    (result,) = ask(**span, group_by=["batch", "service_tier", "api_source"]).data[0].results
    assert (result.batch, result.service_tier, result.api_source) == (False, "default", "unlabeled")
    (result,) = ask(**span).data[0].results
    assert (result.batch, result.service_tier, result.api_source) == (None, None, None)
    (first, *others) = ask(**span, group_by=["model", "batch"]).data[0].results
    assert (first.model, first.batch, len(others)) == ("bot@v1", False, 2)
    assert ask(**span, batch=False).data[0].results[0].input_tokens == 1130
    assert ask(**span, batch=True).data[0].results == []
    (cost, *_) = client.admin.organization.usage.costs(**span, group_by=["api_source"]).data[0].results
    assert cost.api_source == "unlabeled"


def test_the_client_turns_pages_of_hours(client: OpenAI):
    ask = client.admin.organization.usage.completions
    options: dict[str, Any] = {"start_time": MIDNIGHT, "end_time": MIDNIGHT + DAY, "bucket_width": "1h", "limit": 7}
    found, page = [], ask(**options)
    while True:
        found += page.data
        if not page.has_more:
            break
        page = ask(**options, page=page.next_page)
    assert [bucket.start_time for bucket in found] == list(range(MIDNIGHT, MIDNIGHT + DAY, HOUR))
    tokens = {bucket.start_time: bucket.results[0].input_tokens for bucket in found if bucket.results}
    assert tokens == {MIDNIGHT: 30, NOON: 1100}
    assert len(ask(start_time=MIDNIGHT, end_time=MIDNIGHT + 9 * DAY, bucket_width="1h").data) == 24
    assert len(ask(start_time=MIDNIGHT, end_time=MIDNIGHT + 9 * DAY).data) == 7


def test_the_client_reads_costs(client: OpenAI):
    page = client.admin.organization.usage.costs(
        start_time=MIDNIGHT, end_time=MIDNIGHT + DAY, group_by=["project_id", "line_item"]
    )
    (day,) = page.data
    rows = [(r.project_id, r.line_item, r.amount.value, r.amount.currency) for r in day.results]
    assert rows == [
        ("ada", "bot@v1, inference", pytest.approx(110e-9), "usd"),
        ("ada", "bot@v1, training", 0.5, "usd"),
        ("ada", "bot@v2, inference", pytest.approx(20e-9), "usd"),
        ("bob", "tiny/llama, inference", pytest.approx(1000e-9), "usd"),
    ]


def test_an_owner_sees_their_own_with_all_that_we_count(filled: Api):
    page = get(filled, OWN, "ada:account", **{"group_by[]": ["kind", "model", "job_id"]})
    assert [len(bucket["results"]) for bucket in page["data"]] == [3, 0, 0]
    first, second, third = page["data"][0]["results"]
    assert first == {
        "object": "tuneloom.usage.result",
        "num_model_requests": 2,
        "input_tokens": 110,
        "input_cached_tokens": 55,
        "output_tokens": 2,
        "trained_tokens": 0,
        "device_seconds": 1.0,
        "cost": pytest.approx(110e-9),
        "currency": "USD",
        "api_key_id": None,
        "model": "bot@v1",
        "base": None,
        "job_id": None,
        "kind": "inference",
    }
    assert (second["model"], third["kind"], third["job_id"]) == ("bot@v2", "training", "ftjob_1")
    assert (third["trained_tokens"], third["device_seconds"], third["cost"]) == (777, 60.0, 0.5)
    for params, count in (({"kinds": "training"}, 0), ({"models": "bot@v2"}, 20), ({"job_ids[]": "ftjob_1"}, 0)):
        (result,) = get(filled, OWN, "ada:account", **params)["data"][0]["results"]
        assert result["input_tokens"] == count


def test_nobody_sees_what_is_anothers(filled: Api):
    assert [b["results"] for b in get(filled, OWN, "eve:account")["data"]] == [[], [], []]
    for params in ({"api_key_ids": "key_1"}, {"models": "bot@v1"}, {"job_ids": "ftjob_1"}):
        absent = {name: value + "x" for name, value in params.items()}
        assert get(filled, OWN, "bob:account", **params) == get(filled, OWN, "bob:account", **absent)
    for name in ("project_ids", "user_ids", "owner"):
        answer = filled.get(OWN, key="bob:account", params={"start_time": MIDNIGHT, name: "ada"})
        assert_error(answer, 400, name, "Unknown parameter")


def test_scopes_are_asked_for(filled: Api):
    for path, key in ((COMPLETIONS, "ada:account,training,inference"), (COSTS, "ada:account"), (OWN, "ada:training")):
        answer = filled.get(path, key=key, params={"start_time": MIDNIGHT})
        assert answer.status_code == 403, path


def test_no_price_no_amount(store: Store, api: Api):
    writer = UsageWriter(store.records, lambda: float(NOON))
    writer.add("ada", used("bot@v1"), Amounts(requests=1, input_tokens=5))
    writer.flush()
    assert get(api, COSTS)["data"][0]["results"][0]["amount"] is None
    assert get(api, OWN, "ada:account")["data"][0]["results"][0]["cost"] is None


def test_the_currency_is_that_of_the_settings(store: Store, tmp_path: Any):
    api = Api(store, Settings(home=tmp_path, train=TrainSettings(currency="EUR")))
    store.records.commit(final_part("ada", "x", NOON, used("m"), Amounts(cost_nano=10**9)))
    amount = get(api, COSTS)["data"][0]["results"][0]["amount"]
    assert amount == {"value": 1.0, "currency": "eur"}
    assert get(api, OWN, "ada:account")["data"][0]["results"][0]["currency"] == "EUR"


@pytest.mark.parametrize(
    ("path", "params", "param", "text"),
    [
        (COMPLETIONS, {}, "start_time", "Unix seconds"),
        (COMPLETIONS, {"start_time": "yesterday"}, "start_time", "whole number"),
        (COMPLETIONS, {"start_time": NOON, "end_time": NOON}, "end_time", "later"),
        (COMPLETIONS, {"start_time": NOON, "end_time": "²"}, "end_time", "whole number"),
        (COMPLETIONS, {"start_time": NOON, "bucket_width": "1m"}, "bucket_width", "kept by the hour"),
        (COMPLETIONS, {"start_time": NOON, "bucket_width": "2h"}, "bucket_width", "`1h` or `1d`"),
        (COMPLETIONS, {"start_time": NOON, "limit": 32}, "limit", "1 to 31"),
        (COMPLETIONS, {"start_time": NOON, "limit": 0}, "limit", "1 to 31"),
        (COMPLETIONS, {"start_time": NOON, "bucket_width": "1h", "limit": 169}, "limit", "1 to 168"),
        (COMPLETIONS, {"start_time": NOON, "group_by": "size"}, "group_by", "`project_id`"),
        (COMPLETIONS, {"start_time": NOON, "batch": "maybe"}, "batch", "`true` or `false`"),
        (COSTS, {"start_time": NOON, "batch": "true"}, "batch", "Unknown"),
        (COMPLETIONS, {"start_time": NOON, "page": "page_1"}, "page", "next_page"),
        (COMPLETIONS, {"start_time": NOON, "page": "x"}, "page", "next_page"),
        (COMPLETIONS, {"start_time": NOON, "models[]": ["m"] * 101}, "models", "100"),
        (COSTS, {"start_time": NOON, "bucket_width": "1h"}, "bucket_width", "Use `1d`"),
        (COSTS, {"start_time": NOON, "limit": 181}, "limit", "1 to 180"),
        (COSTS, {"start_time": NOON, "group_by": "model"}, "group_by", "`line_item`"),
        (OWN, {"start_time": NOON, "group_by": "project_id"}, "group_by", "`job_id`"),
    ],
)
def test_wrong_parameters_are_named(api: Api, path: str, params: dict[str, Any], param: str, text: str):
    assert_error(api.get(path, key=ADMIN, params=params), 400, param, text)


def test_a_page_that_would_read_too_much_is_refused(filled: Api, monkeypatch: pytest.MonkeyPatch):
    roll_up(filled.store.records, NOON + 3 * DAY)
    monkeypatch.setattr("tuneloom.store.usage.MAX_ROWS", 4)
    params = {"start_time": MIDNIGHT, "end_time": MIDNIGHT + 3 * DAY}
    assert_error(filled.get(COMPLETIONS, key=ADMIN, params=params), 400, "limit", "fewer")
    assert get(filled, COMPLETIONS, end_time=MIDNIGHT + HOUR, bucket_width="1h")["data"][0]["results"]
