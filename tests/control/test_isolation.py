"""What belongs to somebody else looks, byte for byte, like what does not exist."""

import json
import re
from urllib.parse import unquote

import pytest

from tests.control.conftest import BASE
from tests.control.drafting.test_api import new_draft
from tests.control.test_models import add_version
from tuneloom.control import outbox
from tuneloom.domain import Amounts, Checkpoint, Used
from tuneloom.store.usage_writer import final_part

JOBS = "/v1/fine_tuning/jobs"
OURS = "/v1/tuneloom/models"
DRAFTS = "/v1/tuneloom/drafts"
HOOKS = "/v1/tuneloom/webhooks"
KEYS = "/v1/tuneloom/keys"
AUDIT = "/v1/tuneloom/audit"
OPENAI_HOOKS = "/v1/webhook_endpoints"
PART = {"files": {"data": ("part", b"x")}}


@pytest.fixture
def hers(api) -> dict[str, str]:
    """Ids and names of everything that ada has."""
    job = api.create_job(suffix="bot")
    version = add_version(api.store)
    checkpoint = Checkpoint(
        id="ftckpt_1",
        owner="ada",
        job_id=job["id"],
        base=BASE,
        step=2,
        name=version.ft_name + ":ckpt-step-2",
        created_at=1.0,
        adapter=version.adapter,
    )
    api.store.records.commit(api.store.records.checkpoints.create(checkpoint))
    hook = {"url": "https://example.com/", "event_types": ["fine_tuning.job.failed"]}
    endpoint = api.post(HOOKS, json=hook, key="ada:account").json()["id"]
    delivery = outbox.delivery(api.store.records.webhook_endpoints.get(endpoint).value, "x", {"id": "x"}, 1.0)
    api.store.records.commit(api.store.records.webhook_deliveries.create(delivery))
    upload = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 1, "mime_type": "x"}
    draft = new_draft(api.store)
    return {
        "DRAFT": draft.id,
        "FILE": job["training_file"],
        "JOB": job["id"],
        "UPLOAD": api.post("/v1/uploads", json=upload).json()["id"],
        "MODEL": "bot",
        "PINNED": "bot@v1",
        "FT": version.ft_name.replace("/", "%2F"),
        "CHECKPOINT": checkpoint.name.replace("/", "%2F"),
        "HOOK": endpoint,
        "DELIVERY": delivery.id,
        "KEY": api.post(KEYS, json={"scopes": ["training"]}, key="ada:training,account").json()["id"],
        "AUDIT": api.get(AUDIT, key="ada:account").json()["data"][0]["id"],
        "EVENT": api.get(f"{JOBS}/{job['id']}/events").json()["data"][0]["id"],
    }


