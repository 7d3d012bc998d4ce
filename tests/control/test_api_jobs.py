import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from tests.control.conftest import BASE, Api, assert_error
from tests.control.fakes import put_fake_adapter
from tuneloom.config import TrainSettings
from tuneloom.control import models
from tuneloom.domain import (
    AdapterRef,
    Checkpoint,
    Estimate,
    Model,
    Setting,
    TrainOptions,
    Usage,
    Version,
    model_id,
    new_id,
    version_id,
)

JOBS = "/v1/fine_tuning/jobs"


def test_a_job_answers_in_the_shape_of_openai(api):
    job = api.create_job(
        suffix="support-bot",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
        tuneloom={"rank": 8, "target_modules": ["q_proj"]},
    )
    hyperparameters = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert job["object"] == "fine_tuning.job"
    assert (job["status"], job["model"], job["seed"]) == ("validating_files", BASE, 7)
    assert job["hyperparameters"] == hyperparameters
    assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    assert (job["error"], job["fine_tuned_model"], job["finished_at"], job["result_files"]) == (None, None, None, [])
    assert (job["organization_id"], job["metadata"]) == ("ada", {"team": "a"})
    assert job["tuneloom"]["options"]["rank"] == 8
    assert api.get(f"{JOBS}/{job['id']}").json() == job
    assert api.pokes == 1
    said = [event["message"] for event in api.get(f"{JOBS}/{job['id']}/events").json()["data"]]
    assert said == [f"Validating training file: {job['training_file']}", f"Created fine-tuning job: {job['id']}"]


def test_an_alias_is_trained_on_its_base_and_shown_as_it_was_asked_for(api):
    job = api.create_job(model="gpt-4o-mini-2024-07-18", hyperparameters={"n_epochs": 2})
    assert (job["model"], job["tuneloom"]["base"]) == ("gpt-4o-mini-2024-07-18", BASE)
    assert job["hyperparameters"]["n_epochs"] == 2


@pytest.mark.parametrize(
    "body, param, text",
    [
        ({"model": None}, "model", ""),
        ({"model": 5}, "model", "string"),
        ({"training_file": "file-absent"}, "training_file", "no file `file-absent`"),
        ({"training_file": "../../etc/passwd"}, "training_file", "no file"),
        ({"validation_file": "file-absent"}, "validation_file", "no file"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "from 1 to 50"),
        ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs", "whole number"),
        ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs", "`auto`"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs", "`auto`"),
        ({"hyperparameters": {"batch_size": 1000}}, "hyperparameters.batch_size", "256"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, "hyperparameters.learning_rate_multiplier", "above 0"),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta", "Unknown"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}},
            "method.supervised.hyperparameters.n_epochs",
            "from 1 to 50",
        ),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}},
            "method.dpo.hyperparameters.beta",
            "at most 2",
        ),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised", "`dpo`"),
        ({"tuneloom": {"early_stopping_patience": 2}}, "tuneloom.early_stopping_patience", "validation_file"),
        ({"tuneloom": {"evaluate_every_steps": 2}}, "tuneloom.evaluate_every_steps", "validation_file"),
        (
            {"tuneloom": {"early_stopping_min_delta": 0.1, "validation_share": 0.1}},
            "tuneloom.early_stopping_min_delta",
            "early_stopping_patience",
        ),
        (
            {"hyperparameters": {"batch_size": 6}, "tuneloom": {"accumulation_steps": 4}},
            "tuneloom.accumulation_steps",
            "Use one of 1, 2, 3, 6.",
        ),
        ({"tuneloom": {"warm_start": "nobody@v1"}}, "tuneloom.warm_start", "no version or checkpoint `nobody@v1`"),
        ({"method": {"type": "reinforcement"}}, "method.type", "`reinforcement`"),
        ({"method": {"type": "magic"}}, "method.type", ""),
        ({"method": {}}, "method.type", "Missing"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "supervised"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "not supported"),
        ({"suffix": "Has Upper"}, "suffix", "lower-case"),
        ({"suffix": "../x"}, "suffix", "lower-case"),
        ({"suffix": "latest"}, "suffix", "reserved"),
        ({"suffix": "gpt-4o-mini-2024-07-18"}, "suffix", "base model"),
        ({"suffix": "x" * 65}, "suffix", "64"),
        ({"seed": -1}, "seed", ""),
        ({"seed": "1"}, "seed", "integer"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "512"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16 items."),
        ({"tuneloom": {"packing": "yes"}}, "tuneloom.packing", "'auto', true or false"),
        ({"tuneloom": {"packing": 2}}, "tuneloom.packing", "'auto', true or false"),
        ({"tuneloom": {"target_modules": []}}, "tuneloom.target_modules", "is empty"),
        ({"tuneloom": {"target_modules": "q_proj"}}, "tuneloom.target_modules", "a list of names"),
        ({"tuneloom": {"target_modules": [1]}}, "tuneloom.target_modules", "a list of names"),
        ({"tuneloom": {"modules_to_save": ["lm_head"]}}, "tuneloom.modules_to_save", "lm_head, and adapters with"),
        ({"tuneloom": {"rank": 500}}, "tuneloom.rank", ""),
        ({"tuneloom": {"rank": 100}}, "tuneloom.rank", "64"),
        ({"tuneloom": {"ranks": 5}}, "tuneloom.ranks", "Unknown"),
        ({"temperature": 1}, "temperature", "Unknown parameter: `temperature`"),
    ],
)
def test_what_a_job_may_not_be_is_named(api, body, param, text):
    whole = {"model": BASE, "training_file": api.upload(), **body}
    assert_error(api.post(JOBS, json=whole), 400, param, text)
    assert api.store.records.jobs.query() == []


