"""A key that is for some models finds nothing else, and what it does not find looks absent."""

import re

import pytest

from tests.control.conftest import BASE, assert_error
from tests.control.test_models import add_version
from tuneloom.domain import Checkpoint

JOBS = "/v1/fine_tuning/jobs"
OURS = "/v1/tuneloom/models"
BOT, OTHER, TINY = "ada:training,inference:bot", "ada:training,inference:other", f"ada:training,inference:{BASE}"


@pytest.fixture
def names(api) -> dict[str, str]:
    """What ada has of `bot`; she has another model, `other`."""
    job = api.create_job(suffix="bot")
    version = add_version(api.store)
    add_version(api.store, name="other")
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
    return {
        "JOB": job["id"],
        "FILE": job["training_file"],
        "BARE": "bot",
        "PINNED": "bot@v1",
        "FT": version.ft_name.replace("/", "%2F"),
        "CHECKPOINT": checkpoint.name.replace("/", "%2F"),
    }


ROUTES = [
    ("GET", f"{JOBS}/JOB", None),
    ("GET", f"{JOBS}/JOB/events", None),
    ("GET", f"{JOBS}/JOB/checkpoints", None),
    ("POST", f"{JOBS}/JOB/cancel", None),
    ("POST", f"{JOBS}/JOB/pause", None),
    ("POST", f"{JOBS}/JOB/resume", None),
    ("GET", f"{JOBS}?after=JOB", None),
    *(("GET", f"/v1/models/{name}", None) for name in ("BARE", "PINNED", "FT", "CHECKPOINT")),
    *(("DELETE", f"/v1/models/{name}", None) for name in ("BARE", "PINNED", "FT", "CHECKPOINT")),
    ("GET", f"{OURS}/BARE", None),
    ("POST", f"{OURS}/BARE/activate", {"version": 1}),
    ("POST", f"{OURS}/BARE/rollback", None),
    *(("GET", f"{OURS}/{name}/adapter", None) for name in ("BARE", "PINNED", "FT", "CHECKPOINT")),
    *(("POST", JOBS, {"model": name, "training_file": "FILE", "suffix": "other"}) for name in ("BARE", "PINNED")),
    ("POST", JOBS, {"model": BASE, "training_file": "FILE", "suffix": "BARE"}),
    ("POST", "/v1/tuneloom/estimate", {"model": "BARE", "training_file": "FILE", "suffix": "other"}),
]


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_what_a_key_is_not_for_looks_absent(api, names, method, path, body):
    def ask(known: dict[str, str]) -> tuple[int, bytes]:
        def fill(text: str) -> str:
            return re.sub("|".join(known), lambda word: known[word[0]], text)

        sent = {"json": {key: fill(value) if isinstance(value, str) else value for key, value in (body or {}).items()}}
        answer = api.call(method, fill(path), key=OTHER, **(sent if body else {}))
        content = answer.content
        for word, name in sorted(known.items(), key=lambda item: -len(item[1])):
            content = content.replace(name.replace("%2F", "/").encode(), word.encode())
        return answer.status_code, content

    absent = {word: name[:-3] + "zzz" for word, name in names.items() if word != "FILE"}
    absent |= {"FILE": names["FILE"], "BARE": "no-bot", "PINNED": "no-bot@v1"}
    found = ask(names)
    assert found == ask(absent)
    assert found[0] == 404


def test_a_key_finds_what_it_is_for(api, names):
    assert api.get(f"{JOBS}/{names['JOB']}", key=BOT).status_code == 200
    for name in ("BARE", "PINNED", "FT", "CHECKPOINT"):
        assert api.get(f"/v1/models/{names[name]}", key=BOT).status_code == 200
    assert api.post(f"{OURS}/bot/activate", json={"version": 1}, key=BOT).status_code == 200
    assert api.get(f"/v1/models/{BASE}", key=TINY).status_code == 200


def test_lists_hold_only_what_a_key_is_for(api, names):
    def ids(path: str, key: str) -> list[str]:
        return [item["id"] for item in api.get(path, key=key).json()["data"]]

    other = api.create_job(suffix="other")
    assert ids(JOBS, BOT) == [names["JOB"]]
    assert ids(JOBS, OTHER) == [other["id"]]
    assert ids(OURS, BOT) == ["bot"]
    assert ids("/v1/models", BOT) == ["bot", "bot@v1", names["FT"].replace("%2F", "/")]
    assert ids("/v1/models", TINY) == [BASE, "gpt-4o-mini-2024-07-18"]


def test_a_key_trains_only_models_that_it_is_for(api):
    file = api.upload()
    body = {"model": BASE, "training_file": file}
    assert_error(api.post(JOBS, json=body, key=BOT), 400, "suffix", "`suffix`")
    assert_error(api.post(JOBS, json={**body, "suffix": "new"}, key=BOT), 404, "suffix")
    assert api.post(JOBS, json={**body, "suffix": "bot"}, key=BOT).status_code == 200


def test_a_base_that_a_key_is_not_for_is_neither_shown_nor_told(api):
    assert_error(api.get(f"/v1/models/{BASE}", key=BOT), 404, "model", "does not exist")
    assert_error(api.delete("/v1/models/gpt-4o-mini-2024-07-18", key=BOT), 404, "model", "does not exist")


def test_an_adapter_is_imported_only_as_a_model_that_the_key_is_for(api):
    files = {"config": ("adapter_config.json", b"{}"), "weights": ("adapter_model.safetensors", b"x")}
    answer = api.post(f"{OURS}/import", data={"name": "new", "base": BASE}, files=files, key=BOT)
    assert_error(answer, 404, "name")


@pytest.mark.parametrize("path", ["/v1/tuneloom/webhooks", "/v1/tuneloom/audit", "/v1/tuneloom/usage?start_time=1"])
def test_what_is_about_all_that_an_owner_has_is_not_for_a_key_for_some_models(api, path):
    assert_error(api.get(path, key="ada:account,training:bot"), 403, None, "some models")
    assert api.get(path, key="ada:account,training").status_code == 200