@pytest.mark.parametrize(
    "method, path, options",
    [
        ("GET", "/v1/files/FILE", {}),
        ("GET", "/v1/files/FILE/content", {}),
        ("DELETE", "/v1/files/FILE", {}),
        ("POST", "/v1/tuneloom/files/FILE/check", {"json": {"model": BASE}}),
        ("GET", "/v1/tuneloom/files/FILE", {}),
        ("GET", "/v1/tuneloom/files/FILE/rows", {}),
        ("GET", "/v1/tuneloom/files/FILE/export?format=csv", {}),
        ("POST", "/v1/tuneloom/files/FILE/edit", {"json": {"operations": [{"op": "delete", "rows": [1]}]}}),
        ("GET", f"{DRAFTS}/DRAFT", {}),
        ("GET", f"{DRAFTS}/DRAFT/rows", {}),
        ("GET", f"{DRAFTS}/DRAFT/events?timeout_s=1", {}),
        ("GET", f"{DRAFTS}?after=DRAFT", {}),
        ("POST", f"{DRAFTS}/DRAFT/cancel", {}),
        ("POST", DRAFTS, {"json": {"description": "x", "format": "text", "rows": 10, "seed_file": "FILE"}}),
        ("GET", "/v1/files?after=FILE", {}),
        ("POST", "/v1/uploads/UPLOAD/parts", PART),
        ("POST", "/v1/uploads/UPLOAD/complete", {"json": {"part_ids": ["x"]}}),
        ("POST", "/v1/uploads/UPLOAD/cancel", {}),
        ("GET", f"{JOBS}/JOB", {}),
        ("POST", f"{JOBS}/JOB/cancel", {}),
        ("POST", f"{JOBS}/JOB/pause", {}),
        ("POST", f"{JOBS}/JOB/resume", {}),
        ("GET", f"{JOBS}/JOB/events", {}),
        ("GET", f"{JOBS}/JOB/events?after=EVENT", {}),
        ("GET", f"{JOBS}/JOB/checkpoints", {}),
        ("GET", f"{JOBS}?after=JOB", {}),
        ("POST", JOBS, {"json": {"model": BASE, "training_file": "FILE"}}),
        ("POST", JOBS, {"json": {"model": "MODEL", "training_file": "FILE"}}),
        ("POST", JOBS, {"json": {"model": "PINNED", "training_file": "FILE"}}),
        ("GET", "/v1/models/MODEL", {}),
        ("GET", "/v1/models/PINNED", {}),
        ("GET", "/v1/models/FT", {}),
        ("GET", "/v1/models/CHECKPOINT", {}),
        ("DELETE", "/v1/models/MODEL", {}),
        ("DELETE", "/v1/models/FT", {}),
        ("DELETE", "/v1/models/CHECKPOINT", {}),
        ("GET", f"{OURS}/MODEL", {}),
        ("POST", f"{OURS}/MODEL/activate", {"json": {"version": 1}}),
        ("POST", f"{OURS}/MODEL/rollback", {}),
        ("GET", f"{OURS}/MODEL/adapter", {}),
        ("GET", f"{OURS}/FT/adapter", {}),
        ("GET", f"{OURS}/MODEL/keys", {}),
        ("POST", f"{OURS}/MODEL/keys", {}),
        ("GET", f"{KEYS}/KEY", {}),
        ("POST", f"{KEYS}/KEY", {"json": {"name": "mine"}}),
        ("POST", f"{KEYS}/KEY", {"json": {"nonsense": 1}}),
        ("POST", f"{KEYS}/KEY/rotate", {"json": {}}),
        ("POST", f"{KEYS}/KEY/revoke", {}),
        ("DELETE", f"{KEYS}/KEY", {}),
        ("GET", f"{AUDIT}?after=AUDIT", {}),
        ("GET", f"{AUDIT}?before=AUDIT", {}),
        ("GET", f"{HOOKS}/HOOK", {}),
        ("GET", f"{HOOKS}?after=HOOK", {}),
        ("POST", f"{HOOKS}/HOOK", {"json": {"enabled": False}}),
        ("POST", f"{HOOKS}/HOOK", {"json": {"nonsense": 1}}),
        ("DELETE", f"{HOOKS}/HOOK", {}),
        ("POST", f"{HOOKS}/HOOK/rotate", {"json": {}}),
        ("POST", f"{HOOKS}/HOOK/test", {"json": {}}),
        ("GET", f"{HOOKS}/HOOK/deliveries", {}),
        ("GET", f"{HOOKS}/HOOK/deliveries?after=DELIVERY", {}),
        ("GET", f"{HOOKS}/HOOK/deliveries/DELIVERY", {}),
        ("POST", f"{HOOKS}/HOOK/deliveries/DELIVERY/replay", {}),
        ("GET", f"{OPENAI_HOOKS}/HOOK", {}),
        ("GET", f"{OPENAI_HOOKS}?after=HOOK", {}),
        ("POST", f"{OPENAI_HOOKS}/HOOK", {"json": {"name": "mine"}}),
        ("DELETE", f"{OPENAI_HOOKS}/HOOK", {}),
        ("POST", f"{OPENAI_HOOKS}/HOOK/rotate_secret", {"json": {}}),
        ("POST", f"{OPENAI_HOOKS}/HOOK/test", {"json": {"event_type": "fine_tuning.job.failed"}}),
    ],
)
def test_foreign_and_absent_are_answered_alike(api, hers, method, path, options):
    def ask(names: dict[str, str]) -> tuple[int, bytes]:
        def fill(value):
            if isinstance(value, str):
                for word, name in names.items():
                    value = value.replace(word, name)
            return value

        sent = dict(options)
        if "json" in sent:
            sent["json"] = {key: fill(value) for key, value in sent["json"].items()}
        answer = api.call(method, fill(path), key="bob:training,account", **sent)
        content = answer.content
        # The longest first: a name may be a part of another.
        for word, name in sorted(names.items(), key=lambda item: -len(item[1])):
            content = content.replace(name.replace("%2F", "/").encode(), word.encode())
        return answer.status_code, content

    absent = {word: name[:-3] + "zzz" for word, name in hers.items()} | {"MODEL": "no-bot", "PINNED": "no-bot@v1"}
    foreign = ask(hers)
    assert foreign == ask(absent)
    assert foreign[0] in (400, 404)


@pytest.fixture
def his(api) -> dict[str, str]:
    """Things of bob's own, which could name something of ada's."""
    key, hook = "bob:training,account", {"url": "https://example.com/", "event_types": ["fine_tuning.job.failed"]}
    upload = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 1, "mime_type": "x"}
    return {
        "OWN_FILE": api.upload(b'{"text": "a"}\n', key=key),
        "OWN_JOB": api.create_job(key=key)["id"],
        "OWN_UPLOAD": api.post("/v1/uploads", json=upload, key=key).json()["id"],
        "OWN_HOOK": api.post(HOOKS, json=hook, key=key).json()["id"],
    }


