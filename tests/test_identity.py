"""The settings of signing in, and what production refuses."""

import sys
from pathlib import Path

import pytest
import yaml

from tuneloom import cli, config
from tuneloom.config import Settings, check_production
from tuneloom.control.deployment import Control
from tuneloom.errors import InvalidRequest
from tuneloom.serve.gateway import Gateway

EMULATORS = ("FIREBASE_AUTH_EMULATOR_HOST", "FIRESTORE_EMULATOR_HOST", "STORAGE_EMULATOR_HOST")
FIRESTORE = {"documents_url": "firestore:tuneloom-prod/(default)"}
FIREBASE = {"identity": {"firebase_project": "tuneloom-prod"}}


def load(home: Path, **fields: object) -> Settings:
    home.mkdir(exist_ok=True)
    (home / "config.yaml").write_text(yaml.safe_dump(fields))
    return config.load(home)


@pytest.mark.parametrize("variable", EMULATORS)
@pytest.mark.parametrize("fields", [FIRESTORE, FIREBASE, {"production": True}], ids=["firestore", "firebase", "said"])
def test_production_refuses_each_emulator(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    fields: dict[str, object],
) -> None:
    settings = load(tmp_path / "home", **fields)
    for name in EMULATORS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "127.0.0.1:9099")

    monkeypatch.setattr(sys, "argv", ["tuneloom", "--home", str(settings.home), "up"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert f"`{variable}` is set" in said and f"`unset {variable}`" in said
    assert [path.name for path in settings.home.iterdir()] == ["config.yaml"]
    for process in (Gateway, Control):
        with pytest.raises(InvalidRequest, match=variable):
            process(settings.model_dump(mode="json"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"blobs_url": "gs://tuneloom-prod"},
        {"documents_url": "firestore:demo-tuneloom/(default)", "identity": {"firebase_project": "demo-tuneloom"}},
        {**FIRESTORE, **FIREBASE, "production": False},
    ],
    ids=["embedded", "bucket", "demo", "said"],
)
def test_emulators_are_for_tests(tmp_path: Path, fields: dict[str, object]) -> None:
    check_production(load(tmp_path, **fields), dict.fromkeys(EMULATORS, "127.0.0.1:1"))


def test_production_without_emulators_is_as_it_should_be(tmp_path: Path) -> None:
    check_production(load(tmp_path, **FIRESTORE, **FIREBASE, production=True), {"FIRESTORE_EMULATOR_HOST": ""})


@pytest.mark.parametrize(
    "identity, said",
    [
        ({"firebase_project": "Not A Project"}, "firebase_project"),
        ({"revocation_check_s": 61}, "revocation_check_s"),
        ({"clock_leeway_s": 61}, "clock_leeway_s"),
        ({"certificates_url": "http://keys.example.com/certs"}, "use https"),
        ({"app_check_keys_url": "keys"}, "use https"),
        ({"anonymous_scopes": ["account"]}, "anonymous_scopes"),
        ({"app_check": "required"}, "app_check_project_number"),
        ({"admins": [" "]}, "admins"),
        ({"project": "x"}, "identity.project"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, identity: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        load(tmp_path, identity=identity)


def test_the_page_names_every_setting_and_its_example_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "cloud.md").read_text(encoding="utf-8")
    section = page.partition("\n## Sign-in\n")[2].partition("\n## ")[0]
    assert [name for name in config.IdentitySettings.model_fields if f"{name}" not in section] == []
    example = yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])
    assert load(tmp_path, **example).identity.admins == ("ada@example.com",)
