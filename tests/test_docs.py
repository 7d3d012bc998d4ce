"""What the documents say is so: paths exist, commands and options exist, the code is the code that is run."""

import ast
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import click
import httpx
import openai
import pytest
import typer.main
import yaml

from tuneloom import config
from tuneloom.cli import app
from tuneloom.config import (
    AuditSettings,
    BaseSettings,
    ControlSettings,
    DraftingSettings,
    EngineSettings,
    GatewaySettings,
    Section,
    Settings,
    TrainSettings,
    UsageSettings,
    WebhookSettings,
)
from tuneloom.control.api_drafts import CreateDraft
from tuneloom.control.api_rows import EditFile
from tuneloom.control.body import parse
from tuneloom.control.job_body import CreateJob
from tuneloom.domain import TrainOptions
from tuneloom.rows import Scan
from tuneloom.serve.openai import IGNORED, REFUSED, Chat, Completion

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
WRITTEN = {"README.md": README, "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), **PAGES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, page: str = README) -> list[str]:
    return [text for found, text in BLOCK.findall(page) if found == language]


def all_blocks(*languages: str) -> list:
    """Every block of these languages on any page, each a test parameter named after its page."""
    return [
        pytest.param(text, id=f"{name}-{number}")
        for name, page in PAGES.items()
        for number, (language, text) in enumerate(BLOCK.findall(page))
        if language in languages
    ]


def tree() -> dict[str, Path]:
    """The lines of the README's tree, as paths."""
    (text,) = [text for text in blocks("") if text.startswith("tuneloom/ ")]
    found, folder = {}, ROOT
    for line in text.splitlines():
        name, explanation = line.strip().split(maxsplit=1)
        assert explanation, line
        if not line.startswith(" "):
            folder = ROOT / name if name.endswith("/") else ROOT
            found[name] = ROOT / name
        else:
            found[name] = folder / name
    return found


def test_every_line_of_the_tree_is_on_disk():
    for name, path in tree().items():
        assert path.is_dir() if name.endswith("/") else path.is_file(), name


def test_every_part_of_the_package_is_in_the_tree():
    parts = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "tuneloom").iterdir()
        if path.name not in ("__pycache__", "__init__.py")
    }
    assert parts <= tree().keys()


def test_the_readmes_script_is_the_example():
    assert blocks("python") == [(ROOT / "examples" / "finetune.py").read_text(encoding="utf-8")]


def test_the_webhook_pages_script_is_the_example():
    """`tests/control/test_webhook_example.py` runs it."""
    assert blocks("python", PAGES["webhooks.md"]) == [(ROOT / "examples" / "webhook.py").read_text(encoding="utf-8")]


