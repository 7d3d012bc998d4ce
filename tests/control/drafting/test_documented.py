"""What docs/drafting.md shows is what works: its settings, its create, its edit, its reasons."""

import json
import re
from pathlib import Path
from typing import get_args

import yaml

from tests.control.drafting.conftest import DRAFTS, Open
from tuneloom.config import DraftProviderSettings, Settings
from tuneloom.control.api_drafts import CreateDraft
from tuneloom.control.drafting.shapes import to_row
from tuneloom.domain import DraftEnd

PAGE = (Path(__file__).parents[3] / "docs" / "drafting.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def first_cells(heading: str) -> set[str]:
    """The names in the first column of the table under a heading, or behind a line that begins so."""
    part = PAGE[PAGE.index(heading) :]
    table = re.search(r"^\|---.*?\n((?:\|.*\n)+)", part, re.MULTILINE)
    assert table is not None
    return {name for line in table[1].splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}


def test_the_settings_of_the_page_are_settings(tmp_path: Path):
    shown = [Settings.model_validate({**yaml.safe_load(text), "home": tmp_path}) for text in blocks("yaml")]
    kinds = [provider.kind for settings in shown for provider in settings.drafting.providers.values()]
    assert kinds == ["gemini", "openai", "gemini"]
    assert first_cells("## A provider") == DraftProviderSettings.model_fields.keys()


def test_the_create_and_the_edit_of_the_page_are_taken(open_desk: Open):
    create, edit = map(json.loads, blocks("json"))
    desk = open_desk()
    assert desk.api.post(DRAFTS, json=create).status_code == 200
    row = to_row("instruction", {"instruction": "a", "input": "", "output": "b"})
    file = desk.api.upload("".join(json.dumps(row) + "\n" for _ in range(9)).encode())
    made = desk.api.post(f"/v1/tuneloom/files/{file}/edit", json=edit)
    assert made.status_code == 200 and made.json()["rows"] == 9


def test_every_field_of_a_create_is_explained():
    assert first_cells("## A draft") == CreateDraft.model_fields.keys()


def test_every_end_and_every_reason_is_explained():
    assert first_cells("| `ended_by` |") == set(get_args(DraftEnd))
    source = "".join(
        (Path(__file__).parents[3] / "tuneloom" / "control" / "drafting" / f"{name}.py").read_text()
        for name in ("replies", "sieve", "duplicates", "run", "collect")
    )
    explained = first_cells("## What is dropped, and why")
    for reason in explained:
        assert f'"{reason}"' in source or f"{reason}=" in source, reason
    given = set(
        re.findall(r'dropped\["(\w+)"\]|return None, "(\w+)"|return "(too_\w+|\w+_duplicate|wrong_language)"', source)
    )
    assert {name for names in given for name in names if name} <= explained
