"""What the documents say is so: paths exist, commands and options exist, the code is the code that is run."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main
import yaml

from tuneloom.cli import app
from tuneloom.config import BaseSettings, DraftingSettings, EngineSettings, UsageSettings, WebhookSettings
from tuneloom.domain import TrainOptions
from tuneloom.serve.openai import IGNORED, REFUSED, Chat, Completion

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(README) if found == language]


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
    page = (ROOT / "docs" / "webhooks.md").read_text(encoding="utf-8")
    scripts = [text for found, text in BLOCK.findall(page) if found == "python"]
    assert scripts == [(ROOT / "examples" / "webhook.py").read_text(encoding="utf-8")]


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


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
    """Every `tuneloom ...` of the README, the changelog and the page of webhooks, with `a|b` written out."""
    pages = ("CHANGELOG.md", "docs/webhooks.md", "docs/drafting.md")
    text = README + "".join((ROOT / name).read_text(encoding="utf-8") for name in pages)
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


def test_the_api_page_lists_every_field_that_is_ignored_or_refused():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
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
        ("engine.md", "The engine's options", EngineSettings),
        ("engine.md", "Replicas", BaseSettings),
        ("training.md", "Settings", TrainOptions),
        ("drafting.md", "Settings", DraftingSettings),
        ("api.md", "Settings of usage", UsageSettings),
        ("webhooks.md", "Settings", WebhookSettings),
    ],
)
def test_a_page_lists_every_option_with_its_default(file, heading, settings):
    page = (ROOT / "docs" / file).read_text(encoding="utf-8")
    (part,) = [part for part in re.split(r"^#+ ", page, flags=re.MULTILINE) if part.startswith(heading + "\n")]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \| .+ \|$", part, re.MULTILINE)
    written = {name: yaml.safe_load(default) for name, default in rows}
    fields = {name: field.default for name, field in settings.model_fields.items() if name not in ("id", "engine")}
    assert written == fields
