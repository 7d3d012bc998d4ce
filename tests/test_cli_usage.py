"""`tuneloom usage` on a store in which nothing runs."""

import json
import time
from pathlib import Path

import pytest

from tests.test_cli import Shell
from tuneloom import config
from tuneloom.domain import Amounts, Used
from tuneloom.store import open_store
from tuneloom.store.usage_rollup import roll_up
from tuneloom.store.usage_writer import UsageWriter, final_part

BOT = Used(kind="inference", base="tiny/llama", model="bot@v1", key_id="key_1")
JOB = Used(kind="training", base="tiny/llama", model="bot@v1", job_id="ftjob_1")


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    now = time.time()
    store = open_store(config.load(tmp_path))
    for days in (0, 2, 30):
        writer = UsageWriter(store.records, lambda days=days: now - days * 86400)
        amounts = Amounts(requests=1, input_tokens=10, cached_tokens=4, output_tokens=2, device_us=250_000)
        writer.add("ada", BOT, amounts)
        writer.add("bob", BOT.model_copy(update={"model": "tiny/llama", "key_id": ""}), amounts)
        assert writer.flush()
    store.records.commit(
        final_part("ada", "ftjob_1", now, JOB, Amounts(trained_tokens=99, device_us=10**7, cost_nano=25 * 10**7))
    )
    roll_up(store.records, now)
    store.close()
    return Shell(tmp_path, capsys, monkeypatch)


def rows(shell: Shell) -> list[list[str]]:
    return [line.split() for line in shell.out.splitlines()[1:]]


def test_it_adds_up_the_last_week_by_owner_and_model(shell: Shell):
    assert shell("usage") == 0
    assert shell.out.splitlines()[0].split()[:3] == ["owner", "model", "requests"]
    assert rows(shell) == [
        ["ada", "bot@v1", "2", "20", "8", "4", "99", "10.5", "0.25"],
        ["bob", "tiny/llama", "2", "20", "8", "4", "0", "0.5", "-"],
    ]


def test_it_goes_back_and_groups_as_asked(shell: Shell):
    assert shell("usage", "--since", "60d", "--by", "key,job,kind", "--owner", "ada") == 0
    assert [row[:5] for row in rows(shell)] == [
        ["-", "ftjob_1", "training", "0", "0"],
        ["key_1", "-", "inference", "3", "30"],
    ]
    assert shell("usage", "--since", "1h", "--by", "base", "--json") == 0
    (found,) = json.loads(shell.out)
    assert (found["base"], found["input_tokens"], found["trained_tokens"]) == ("tiny/llama", 20, 99)
    assert (found["cost"], found["currency"], found["device_seconds"]) == (0.25, "USD", 10.5)
    assert shell("usage", "--by", "") == 0 and len(rows(shell)) == 1
    assert shell("usage", "--owner", "eve") == 0 and shell.out == ""
    assert shell.err.strip() == "nothing was used in the last 7d by eve"


@pytest.mark.parametrize(("arguments", "said"), [(["--by", "owner,city"], "city"), (["--since", "soon"], "--since")])
def test_wrong_options_are_named(shell: Shell, arguments: list[str], said: str):
    assert shell("usage", *arguments) == 1
    assert said in shell.err