def test_what_a_job_resolves_itself_may_be_asked_for_as_auto(api):
    names = ("rank", "alpha", "learning_rate", "warmup_steps", "accumulation_steps", "max_length", "target_modules")
    job = api.create_job(tuneloom={**dict.fromkeys(names, "auto"), "dropout": 0.1})
    assert job["tuneloom"]["options"] == TrainOptions(dropout=0.1).model_dump(mode="json")
    named = api.create_job(tuneloom={"target_modules": ["q_proj"], "rank": 4})["tuneloom"]["options"]
    assert (named["target_modules"], named["rank"]) == (["q_proj"], 4)
    assert api.create_job(tuneloom={"target_modules": "all-linear"})["tuneloom"]["options"]["target_modules"] is None


def test_the_two_forms_of_hyperparameters_must_agree(api):
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}}
    assert api.create_job(method=method, hyperparameters={"n_epochs": 3})["hyperparameters"]["n_epochs"] == 3
    body = {"model": BASE, "training_file": api.upload(), "method": method, "hyperparameters": {"n_epochs": 2}}
    assert_error(api.post(JOBS, json=body), 400, "hyperparameters", "differ")


def test_dpo_has_a_beta_of_its_own(api):
    job = api.create_job(method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2}}})
    expected = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto", "beta": "auto"}
    assert job["method"] == {"type": "dpo", "dpo": {"hyperparameters": expected}}
    job = api.create_job(method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3}}})
    assert job["method"]["dpo"]["hyperparameters"]["beta"] == 0.3
    assert api.store.records.jobs.get(job["id"]).value.spec.method == "dpo"
    assert api.create_job(method={"type": "dpo"})["method"]["dpo"]["hyperparameters"]["beta"] == "auto"


def test_a_validation_share_and_a_validation_file_do_not_go_together(api):
    body = {"model": BASE, "training_file": api.upload(), "validation_file": api.upload()}
    answer = api.post(JOBS, json={**body, "tuneloom": {"validation_share": 0.1}})
    assert_error(answer, 400, "tuneloom.validation_share", "`validation_file`")


