"""The life of a draft from its create to its File, with the real clients of providers and drafters in threads."""

import json
import threading
import time
from typing import Any

import pytest

from tests.control.conftest import assert_error
from tests.control.drafting.conftest import DRAFTS, KEY, Open
from tests.control.drafting.model import Ask, Hold, Reply, Rows, in_turn, reply, row
from tests.control.test_outbox import add_endpoint
from tuneloom.rows import Scan

BOTH = pytest.mark.parametrize("kind", ["gemini", "openai"])


@BOTH
@pytest.mark.parametrize("format", ["chat", "instruction", "text", "preference"])
def test_a_description_becomes_a_file_that_can_be_trained_on(open_desk: Open, kind: str, format: str):
    desk = open_desk(Rows(format), kind)
    made = desk.made(format=format, rows=12, seed=7)
    assert made["status"] == "succeeded" and made["ended_by"] == "target" and not made["partial"]
    assert made["error"] is None
    rows = desk.rows(made["file_id"])
    assert len(rows) == made["rows"] == 12
    scan = Scan(method="dpo" if format == "preference" else "supervised")
    for data in rows:
        scan.row(data)
    file = desk.api.get(f"/v1/files/{made['file_id']}").json()
    assert file["purpose"] == "fine-tune" and file["filename"] == f"{made['id']}.jsonl"


@BOTH
def test_provider_gets_prompt_schema_temperature_and_key(open_desk: Open, kind: str):
    desk = open_desk(Rows(), kind)
    desk.made(rows=10, topics=["cables"], language="en", length={"max_chars": 900}, roles=["technical"], model="m-2")
    ask = desk.server.asks[0]
    assert ask.data == {
        "description": "support of a router",
        "count": 10,
        "topics": ["cables"],
        "language": "English",
        "length": {"max_chars": 900},
    }
    assert ask.temperature == 0.5 and ask.has_schema and ask.max_tokens == 8192
    assert KEY in (ask.headers.get("x-goog-api-key", "") + ask.headers.get("authorization", ""))
    assert "m-2" in (ask.path if kind == "gemini" else ask.body["model"])


def test_drafted_rows_with_and_without_an_input_go_through_csv(open_desk: Open):
    rows = [{**row("instruction", n), "input": "" if n % 2 else f"the {n}th"} for n in range(10)]
    del rows[1]["input"]
    desk = open_desk(lambda ask: reply(rows))
    made = desk.made(rows=10)
    kept = desk.rows(made["file_id"])
    assert [each["input"] for each in kept] == [each.get("input", "") for each in rows]
    for kind in ("csv", "json"):
        answer = desk.api.get(f"/v1/tuneloom/files/{made['file_id']}/export?format={kind}")
        assert answer.status_code == 200
        assert desk.rows(desk.api.upload(answer.content, name=f"x.{kind}")) == kept


def test_provenance_is_read_from_the_draft_and_from_the_file(open_desk: Open):
    desk = open_desk()
    made = desk.made(rows=10, drafters=2, seed=3)
    provenance = made["provenance"]
    assert provenance == desk.api.get(f"/v1/tuneloom/files/{made['file_id']}").json()["provenance"]
    assert provenance["provider"] == "test" and provenance["model"] == "m-1"
    assert provenance["model_versions"] == ["gemini-test-001"]
    assert provenance["roles"] == {"standard": 1, "creative": 1}
    assert provenance["temperatures"] == {"standard": 0.7, "creative": 1.0}
    assert len(provenance["prompts_sha256"]) == 64 and provenance["seed"] == 3 and provenance["tuneloom"]
    assert provenance["counts"]["kept"] == 10
    assert provenance["started_at"] <= provenance["finished_at"]
    edited = desk.api.post(
        f"/v1/tuneloom/files/{made['file_id']}/edit", json={"operations": [{"op": "delete", "rows": [1]}]}
    ).json()
    assert edited["provenance"]["origin"] == provenance


