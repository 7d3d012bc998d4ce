"""`tuneloom limits` over a store, without anything that runs."""

import json
from pathlib import Path

import pytest

from tests.test_cli import Shell
from tuneloom import config
from tuneloom.store import open_store


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(tmp_path / "home", capsys, monkeypatch)


def test_limits_are_set_one_by_one_shown_and_cleared(shell: Shell):
    assert shell("limits", "set", "ada", "--requests-per-minute", "10", "--tokens-per-month", "5000") == 0
    assert shell("limits", "set", "ada", "--model-tokens-per-minute", "70", "--requests-per-minute", "20") == 0
    assert shell("limits", "show", "ada", "--json") == 0
    allowance = json.loads(shell.out)["allowance"]
    assert allowance["rates"]["requests_per_minute"] == 20
    assert (allowance["model_rates"]["tokens_per_minute"], allowance["tokens_per_month"]) == (70, 5000)
    assert allowance["max_concurrent"] is None

    assert shell("limits", "list") == 0
    assert [line.split() for line in shell.out.splitlines()] == [
        ["owner", "limit", "value"],
        ["ada", "rates.requests_per_minute", "20"],
        ["ada", "model_rates.tokens_per_minute", "70"],
        ["ada", "tokens_per_month", "5000"],
    ]
    assert shell("limits", "clear", "ada") == 0
    assert shell("limits", "show", "ada") == 0 and (shell.out, shell.err) == ("", "nothing is set for ada\n")
    assert shell("limits", "list", "--json") == 0
    assert json.loads(shell.out) == []

    store = open_store(config.load(shell.home))
    entries = store.records.audit_entries.query(order_by="created_at")
    store.close()
    assert [(e.value.action, e.value.actor.kind) for e in entries] == [("rate_limit.updated", "cli")] * 2 + [
        ("rate_limit.deleted", "cli")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["set", "ada", "--requests-per-minute", "0"], "rates.requests_per_minute"),
        (["set", "../x", "--max-concurrent", "1"], "Invalid `owner`"),
        (["set", "ada"], "Say which limit"),
    ],
)
def test_a_wrong_limit_says_what_is_wrong(arguments: list[str], message: str, shell: Shell):
    assert shell("limits", *arguments) == 1
    assert message in shell.err and shell.out == ""
