from pathlib import Path

import pytest

from tests.control.conftest import BASE, assert_error

JOBS = "/v1/fine_tuning/jobs"
FULL = {"project": "p", "name": "n", "entity": "e", "tags": ["a", "b"]}


@pytest.fixture
def with_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name, which must not be imported."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text("raise AssertionError('control imports wandb')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def create(api, integrations):
    body = {"model": BASE, "training_file": api.upload(), "integrations": integrations}
    return api.post(JOBS, json=body)


def wandb(**fields):
    return {"type": "wandb", "wandb": fields}


def test_a_project_that_nothing_can_log_to_is_refused(api):
    response = create(api, [wandb(project="p")])
    assert_error(response, 400, "integrations", "`wandb` is not installed. Install it where jobs train")
    assert response.json()["error"]["code"] == "unsupported_parameter"


def test_a_folder_of_that_name_is_no_package(api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "site" / "wandb").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert_error(create(api, [wandb(project="p")]), 400, "integrations", "is not installed")


@pytest.mark.parametrize("nothing", [None, []])
def test_no_project_needs_no_package(api, nothing):
    assert create(api, nothing).json()["integrations"] == []


def test_projects_are_kept_with_the_job_and_shown(api, with_wandb):
    response = create(api, [wandb(**FULL), wandb(project="q", entity=None)])
    assert response.status_code == 200, response.text
    shown = [wandb(**FULL), wandb(project="q", name=None, entity=None, tags=[])]
    assert response.json()["integrations"] == shown
    assert api.get(f"{JOBS}/{response.json()['id']}").json()["integrations"] == shown
    spec = api.store.records.jobs.get(response.json()["id"]).value.spec
    assert [(each.project, each.entity, each.tags) for each in spec.wandb] == [("p", "e", ("a", "b")), ("q", None, ())]


@pytest.mark.parametrize(
    ("integrations", "param", "text"),
    [
        ([wandb(project="p")] * 6, "integrations", "5"),
        ([{"type": "comet", "comet": {}}], "integrations.0.type", "wandb"),
        ([{"type": "wandb"}], "integrations.0.wandb", "Missing"),
        ([wandb(name="n")], "integrations.0.wandb.project", "Missing"),
        ([wandb(project="")], "integrations.0.wandb.project", "at least 1"),
        ([wandb(project="p", api_key="secret")], "integrations.0.wandb.api_key", "Unknown"),
        ([wandb(project="p", tags="a")], "integrations.0.wandb.tags", "array"),
        ("wandb", "integrations", "array"),
    ],
)
def test_a_wrong_integration_is_named(api, with_wandb, integrations, param, text):
    assert_error(create(api, integrations), 400, param, text)