def test_fifty_drafters_make_a_thousand_rows(open_desk: Open):
    desk = open_desk(Rows("chat"))
    made = desk.run(desk.create(format="chat", rows=1000, drafters=50)["id"], timeout_s=120)
    assert made["rows"] == 1000 and not made["partial"]
    texts = {json.dumps(data) for data in desk.rows(made["file_id"])}
    assert len(texts) == 1000
    assert [each["counts"]["kept"] for each in made["drafters"]] == [20] * 50
    assert [each["role"] for each in made["drafters"]][:5] == [
        "standard",
        "creative",
        "technical",
        "adversarial",
        "standard",
    ]
    assert {ask.temperature for ask in desk.server.asks} == {0.7, 1.0, 0.5, 0.9}


def test_no_more_drafters_run_at_once_than_the_settings_allow(open_desk: Open):
    running, most, lock, two = [0], [0], threading.Lock(), threading.Barrier(2)
    rows = Rows()

    def count(by: int) -> None:
        with lock:
            running[0] += by
            most[0] = max(most[0], running[0])

    def model(ask: Ask) -> Reply:
        count(1)
        if ask.number <= 2:
            two.wait(30)
        count(-1)
        return rows(ask)

    desk = open_desk(model, max_tasks=2, provider={"timeout_s": 40})
    assert desk.made(rows=60, drafters=6)["rows"] == 60
    assert most[0] == 2


def test_two_drafts_share_the_places(open_desk: Open):
    desk = open_desk(max_tasks=4)
    first, second = (desk.create(rows=40, drafters=4, key=f"{owner}:training")["id"] for owner in ("ada", "bob"))
    desk.control.tick()
    desk.control.tick()
    assert sorted(handle.split("-d")[0] for handle in desk.tasks.launched) == sorted([first] * 2 + [second] * 2)
    desk.run(first)


def test_counts_tell_what_was_dropped_and_why(open_desk: Open):
    wanted = [row("instruction", number) for number in range(20)]
    first = [
        *wanted[:4],
        wanted[0],
        {**wanted[1], "output": wanted[1]["output"].upper() + "!"},
        {"instruction": "a", "output": ""},
        {"question": wanted[4]["instruction"], "answer": wanted[4]["output"]},
        "no row",
        {"something": "else"},
    ]
    desk = open_desk(in_turn(reply(first), reply(wanted[5:10])))
    made = desk.made(rows=10)
    assert made["status"] == "succeeded" and made["rows"] == 10
    counts = made["counts"]
    assert counts["dropped"] == {"exact_duplicate": 2, "empty": 1, "wrong_shape": 2}
    assert counts["repaired"] == 1 and counts["kept"] == 10 and counts["received"] == 15
    assert counts["calls"] == 2 and counts["requested"] == 15
    assert (counts["input_tokens"], counts["output_tokens"]) == (200, 400)


def test_rows_near_others_or_near_a_seed_are_dropped(open_desk: Open):
    base = row("text", 1)["text"]
    changed = " ".join([*base.split()[:5], "otherword", *base.split()[6:]])
    seed = row("text", 2)["text"]
    good = [{"text": row("text", number)["text"]} for number in range(10, 20)]
    desk = open_desk(
        in_turn(reply([{"text": base}, {"text": changed}, {"text": seed + " more"}, *good[:7]]), reply(good[7:]))
    )
    made = desk.made(format="text", rows=11, seed_rows=[{"text": seed}])
    assert made["counts"]["dropped"] == {"near_duplicate": 2}
    assert made["rows"] == 11
    assert desk.server.asks[0].data["examples"] == [{"text": seed}]
    assert desk.server.asks[1].data["already_written"][0] == base[:80]
    assert made["request"]["seed_rows"] == 1


def test_without_a_similarity_alike_rows_stay(open_desk: Open):
    base = row("text", 1)["text"]
    alike = [{"text": base.replace(base.split()[5], f"word{number}")} for number in range(10)]
    made = open_desk(lambda ask: reply(alike)).made(format="text", rows=10, similarity=None)
    assert made["rows"] == 10 and made["counts"]["dropped"] == {}