def test_a_job_starts_from_the_adapter_that_a_name_stands_for_when_it_is_created(api):
    adapter = AdapterRef(sha256="a" * 64, uri="jobs/x/a1/adapter", rank=4, size_bytes=9)
    for name, base in (("mine", BASE), ("foreign", "other/base")):
        model = Model(id=model_id("ada", name), owner="ada", name=name, base=base, created_at=1.0, active=1)
        version = Version(
            id=version_id("ada", name, 1),
            owner="ada",
            model=name,
            number=1,
            base=base,
            ft_name=f"ft:{base}:ada:{name}:1",
            adapter=adapter,
            created_at=1.0,
        )
        records = api.store.records
        records.commit(records.models.create(model), records.versions.create(version))
    for name in ("mine", "mine@v1", f"ft:{BASE}:ada:mine:1"):
        job = api.create_job(tuneloom={"warm_start": name})
        assert api.store.records.jobs.get(job["id"]).value.spec.warm_start == adapter
    body = {"model": BASE, "training_file": api.upload(), "tuneloom": {"warm_start": "foreign"}}
    assert_error(api.post(JOBS, json=body), 400, "tuneloom.warm_start", "`other/base`")


def test_an_unknown_model_a_foreign_one_and_one_without_a_version_are_not_found_alike(api):
    add_model(api, "mine")
    put_version(api, owner="eve", name="hers")
    for name in ("nobody/knows", "mine", "hers", "hers@v1"):
        body = {"model": name, "training_file": api.upload()}
        assert_error(api.post(JOBS, json=body), 404, "model", f"`{name}` does not exist")


@pytest.mark.parametrize("spelling", ["bot", "bot@v1", "ft"])
def test_a_tuned_model_is_trained_on_from_its_adapter(api, spelling):
    version = put_version(api)
    name = version.ft_name if spelling == "ft" else spelling
    job = api.create_job(model=name, suffix="bot")
    assert (job["model"], job["tuneloom"]["base"], job["tuneloom"]["options"]["warm_start"]) == (name, BASE, "bot@v1")
    assert api.store.records.jobs.get(job["id"]).value.spec.warm_start == version.adapter


def test_what_a_tuned_model_cannot_start_is_told(api):
    file = api.upload()
    put_version(api)
    both = {"model": "bot", "training_file": file, "tuneloom": {"warm_start": "bot@v1"}}
    assert_error(api.post(JOBS, json=both), 400, "tuneloom.warm_start", "both name an adapter")
    put_version(api, name="other", base="other/base")
    assert_error(api.post(JOBS, json={"model": "other", "training_file": file}), 400, "model", "is not served")
    put_version(api, name="wide", rank=128)
    body = {"model": BASE, "training_file": file, "tuneloom": {"warm_start": "wide"}}
    assert_error(api.post(JOBS, json=body), 400, "tuneloom.warm_start", "rank 128")


def test_an_adapter_stays_while_a_job_is_to_train_on_it(api):
    put_version(api)
    put_version(api)
    job = api.create_job(model="bot@v1")
    for name in ("bot@v1", "bot"):
        response = api.delete(f"/v1/models/{name}")
        assert (response.status_code, response.json()["error"]["code"]) == (409, "model_in_use"), response.text
    assert api.delete("/v1/models/bot@v2").status_code == 200
    api.post(f"{JOBS}/{job['id']}/cancel")
    assert api.delete("/v1/models/bot").status_code == 200


def test_an_owner_may_have_so_many_jobs_waiting(api):
    few = api.settings.model_copy(update={"train": TrainSettings(max_queued_per_owner=3)})
    api = Api(api.store, few)
    waiting = [api.create_job()["id"] for _ in range(3)]
    body = {"model": BASE, "training_file": api.upload()}
    refused = api.post(JOBS, json=body)
    assert_error(refused, 429, None, "3 of your jobs wait already, the limit is 3")
    assert refused.json()["error"]["code"] == "too_many_queued_jobs"
    assert refused.headers["x-should-retry"] == "false"
    assert api.post(JOBS, json=body | {"training_file": api.upload(key="eve:training")}, key="eve:training").is_success
    api.post(f"{JOBS}/{waiting[0]}/cancel")
    assert api.post(JOBS, json=body).is_success


