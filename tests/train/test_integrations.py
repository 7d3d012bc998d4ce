"""Weights & Biases, without its service: a module of our own stands in the place of the package `wandb`.

It keeps what the real one would be called with: `init(project, name, entity, tags, config, ...)`, and `log` and
`finish` of what that returns. Nothing here shows that the service takes it.
"""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.train.conftest import Lab, colour_rows, run
from tuneloom.domain import WandbIntegration
from tuneloom.train import integrations

STAND_IN = """
import threading

calls = []
fails = set()
release = threading.Event()


def init(**settings):
    calls.append(("init", settings))
    if "init" in fails:
        raise ConnectionError("no route to api.wandb.ai with key secret-key")
    if "hang" in fails:
        release.wait(60)
    return Run(settings["project"])


class Run:
    def __init__(self, project):
        self.project = project

    def log(self, data, step=None):
        calls.append(("log", self.project, step, data))
        if "log" in fails and step == 3:
            raise RuntimeError("run is gone")

    def finish(self):
        calls.append(("finish", self.project))
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in integrations.ENVIRONMENT:
        monkeypatch.setenv(name, "true")
    import wandb

    yield wandb
    del sys.modules["wandb"]


def add_job(lab: Lab, *projects: WandbIntegration, **more: Any) -> Any:
    job = lab.add_job(**more)
    return lab.change_job(job.id, spec=job.spec.model_copy(update={"wandb": projects}))


def warnings(lab: Lab, job_id: str) -> list[str]:
    return [event.message for event in lab.events(job_id) if event.level == "warn"]


def test_settings_and_each_step_go_to_the_project(lab: Lab, wandb: ModuleType):
    target = WandbIntegration(project="p", name="n", entity="e", tags=("a", "b"))
    job = add_job(lab, target, validation=colour_rows(6))

    assert run(lab, job.id) == "published", lab.progress(job.id).error

    (kind, settings), *logged, last = wandb.calls
    assert kind == "init" and last == ("finish", "p")
    given = {name: settings[name] for name in ("project", "name", "entity", "tags", "id", "resume")}
    assert given == {
        "project": "p",
        "name": "n",
        "entity": "e",
        "tags": ["a", "b"],
        "id": f"{job.id}-0",
        "resume": "allow",
    }
    assert settings["config"]["base"] == job.spec.base and settings["config"]["learning_rate"] == 5e-3
    assert str(lab.settings.home) in settings["dir"]
    assert [step for _, _, step, _ in logged] == lab.steps(job.id) == list(range(1, 13))
    assert [data["train_loss"] for _, _, _, data in logged] == lab.losses(job.id)
    assert logged[-1][3]["full_valid_loss"] > 0 and "learning_rate" in logged[0][3]
    assert warnings(lab, job.id) == []


def test_several_projects_have_runs_of_their_own(lab: Lab, wandb: ModuleType):
    job = add_job(lab, WandbIntegration(project="p"), WandbIntegration(project="q"))
    assert run(lab, job.id) == "published"
    inits = [settings for kind, settings in (call for call in wandb.calls if call[0] == "init")]
    assert sorted((each["project"], each["id"], each["reinit"]) for each in inits) == [
        ("p", f"{job.id}-0", "create_new"),
        ("q", f"{job.id}-1", "create_new"),
    ]
    for project in ("p", "q"):
        steps = [call[2] for call in wandb.calls if call[:2] == ("log", project)]
        assert steps == list(range(1, 13)) and ("finish", project) in wandb.calls


@pytest.mark.parametrize("failure", ["init", "log"])
def test_a_service_that_fails_is_told_once_and_the_job_goes_on(
    lab: Lab, wandb: ModuleType, failure: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    wandb.fails.add(failure)
    job = add_job(lab, WandbIntegration(project="p"))

    assert run(lab, job.id) == "published"

    (warning,) = warnings(lab, job.id)
    assert "project `p` no more" in warning and "secret-key" not in warning
    assert ("ConnectionError" if failure == "init" else "RuntimeError: run is gone") in warning
    assert len(lab.steps(job.id)) == 12 and ("finish", "p") not in wandb.calls


def test_a_service_that_does_not_answer_holds_nothing_up(lab: Lab, wandb: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(integrations, "FINISH_TIMEOUT_S", 0.1)
    wandb.fails.add("hang")
    job = add_job(lab, WandbIntegration(project="p"))
    try:
        assert run(lab, job.id) == "published"
    finally:
        wandb.release.set()
        for thread in threading.enumerate():
            if thread.name.startswith("wandb "):
                thread.join(30)
    (warning,) = warnings(lab, job.id)
    assert "did not take the last metrics" in warning


def test_a_package_that_is_gone_by_then_is_told(lab: Lab):
    job = add_job(lab, WandbIntegration(project="p"))
    assert run(lab, job.id) == "published"
    (warning,) = warnings(lab, job.id)
    assert "No module named 'wandb'" in warning


def test_a_job_without_projects_imports_nothing(lab: Lab, wandb: ModuleType):
    assert run(lab, lab.add_job().id) == "published"
    assert wandb.calls == []


def test_runs_that_are_kept_offline_outlive_the_job(lab: Lab, wandb: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    job = add_job(lab, WandbIntegration(project="p"))
    assert run(lab, job.id) == "published"
    assert wandb.calls[0][1]["dir"] == str(lab.settings.home)