def test_what_two_drafters_write_alike_is_made_up_for_in_another_round(open_desk: Open):
    fresh = Rows("text")

    def model(ask: Ask) -> Reply:
        # Both drafters' first reply is the same.
        if "already_written" not in ask.data:
            return reply([row("text", 1000 + number) for number in range(ask.count)])
        return fresh(ask)

    desk = open_desk(model)
    made = desk.made(format="text", rows=10, drafters=2)
    assert made["rows"] == 10 and made["round"] == 1 and made["ended_by"] == "target"
    assert made["counts"]["dropped"] == {"exact_duplicate": 5}
    assert made["counts"]["received"] == 15


def test_lengths_and_languages_that_were_not_asked_for_are_dropped(open_desk: Open):
    english = [f"Restart the router number {n} and wait until the green light is on again please." for n in range(10)]
    german = "Starten Sie den Router neu und warten Sie bitte, bis die grüne Lampe wieder leuchtet."
    rows = [{"text": text} for text in [german, "Too short for us.", "word " * 200, *english]]
    made = open_desk(lambda ask: reply(rows)).made(
        format="text", rows=10, language="en", length={"min_words": 6, "max_chars": 500}, similarity=None
    )
    assert made["rows"] == 10
    assert made["counts"]["dropped"] == {"wrong_language": 1, "too_short": 1, "too_long": 1}


@BOTH
def test_a_reply_that_was_cut_off_keeps_its_whole_rows(open_desk: Open, kind: str):
    rows = [row("instruction", number) for number in range(10)]
    text = json.dumps({"rows": rows})
    cut = Reply(text[: text.index(rows[6]["output"])], finish="length")
    made = open_desk(in_turn(cut, reply(rows[6:])), kind).made(rows=10)
    assert made["rows"] == 10
    assert made["counts"]["repaired"] == 6 and made["counts"]["dropped"] == {"truncated": 1}


@BOTH
def test_two_refusals_for_haste_are_waited_out(open_desk: Open, kind: str):
    desk = open_desk(in_turn(Reply(status=429), Reply(status=429), Rows()), kind)
    made = desk.made(rows=10)
    assert made["rows"] == 10 and len(desk.server.asks) == 3
    assert made["counts"]["calls"] == 1


@BOTH
@pytest.mark.parametrize("fault", [{"cut": 40}, {"cut": 0}, {"broken": 40}, {"broken": 0}])
def test_an_answer_that_was_cut_on_its_way_is_asked_for_again(open_desk: Open, kind: str, fault: dict[str, int]):
    rows = Rows()
    desk = open_desk(in_turn(Reply("{}", **fault), rows), kind)
    made = desk.made(rows=10)
    assert made["status"] == "succeeded" and not made["partial"] and made["error"] is None
    assert len(desk.server.asks) == 2


@BOTH
def test_tokens_that_cannot_be_do_not_make_a_budget_larger(open_desk: Open, kind: str):
    one = Rows("text")
    desk = open_desk(lambda ask: reply([one.row()], tokens=(-5000, -5000)), kind)
    made = desk.made(rows=20, format="text", max_tokens=12_000)
    assert made["ended_by"] == "budget" and made["partial"]
    assert min(made["counts"]["input_tokens"], made["counts"]["output_tokens"]) > 0


WAIT = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1.5s"}


@pytest.mark.parametrize(
    ("kind", "told", "seconds"),
    [
        ("gemini", {"details": [{"@type": "type.googleapis.com/google.rpc.QuotaFailure"}, WAIT]}, 1.5),
        ("gemini", {"headers": {"retry-after": "1"}}, 1.0),
        ("openai", {"headers": {"retry-after": "1"}}, 1.0),
    ],
)
def test_a_provider_that_asks_for_time_gets_it(open_desk: Open, kind: str, told: dict[str, Any], seconds: float):
    times: list[float] = []
    hasty = Reply(status=429, message="quota", **told)

    def model(ask: Ask) -> Reply:
        times.append(time.monotonic())
        return hasty if ask.number == 1 else rows(ask)

    rows = Rows()
    desk = open_desk(model, kind, provider={"attempts": 1})
    made = desk.made(rows=10)
    assert made["status"] == "succeeded" and made["counts"]["calls"] == 2
    assert times[1] - times[0] >= seconds


