from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.control.conftest import BASE, assert_error
from tuneloom.domain import AdapterRef, Checkpoint, Model, Version, model_id, version_id

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
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "16"),
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


def test_an_unknown_model_is_not_found_and_a_tuned_one_is_not_trained_on(api):
    file = api.upload()
    body = {"model": "nobody/knows", "training_file": file}
    assert_error(api.post(JOBS, json=body), 404, "model", "`nobody/knows` does not exist")
    add_model(api, "mine")
    assert_error(api.post(JOBS, json={"model": "mine", "training_file": file}), 400, "model", "other/base")


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


def test_many_jobs_may_be_created_on_one_file_at_once(api):
    body = {"model": BASE, "training_file": api.upload()}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: api.post(JOBS, json={**body, "seed": seed}), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len({answer.json()["id"] for answer in answers}) == 8