def test_a_job_that_was_paused_needs_a_place_in_the_queue_to_go_on(api):
    few = api.settings.model_copy(update={"train": TrainSettings(max_queued_per_owner=2)})
    api = Api(api.store, few)
    paused = api.create_job()["id"]
    api.post(f"{JOBS}/{paused}/pause")
    waiting = [api.create_job()["id"] for _ in range(2)]
    refused = api.post(f"{JOBS}/{paused}/resume")
    assert_error(refused, 429, None, "2 of your jobs wait already, the limit is 2")
    assert api.get(f"{JOBS}/{paused}").json()["status"] == "paused"
    api.post(f"{JOBS}/{waiting[0]}/cancel")
    assert api.post(f"{JOBS}/{paused}/resume").json()["status"] == "validating_files"


def test_creates_at_once_do_not_go_beyond_the_limit(api):
    few = api.settings.model_copy(update={"train": TrainSettings(max_queued_per_owner=2)})
    # Each with a file of its own, by gateways of their own.
    bodies = [{"model": BASE, "training_file": api.upload()} for _ in range(8)]
    gateways = [Api(api.store, few) for _ in bodies]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda gateway, body: gateway.post(JOBS, json=body).status_code, gateways, bodies))
    assert sorted(answers) == [200] * 2 + [429] * 6


@pytest.mark.anyio
async def test_many_jobs_on_one_file_may_be_created_at_once(api):
    file = api.upload()
    transport = httpx2.ASGITransport(app=api.app)
    headers = {"authorization": "Bearer ada:training"}
    async with httpx2.AsyncClient(transport=transport, base_url="http://tuneloom", headers=headers, timeout=60) as http:
        bodies = [{"model": BASE, "training_file": file, "seed": seed} for seed in range(40)]
        answers = await asyncio.gather(*(http.post(JOBS, json=body) for body in bodies))
    assert [answer.status_code for answer in answers] == [200] * 40
    assert sorted(answer.json()["seed"] for answer in answers) == list(range(40))


def test_a_queued_job_tells_its_place_and_what_it_waits_for(api):
    first, second = (api.create_job()["id"] for _ in range(2))
    assert api.get(f"{JOBS}/{first}").json()["tuneloom"]["queue"] is None
    estimate = estimated(seconds=120)
    for id in (first, second):
        change(api, id, state="queued", estimate=estimate)
    change(api, second, waiting_for="a free place: 1 job of yours runs, the limit is 1")
    shown = [api.get(f"{JOBS}/{id}").json() for id in (first, second)]
    queue = [job["tuneloom"]["queue"] for job in shown]
    assert [place["position"] for place in queue] == [1, 2]
    assert [place["waiting_for"] for place in queue] == [
        "its turn",
        "a free place: 1 job of yours runs, the limit is 1",
    ]
    assert queue[1]["starts_at"] - queue[0]["starts_at"] == pytest.approx(120, abs=2)
    assert shown[0]["estimated_finish"] - queue[0]["starts_at"] == pytest.approx(120, abs=1)
    listed = {job["id"]: job["tuneloom"]["queue"]["position"] for job in api.get(JOBS).json()["data"]}
    assert listed == {first: 1, second: 2}


def test_a_finished_job_tells_what_was_estimated_what_it_took_and_the_error(api):
    id = api.create_job()["id"]
    usage = Usage(tokens=100, steps=5, seconds=90.0, memory_bytes=1 << 30, cost=0.5)
    setting = Setting(name="rank", value=16, reason="the default")
    change(api, id, state="succeeded", estimate=estimated(seconds=100), usage=usage, settings=(setting,))
    ours = api.get(f"{JOBS}/{id}").json()["tuneloom"]
    assert ours["settings"] == [{"name": "rank", "value": 16, "reason": "the default"}]
    assert ours["estimate"]["seconds"] == 100
    assert ours["usage"] == {**usage.model_dump(), "estimate_error": pytest.approx(-0.1)}


def estimated(seconds: float) -> Estimate:
    bounds = {"seconds": seconds, "seconds_low": seconds / 2, "seconds_high": seconds * 2}
    return Estimate(tokens=100, steps=5, memory_bytes=1 << 30, based_on="a test", **bounds)


def change(api, id: str, **fields: object) -> None:
    stored = api.store.records.jobs.get(id)
    api.store.records.commit(api.store.records.jobs.replace(stored, stored.value.model_copy(update=fields)))