@BOTH
def test_a_provider_that_is_away_for_good_fails_the_draft(open_desk: Open, kind: str):
    desk = open_desk(lambda ask: Reply(status=503, message="overloaded"), kind)
    made = desk.made(rows=10)
    assert made["status"] == "failed" and made["ended_by"] == "provider" and made["file_id"] is None
    assert made["error"]["code"] == "provider_unavailable" and "answered 503" in made["error"]["message"]
    # Three calls of four attempts each.
    assert len(desk.server.asks) == 12


@BOTH
def test_a_provider_that_goes_away_leaves_the_rows_it_gave(open_desk: Open, kind: str):
    rows = Rows()
    desk = open_desk(in_turn(rows, rows, Reply(status=503)), kind)
    made = desk.made(rows=50)
    assert made["status"] == "succeeded" and made["partial"] and made["rows"] == 20 and made["ended_by"] == "provider"
    assert made["error"]["code"] == "provider_unavailable"
    assert len(desk.rows(made["file_id"])) == 20


@BOTH
def test_prompts_that_are_blocked_end_the_draft(open_desk: Open, kind: str):
    made = open_desk(lambda ask: Reply(finish="blocked"), kind).made(rows=10)
    assert made["status"] == "failed" and made["ended_by"] == "exhausted"
    assert made["error"]["code"] == "draft_exhausted" and made["counts"]["dropped"] == {"blocked": 4}


@BOTH
def test_valid_json_of_the_wrong_shape_gives_no_rows(open_desk: Open, kind: str):
    made = open_desk(lambda ask: Reply('{"rows": [{"a": 1}, [2], 3]}'), kind).made(rows=10)
    assert made["status"] == "failed" and made["counts"]["dropped"] == {"wrong_shape": 12}


@BOTH
def test_a_reply_that_is_too_slow_is_asked_for_again(open_desk: Open, kind: str):
    desk = open_desk(in_turn(Reply(delay_s=6), Rows()), kind, provider={"timeout_s": 2})
    made = desk.made(rows=10)
    assert made["rows"] == 10 and made["counts"]["calls"] == 1 and len(desk.server.asks) >= 2


@BOTH
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_fails_at_once_and_is_not_told(open_desk: Open, kind: str, status: int):
    desk = open_desk(lambda ask: Reply(status=status, message=f"the key {KEY} is not valid"), kind, max_tasks=1)
    made = desk.made(rows=50, drafters=5)
    assert made["status"] == "failed" and made["error"]["code"] == "provider_key_refused"
    assert KEY not in json.dumps(made) and "the key *** is not valid" in made["error"]["message"]
    assert len(desk.server.asks) == 1


def test_a_key_that_is_not_set_is_named_by_its_setting(open_desk: Open, monkeypatch: pytest.MonkeyPatch):
    desk = open_desk()
    monkeypatch.delenv("DRAFT_KEY")
    made = desk.made(rows=10)
    assert made["error"]["code"] == "provider_key_missing"
    assert "`drafting.providers.test.api_key_env`: the variable `DRAFT_KEY` is not set" in made["error"]["message"]


def test_a_key_may_be_in_a_file(open_desk: Open, tmp_path):
    (tmp_path / "key").write_text("of-a-file\n")
    desk = open_desk(provider={"api_key_env": None, "api_key_file": str(tmp_path / "key")})
    assert desk.made(rows=10)["rows"] == 10
    assert desk.server.asks[0].headers["x-goog-api-key"] == "of-a-file"


