import json
import threading
import time
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from tests.control.conftest import BASE, PEPPER, Api, StubAuth, _answer_error, assert_error
from tests.control.fakes import FakeChecker, FakeClock
from tuneloom.bases import add_folder
from tuneloom.config import TrainSettings
from tuneloom.control.api_checks import ChecksApi
from tuneloom.control.api_estimate import EstimateApi
from tuneloom.control.check import FILE_CHECK_VARIABLE, CheckReport, Planned, ProcessChecker
from tuneloom.control.context import ApiContext
from tuneloom.control.estimate import kind_of
from tuneloom.control.file_checks import FileChecks
from tuneloom.domain import JobError, JobSpec, Speed
from tuneloom.errors import TuneloomError

ROWS = b"".join(json.dumps({"input": f"say {n}", "output": "yes"}).encode() + b"\n" for n in range(12))
PLAIN = TrainSettings()
PLANNED = Planned(tokens=10_000, steps=100, memory_bytes=1 << 30, base_bytes=270 << 20)


class Estimates:
    """The endpoint with a short wait; `tick` carries out what it has asked for."""

    def __init__(self, api: Api, *, train: TrainSettings = PLAIN, wait_s: float = 0.0) -> None:
        settings = api.settings.model_copy(update={"train": train})
        context = ApiContext(settings, api.store, PEPPER, lambda: None)
        checks = ChecksApi(context, wait_s=wait_s)
        app = Starlette(
            routes=EstimateApi(context, checks).routes(),
            exception_handlers={TuneloomError: _answer_error},
            middleware=[Middleware(StubAuth)],
        )
        self.client = TestClient(app, base_url="http://tuneloom")
        self.checker = FakeChecker(CheckReport(ok=True, rows=12, planned=PLANNED))
        self._checks = FileChecks(api.store.records, self.checker, FakeClock(time.time()))

    def ask(self, *, key: str = "ada:training", **body: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {key}"}
        return self.client.post("/v1/tuneloom/estimate", json={"model": BASE, **body}, headers=headers)

    def answer(self, **body: Any) -> httpx2.Response:
        """The second call, when the check is done."""
        assert self.ask(**body).status_code == 202
        for _ in range(2):
            self._checks.tick()
        return self.ask(**body)


def test_the_body_of_a_job_is_estimated_and_no_job_is_made(api):
    estimates = Estimates(api, train=TrainSettings(price_per_hour=3.6, currency="EUR"))
    spec = JobSpec(base=BASE, training_file="f", seed=1)
    speed = Speed(
        id="j",
        owner="eve",
        kind=kind_of(spec, (), TrainSettings()),
        created_at=1.0,
        tokens=10_000,
        evaluated_tokens=0,
        steps=100,
        seconds=50.0,
        fixed_s=10.0,
        memory_bytes=1,
    )
    api.store.records.commit(api.store.records.speeds.create(speed))
    found = estimates.answer(training_file=api.upload(ROWS)).json()
    assert (found["object"], found["status"], found["model"], found["rows"]) == ("estimate", "completed", BASE, 12)
    assert (found["estimate"]["seconds"], found["estimate"]["cost"], found["currency"]) == (50.0, 0.05, "EUR")
    assert found["message"].startswith("Estimate: 10,000 tokens in 100 steps, 50 s")
    assert api.store.records.jobs.query() == []


def test_what_would_fail_the_job_is_told_instead(api):
    estimates, file = Estimates(api), api.upload(ROWS)
    assert_error(estimates.ask(training_file="file-absent"), 400, "training_file", "no file `file-absent`")
    assert_error(estimates.ask(training_file=file, tuneloom={"rank": 100}), 400, "tuneloom.rank", "64")
    assert_error(estimates.ask(training_file=file, key="eve:training"), 400, "training_file", "no file")
    assert estimates.ask(training_file=file, key="ada:inference").status_code == 403
    error = JobError(code="invalid_training_file", message="line 3: no `messages`", param="training_file")
    estimates.checker.report = CheckReport(ok=False, error=error)
    assert_error(estimates.answer(training_file=file), 400, "training_file", "line 3: no `messages`")
    refused = PLANNED.model_copy(update={"refusal": "base 30 GB = 30 GB, and there are 16 GB"})
    estimates.checker.report = CheckReport(ok=True, planned=refused)
    answer = estimates.answer(training_file=file, hyperparameters={"n_epochs": 2})
    assert_error(answer, 400, None, "there are 16 GB")
    assert answer.json()["error"]["code"] == "does_not_fit"


@pytest.fixture
def working(api, tiny_base):
    """With the real check behind it."""
    add_folder(api.settings.bases_dir, tiny_base, BASE)
    estimates = Estimates(api, wait_s=60.0)
    checker = ProcessChecker(api.settings.home, 60.0, variable=FILE_CHECK_VARIABLE)
    estimates._checks = FileChecks(api.store.records, checker)
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.05):
            estimates._checks.tick()

    thread = threading.Thread(target=work)
    thread.start()
    yield estimates
    over.set()
    thread.join()
    checker.close()


def test_the_plan_of_the_trainer_is_what_is_estimated(api, working):
    body = {"training_file": api.upload(ROWS), "hyperparameters": {"n_epochs": 5, "batch_size": 4}}
    answer = working.ask(**body, tuneloom={"validation_share": 0.25})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    settings = {setting["name"]: setting["value"] for setting in found["settings"]}
    assert (settings["n_epochs"], settings["batch_size"], settings["quantization"]) == (5, 4, "none")
    # 3 of the 12 rows are held out, and are scored once an epoch; all rows are of like length.
    assert (found["rows"], found["estimate"]["steps"]) == (9, 5 * 3)
    assert found["estimate"]["evaluated_tokens"] == pytest.approx(found["estimate"]["tokens"] / 3, rel=0.05)
    assert found["estimate"]["memory_bytes"] > 100 << 20
    whole = working.ask(**body).json()
    assert whole["rows"] == 12 and whole["estimate"]["evaluated_tokens"] == 0


def test_a_run_that_has_no_room_is_refused_with_the_arithmetic(api, working):
    (api.settings.home / "config.yaml").write_text(f"train: {{memory_bytes: {4 << 20}}}\n")
    answer = working.ask(training_file=api.upload(ROWS))
    assert_error(answer, 400, None, "does not fit into the memory of a job")
    assert answer.json()["error"]["code"] == "does_not_fit"
    assert "base" in answer.json()["error"]["message"] and " = " in answer.json()["error"]["message"]