def put_version(api, *, owner: str = "ada", name: str = "bot", base: str = BASE, rank: int = 4) -> Version:
    unique = new_id("")
    adapter = put_fake_adapter(api.store, f"imports/{unique}", unique).model_copy(update={"rank": rank})
    addition = models.add_version(
        api.store.records,
        owner=owner,
        name=name,
        base=base,
        adapter=adapter,
        unique=unique[:8],
        suffix=name,
        at=1.0,
    )
    api.store.records.commit(*addition.writes)
    return addition.version


def test_a_file_for_another_purpose_is_refused(api):
    file = api.upload(purpose="user_data")
    assert_error(api.post(JOBS, json={"model": BASE, "training_file": file}), 400, "training_file", "user_data")


def test_a_model_name_on_another_base_is_refused(api):
    add_model(api, "mine")
    body = {"model": BASE, "training_file": api.upload(), "suffix": "mine"}
    assert_error(api.post(JOBS, json=body), 400, "suffix", "other/base")


def add_model(api, name: str) -> None:
    model = Model(id=model_id("ada", name), owner="ada", name=name, base="other/base", created_at=1.0)
    api.store.records.commit(api.store.records.models.create(model))


@pytest.mark.parametrize(
    "raw, status, text",
    [
        (b"not json", 400, "not valid JSON"),
        (b'{"model": "\xff"}', 400, "not valid JSON"),
        (b"[1]", 400, "not a JSON object"),
        (b"", 400, "Missing required parameter"),
        (b" " * (2 << 20), 413, "larger than"),
    ],
)
def test_bodies_that_are_no_json_object(api, raw, status, text):
    response = api.post(JOBS, content=raw)
    assert response.status_code == status
    assert text in response.json()["error"]["message"]


def test_the_same_file_may_train_and_validate(api):
    file = api.upload()
    body = {"model": BASE, "training_file": file, "validation_file": file}
    assert api.post(JOBS, json=body).status_code == 200


def test_jobs_are_listed_newest_first_in_pages_and_by_metadata(api):
    ids = [api.create_job(metadata={"n": str(i % 2), "a.b": "x"})["id"] for i in range(5)]
    bare = api.create_job()["id"]
    newest = [bare, *reversed(ids)]
    first = api.get(JOBS, params={"limit": 4}).json()
    assert [job["id"] for job in first["data"]] == newest[:4]
    assert first["has_more"] is True
    rest = api.get(JOBS, params={"after": newest[3]}).json()
    assert [job["id"] for job in rest["data"]] == newest[4:]
    assert rest["has_more"] is False
    odd = api.get(JOBS, params={"metadata[n]": "1", "metadata[a.b]": "x", "limit": 1}).json()
    assert ([job["id"] for job in odd["data"]], odd["has_more"]) == ([ids[3]], True)
    assert [job["id"] for job in api.get(JOBS, params={"metadata": "null"}).json()["data"]] == [bare]
    assert_error(api.get(JOBS, params={"limit": "0"}), 400, "limit")
    assert_error(api.get(JOBS, params={"after": "ftjob-x"}), 404, "id")


@pytest.mark.parametrize("verbs", [["cancel"], ["pause", "cancel"], ["pause", "resume", "cancel"]])
def test_a_job_obeys_at_once_and_says_so(api, verbs):
    job = api.create_job()
    states = {"cancel": "cancelled", "pause": "paused", "resume": "validating_files"}
    for verb in verbs:
        answer = api.post(f"{JOBS}/{job['id']}/{verb}").json()
        assert answer["status"] == states[verb]
    newest = api.get(f"{JOBS}/{job['id']}/events").json()["data"][0]
    assert newest["message"] == "The job was cancelled"
    assert answer["finished_at"] is not None