def test_an_endpoint_without_structured_output_is_asked_plainly(open_desk: Open):
    rows = Rows()

    def model(ask: Ask) -> Reply:
        if "response_format" in ask.body:
            return Reply(status=400, message="response_format is not supported", param="response_format")
        if "max_tokens" in ask.body:
            return Reply(status=400, message="Use 'max_completion_tokens' instead of 'max_tokens'.")
        text = rows(ask).text
        return Reply(f"Here are the rows:\n```json\n{text}\n```\nAnything else?", tokens=None)

    desk = open_desk(model, "openai")
    made = desk.made(rows=20)
    assert made["rows"] == 20 and made["counts"]["repaired"] == 20
    forms = [ask.body.get("response_format", {}).get("type") for ask in desk.server.asks]
    assert forms == ["json_schema", "json_object", None, None, None]
    # An endpoint that does not count is taken to use what was estimated.
    assert made["counts"]["input_tokens"] > 0 and made["counts"]["output_tokens"] > 0


def test_the_budget_of_tokens_is_never_passed(open_desk: Open):
    rows = Rows()
    desk = open_desk(lambda ask: reply([rows.row() for _ in range(ask.count)], tokens=(400, min(900, ask.max_tokens))))
    made = desk.made(rows=500, drafters=4, max_tokens=20_000)
    assert made["status"] == "succeeded" and made["partial"] and made["ended_by"] == "budget"
    spent = made["counts"]["input_tokens"] + made["counts"]["output_tokens"]
    assert 10_000 < spent <= 20_000
    assert made["rows"] == len(desk.rows(made["file_id"])) >= 40


def test_a_small_budget_goes_to_few_drafters(open_desk: Open):
    made = open_desk().made(rows=100, drafters=50, max_tokens=20_000)
    assert [each["role"] for each in made["drafters"]] == ["standard", "creative"]
    assert made["rows"] == 100 and made["status"] == "succeeded"


def test_a_budget_that_is_too_small_for_a_call_says_so(open_desk: Open):
    desk = open_desk()
    made = desk.made(rows=10, max_tokens=1000, description="routers " * 500)
    assert made["status"] == "failed" and made["error"]["code"] == "draft_budget"
    assert "too small for a call" in made["error"]["message"] and desk.server.asks == []


def test_the_budget_of_money_is_never_passed(open_desk: Open):
    rows = Rows()
    desk = open_desk(
        lambda ask: reply([rows.row() for _ in range(ask.count)], tokens=(400, min(900, ask.max_tokens))),
        provider={"input_price": 1.0, "output_price": 10.0},
    )
    made = desk.made(rows=500, drafters=2, max_cost=0.1)
    assert made["ended_by"] == "budget" and made["currency"] == "USD"
    assert 0.05 < made["cost"] <= 0.1


def test_the_time_limit_keeps_what_there_is(open_desk: Open):
    rows = Rows()
    hold = Hold()
    desk = open_desk(in_turn(rows, hold), provider={"timeout_s": 60}, heartbeat_s=0.05)
    id = desk.create(rows=100, time_limit_s=10)["id"]
    desk.until(lambda: desk.get(id)["rows"] == 10)
    now = time.time() + 11
    desk.control._clock = lambda: now
    made = desk.run(id)
    assert made["status"] == "succeeded" and made["partial"] and made["ended_by"] == "time_limit" and made["rows"] == 10
    hold.go.set()


def test_a_cancelled_draft_ends_within_seconds_and_keeps_its_rows(open_desk: Open):
    rows = Rows()
    hold = Hold()
    desk = open_desk(in_turn(rows, rows, hold), provider={"timeout_s": 60})
    id = desk.create(rows=200, drafters=2)["id"]
    desk.until(lambda: desk.get(id)["rows"] == 20)
    page = desk.api.get(f"{DRAFTS}/{id}/rows?after=15").json()
    assert [data["row"] for data in page["data"]] == [16, 17, 18, 19, 20] and not page["is_final"]
    asked = desk.api.post(f"{DRAFTS}/{id}/cancel").json()
    assert asked["status"] == "running" and asked["is_cancelling"]
    assert desk.api.post(f"{DRAFTS}/{id}/cancel").status_code == 200
    # The calls that are under way do not end meanwhile.
    made = desk.run(id)
    assert made["status"] == "cancelled" and made["partial"] and made["rows"] == 20 and made["ended_by"] == "cancelled"
    assert len(desk.rows(made["file_id"])) == 20
    assert desk.api.get(f"{DRAFTS}/{id}/rows").json()["is_final"]
    assert desk.api.post(f"{DRAFTS}/{id}/cancel").status_code == 200
    hold.go.set()