ON_OWN = {"model": BASE, "training_file": "OWN_FILE"}


@pytest.mark.parametrize(
    "method, path, body",
    [
        ("POST", "/v1/tuneloom/files/OWN_FILE/edit", {"operations": [{"op": "append", "file": "FILE"}]}),
        ("POST", "/v1/tuneloom/files/OWN_FILE/check", {"model": BASE, "validation_file": "FILE"}),
        ("POST", JOBS, {**ON_OWN, "validation_file": "FILE"}),
        *(
            ("POST", JOBS, {**ON_OWN, "tuneloom": {"warm_start": name}})
            for name in ("MODEL", "PINNED", "FT", "CHECKPOINT")
        ),
        *(("POST", JOBS, {**ON_OWN, "model": name}) for name in ("MODEL", "PINNED", "FT", "CHECKPOINT")),
        *(("POST", "/v1/tuneloom/estimate", {**ON_OWN, "model": name}) for name in ("MODEL", "FT", "CHECKPOINT")),
        ("POST", "/v1/uploads/OWN_UPLOAD/complete", {"part_ids": ["PART"]}),
        ("POST", KEYS, {"scopes": ["training"], "models": ["MODEL"]}),
        ("GET", f"{JOBS}/OWN_JOB/events?after=EVENT", None),
        ("GET", f"{JOBS}/OWN_JOB/checkpoints?after=STEP", None),
        ("GET", f"{HOOKS}/OWN_HOOK/deliveries?after=DELIVERY", None),
        ("GET", f"{HOOKS}/OWN_HOOK/deliveries/DELIVERY", None),
        ("POST", f"{HOOKS}/OWN_HOOK/deliveries/DELIVERY/replay", None),
    ],
)
def test_what_ones_own_thing_names_of_another_looks_absent(api, hers, his, method, path, body):
    part = api.post(f"/v1/uploads/{hers['UPLOAD']}/parts", **PART).json()["id"]
    theirs = {**{word: unquote(name) for word, name in hers.items()}, "PART": part, "STEP": "ftckpt_1"}
    absent = {word: name[:-3] + "zzz" for word, name in theirs.items()} | {"MODEL": "no-bot", "PINNED": "no-bot@v1"}

    def ask(names: dict[str, str]) -> tuple[int, str]:
        text = json.dumps([path, body])
        for word, name in [*his.items(), *names.items()]:
            text = re.sub(rf"\b{word}\b", name, text)
        url, sent = json.loads(text)
        answer = api.call(method, url, key="bob:training,account", **({"json": sent} if body else {}))
        said = answer.text
        for word, name in sorted(names.items(), key=lambda item: -len(item[1])):
            said = re.sub(rf"(?<![\w-]){re.escape(name)}(?!\w)", word, said)
        return answer.status_code, said

    foreign = ask(theirs)
    assert foreign == ask(absent)
    assert foreign[0] in (400, 404)


def test_lists_hold_only_what_is_the_callers(api, hers):
    for path in ("/v1/files", JOBS, OURS, HOOKS, KEYS, AUDIT):
        assert api.get(path, key="bob:training,account").json()["data"] == []
        assert api.get(path, key="ada:training,account").json()["data"] != []
    names = [model["id"] for model in api.get("/v1/models", key="bob:training").json()["data"]]
    assert names == [BASE, "gpt-4o-mini-2024-07-18"]


def test_usage_holds_only_what_is_the_callers(api, hers):
    used = Used(kind="inference", base=BASE, model="bot@v1", key_id="key_hers", job_id=hers["JOB"])
    api.store.records.commit(final_part("ada", "x", 1.8e9, used, Amounts(requests=1, input_tokens=7)))
    path = "/v1/tuneloom/usage?start_time=1799900000&end_time=1800100000&group_by=model"
    assert b"bot@v1" in api.get(path, key="ada:account").content
    theirs = api.get(path, key="bob:account").content
    assert b"bot" not in theirs and b"results" in theirs
    for name, value in (("models", "bot@v1"), ("api_key_ids", "key_hers"), ("job_ids", hers["JOB"])):
        foreign = api.get(f"{path}&{name}={value}", key="bob:account")
        assert foreign.status_code == 200
        assert foreign.content == theirs == api.get(f"{path}&{name}=zzz", key="bob:account").content


def test_the_same_name_of_two_owners_is_two_models(api, hers):
    add_version(api.store, owner="bob")
    api.delete("/v1/models/bot", key="bob:training")
    assert api.get("/v1/models/bot").status_code == 200


def test_a_retry_of_another_owner_finds_nothing(api, hers):
    theirs = api.upload(b"{}\n", key="bob:training", headers={"x-stainless-retry-count": "1"})
    assert theirs != hers["FILE"]