@pytest.mark.parametrize(
    "before, verb, state",
    [
        (["cancel"], "cancel", "cancelled"),
        (["cancel"], "pause", "cancelled"),
        (["cancel"], "resume", "cancelled"),
        (["pause"], "pause", "paused"),
        ([], "resume", "validating_files"),
    ],
)
def test_what_a_state_forbids_is_a_conflict_that_clients_do_not_retry(api, before, verb, state):
    job = api.create_job()
    for step in before:
        api.post(f"{JOBS}/{job['id']}/{step}")
    refused = api.post(f"{JOBS}/{job['id']}/{verb}")
    assert_error(refused, 409, None, f"`{state}`")
    assert refused.json()["error"]["code"] == state
    assert refused.headers["x-should-retry"] == "false"


def test_a_retried_cancel_finds_the_job_cancelled(api):
    job = api.create_job()
    for retry in ("0", "1", "2"):
        answer = api.post(f"{JOBS}/{job['id']}/cancel", headers={"x-stainless-retry-count": retry})
        assert answer.json()["status"] == "cancelled"


def test_a_retried_create_is_one_job_and_an_idempotency_key_too(api):
    body = {"model": BASE, "training_file": api.upload()}
    first = api.post(JOBS, json=body).json()["id"]
    assert api.post(JOBS, json=body, headers={"x-stainless-retry-count": "1"}).json()["id"] == first
    assert api.post(JOBS, json=body).json()["id"] != first
    keyed = [api.post(JOBS, json=body, headers={"idempotency-key": "k"}).json()["id"] for _ in range(2)]
    assert keyed[0] == keyed[1]
    other = api.post(JOBS, json={**body, "seed": 1}, headers={"idempotency-key": "k"})
    assert_error(other, 422, None, "another body")


def test_events_come_in_pages(api):
    job = api.create_job()
    path = f"{JOBS}/{job['id']}/events"
    first = api.get(path, params={"limit": 1}).json()
    assert first["has_more"] is True
    rest = api.get(path, params={"after": first["data"][0]["id"]}).json()
    assert [event["message"] for event in rest["data"]] == [f"Created fine-tuning job: {job['id']}"]
    assert_error(api.get(path, params={"after": "ftevent-x"}), 404, "after")


def test_checkpoints_are_listed_newest_first_while_the_job_runs(api):
    job = api.create_job()
    adapter = {"sha256": "0" * 64, "uri": "x", "rank": 4, "size_bytes": 1}
    for step in (9, 10, 100):
        checkpoint = Checkpoint.model_validate(
            {
                "id": f"ftckpt_{step}",
                "owner": "ada",
                "job_id": job["id"],
                "base": BASE,
                "step": step,
                "name": f"ft:x:ckpt-step-{step}",
                "created_at": 1.0,
                "adapter": adapter,
                "metrics": {"train_loss": 0.5},
            }
        )
        api.store.records.commit(api.store.records.checkpoints.create(checkpoint))
    page = api.get(f"{JOBS}/{job['id']}/checkpoints", params={"limit": 2}).json()
    assert [item["step_number"] for item in page["data"]] == [100, 10]
    assert page["data"][0]["metrics"] == {"step": 100, "train_loss": 0.5}
    assert (page["has_more"], page["first_id"]) == (True, "ftckpt_100")


def test_checkpoint_permissions_say_that_they_are_not_there(api):
    path = "/v1/fine_tuning/checkpoints/ft:tiny%2Fllama:ada:x:1:ckpt-step-2/permissions"
    for answer in (api.get(path), api.post(path, json={"project_ids": ["p"]}), api.delete(path + "/cp_1")):
        assert_error(answer, 400, None, "not supported")


def test_jobs_need_a_key_that_may_train(api):
    assert_error(api.get(JOBS, key="ada:inference"), 403, None, "`training`")


@pytest.mark.parametrize("name", ["alpha", "max_grad_norm", "early_stopping_min_delta", "checkpoint_every_minutes"])
@pytest.mark.parametrize("number", ["1e999", "NaN", "Infinity"])
def test_a_setting_that_is_no_finite_number_is_named(api, name, number):
    body = f'{{"model": "{BASE}", "training_file": "{api.upload()}", "tuneloom": {{"{name}": {number}}}}}'
    answer = api.post(JOBS, content=body, headers={"content-type": "application/json"})
    assert_error(answer, 400, f"tuneloom.{name}", "")