def test_a_draft_that_has_not_begun_is_cancelled_without_a_file(open_desk: Open):
    desk = open_desk()
    id = desk.create(rows=10, seed_rows=[{"instruction": "a", "output": "b"}])["id"]
    desk.api.post(f"{DRAFTS}/{id}/cancel")
    made = desk.run(id)
    assert made["status"] == "cancelled" and made["file_id"] is None and made["rows"] == 0
    assert desk.server.asks == [] and desk.store.blobs.list("drafts") == []


def test_one_that_has_ended_cannot_be_cancelled(open_desk: Open):
    desk = open_desk()
    id = desk.made(rows=10)["id"]
    assert_error(desk.api.post(f"{DRAFTS}/{id}/cancel"), 409, None, "it is `succeeded`")


def test_nothing_is_left_beside_the_file(open_desk: Open):
    desk = open_desk()
    made = desk.made(rows=30, drafters=3, seed_rows=[{"instruction": "a", "output": "b"}])
    assert desk.store.blobs.list("drafts") == []
    assert desk.store.records.drafters.query() == []
    assert len(made["drafters"]) == 3


def test_usage_webhook_and_audit_are_written_once(open_desk: Open):
    desk = open_desk(provider={"input_price": 1.0, "output_price": 2.0})
    made = desk.made(rows=10)
    (part,) = desk.store.records.usage_parts.query({"owner": "ada"})
    (line,) = part.value.lines
    assert line.used.kind == "drafting" and line.used.job_id == made["id"] and line.used.key_id == "key_1"
    assert (line.amounts.input_tokens, line.amounts.output_tokens, line.amounts.requests) == (100, 200, 1)
    assert line.amounts.cost == pytest.approx(made["cost"]) == pytest.approx(0.0005)
    entries = desk.store.records.audit_entries.query(order_by="created_at")
    assert [entry.value.action for entry in entries] == ["draft.created", "file.created"]


def test_a_webhook_tells_of_the_end(open_desk: Open):
    desk = open_desk(in_turn(Rows(), Reply(status=400, message="bad")))
    add_endpoint(desk.store)
    good = desk.made(rows=10)
    bad = desk.made(rows=10)
    told: list[Any] = [
        json.loads(s.value.body) for s in desk.store.records.webhook_deliveries.query(order_by="sequence")
    ]
    assert [each["type"] for each in told] == ["tuneloom.draft.completed", "tuneloom.draft.failed"]
    assert told[0]["data"]["id"] == good["id"] and told[0]["data"]["file_id"] == good["file_id"]
    assert told[1]["data"]["id"] == bad["id"] and bad["error"]["code"] == "provider_refused"
    assert told[1]["data"]["error"] == bad["error"]


def test_a_webhook_tells_of_a_cancel_before_and_after_the_begin_once_each(open_desk: Open):
    hold = Hold()
    desk = open_desk(in_turn(Rows(), hold))
    add_endpoint(desk.store)
    unbegun = desk.create(rows=10)["id"]
    assert desk.api.post(f"{DRAFTS}/{unbegun}/cancel").status_code == 200
    desk.run(unbegun)
    begun = desk.create(rows=20)["id"]
    desk.until(lambda: desk.get(begun)["rows"] == 10)
    assert desk.api.post(f"{DRAFTS}/{begun}/cancel").status_code == 200
    made = desk.run(begun)
    hold.go.set()
    desk.control.tick()
    told = [json.loads(s.value.body) for s in desk.store.records.webhook_deliveries.query(order_by="sequence")]
    assert [each["type"] for each in told] == ["tuneloom.draft.cancelled"] * 2
    assert [each["data"]["id"] for each in told] == [unbegun, begun]
    assert [each["data"]["rows"] for each in told] == [0, 10] and told[1]["data"]["file_id"] == made["file_id"]