def anchors(page: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", WRITTEN)
def test_links_lead_somewhere(name: str):
    folder = ROOT / "docs" if name in PAGES else ROOT
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", WRITTEN[name]) if "://" not in target]
    assert targets or name not in ("README.md", "settings.md")
    for target in targets:
        path, _, anchor = target.partition("#")
        linked = folder / path if path else folder / name
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_every_page_is_named_in_the_readme():
    assert set(re.findall(r"\]\(docs/(\w+\.md)", README)) == PAGES.keys()


def test_the_readme_is_one_page():
    assert len(README.splitlines()) < 150


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_use_the_plain_client_and_nothing_of_ours(path: Path):
    source = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert "openai" in names
    assert not names & {"tuneloom", "httpx", "requests", "torch", "transformers", "ray"}


def commands() -> list[str]:
    """Every `tuneloom ...` that is written anywhere, with `a|b` written out."""
    text = "\n".join(WRITTEN.values())
    found = re.findall(r"`(tuneloom [^`\n]+)`", text) + re.findall(r"^(tuneloom (?!/)[^#\n]+)", text, re.MULTILINE)
    found += re.findall(r"\$\(\S*?(tuneloom [^)]+)\)", text)
    return sorted({command.strip() for line in found for command in _written_out(line)})


def _written_out(line: str) -> list[str]:
    words = line.split()
    for i, word in enumerate(words):
        if "|" in word:
            return [" ".join([*words[:i], choice]) for choice in word.split("|")]
    return [line]


@pytest.mark.parametrize("command", commands())
def test_every_command_that_is_written_exists(command: str):
    group: click.Command = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    context = click.Context(group, info_name="tuneloom")
    while words and not words[0].startswith("-") and hasattr(group, "get_command"):
        found = group.get_command(context, words[0])
        assert found is not None, f"`{command}`: no `{words[0]}`"
        group, words = found, words[1:]
        context = click.Context(group, parent=context)
    options = {option for parameter in group.params for option in parameter.opts} | {"--help", "-h"}
    assert {word.split("=")[0] for word in words if word.startswith("-")} <= options


def test_every_make_target_that_is_written_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    assert set(re.findall(r"make (\w+)", README + (ROOT / ".ci" / "run").read_text())) - {"it"} <= targets


@pytest.mark.parametrize("text", all_blocks("yaml"))
def test_settings_that_are_written_are_taken(text: str, tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.yaml").write_text(text)
    assert config.load(home) != config.load(tmp_path)


@pytest.mark.parametrize("text", all_blocks("jsonl"))
def test_rows_that_are_written_can_be_learned(text: str):
    for line in text.splitlines():
        scan = Scan(None)
        assert len(list(scan.rows(io.BytesIO(line.encode() + b"\n")))) == 1 and not scan.problems


def test_bodies_that_are_written_are_taken():
    draft, edit = (json.loads(text) for text in blocks("json", PAGES["drafting.md"]))
    assert parse(CreateDraft, json.dumps(draft).encode()).rows == draft["rows"]
    assert len(parse(EditFile, json.dumps(edit).encode()).operations) == len(edit["operations"])


@pytest.mark.parametrize("text", [block for block in all_blocks("python") if "webhooks" not in block.id])
def test_scripts_that_are_written_ask_for_what_there_is(text: str):
    """Run with the plain client, whose requests are held against the routes and the bodies of the API."""
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.path}")
        if request.url.path == "/v1/fine_tuning/jobs":
            parse(CreateJob, request.content)
        if request.url.path.endswith("/events"):
            event = {"draft": {"status": "running", "rows": 1}}
            return httpx.Response(200, text=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")
        found = {"object": "list", "data": [{"id": "c", "fine_tuned_model_checkpoint": "ft:x"}], "has_more": False}
        return httpx.Response(200, json=found if request.method == "GET" else {"id": "x"})

    client = openai.OpenAI(
        api_key="sk-x", base_url="http://x/v1", http_client=httpx.Client(transport=httpx.MockTransport(answer))
    )
    known = {"file": SimpleNamespace(id="file-1"), "job": SimpleNamespace(id="ftjob-1"), "id": "draft_1"}
    exec(compile(text, "example", "exec"), {"client": client, "openai": openai, "messages": [], **known})
    assert asked
    for each in asked:
        assert each in {
            "POST /v1/fine_tuning/jobs",
            "GET /v1/fine_tuning/jobs/ftjob-1/checkpoints",
            "POST /v1/chat/completions",
            "GET /v1/tuneloom/drafts/draft_1/events",
        }


def test_the_api_page_lists_every_field_that_is_ignored_or_refused():
    page = PAGES["api.md"]
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}

    def fields(start: str) -> set[str]:
        (row,) = [line for name, line in rows.items() if name.startswith(start)]
        return set(re.findall(r"`([^`]+)`", row))

    assert fields("ignored") == IGNORED | {"stream_options.include_obfuscation"}
    assert fields("refused, unless") == REFUSED.keys()
    honoured = fields("honoured in both") | fields("chat") | fields("completions")
    assert (Chat.model_fields.keys() | Completion.model_fields.keys()) <= honoured
    assert TrainOptions.model_fields.keys() <= fields("ours, in the object")


@pytest.mark.parametrize(
    ("file", "heading", "settings"),
    [
        ("settings.md", "At the top", Settings),
        ("settings.md", "gateway", GatewaySettings),
        ("settings.md", "train", TrainSettings),
        ("settings.md", "control", ControlSettings),
        ("settings.md", "audit", AuditSettings),
        ("engine.md", "The engine's options", EngineSettings),
        ("engine.md", "Replicas", BaseSettings),
        ("training.md", "Settings", TrainOptions),
        ("drafting.md", "Settings", DraftingSettings),
        ("api.md", "Settings of usage", UsageSettings),
        ("webhooks.md", "Settings", WebhookSettings),
    ],
)
def test_a_page_lists_every_option_with_its_default(file, heading, settings):
    (part,) = [part for part in re.split(r"^#+ ", PAGES[file], flags=re.MULTILINE) if part.startswith(heading + "\n")]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \| .+ \|$", part, re.MULTILINE)
    written = {name: yaml.safe_load(default) for name, default in rows}
    elsewhere = ("id", "engine", "home", "bases", "base_aliases")
    fields = {
        name: list(field.default) if isinstance(field.default, tuple) else field.default
        for name, field in settings.model_fields.items()
        if name not in elsewhere and not isinstance(field.default, Section)
    }
    assert written == fields


def sections(of: type[Section]) -> Iterator[type[Section]]:
    """A section of the settings and all within it."""
    yield of
    for field in of.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from sections(kind)


@pytest.mark.parametrize("section", list(sections(Settings)), ids=lambda section: section.__name__)
def test_every_setting_is_explained_at_its_field_and_on_a_page(section: type[Section]):
    text = "".join(PAGES.values())
    for name, field in section.model_fields.items():
        assert field.description or isinstance(field.default, Section), f"{section.__name__}.{name} has no description"
        assert name == "home" or f"`{name}" in text or f".{name}`" in text, f"no page tells of `{name}`"
