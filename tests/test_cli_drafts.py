"""`tuneloom drafts`, `files rows` and `files export` against the real API on a real port, with a provider's server."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from tests.control.conftest import store  # noqa: F401
from tests.control.drafting.conftest import DRAFTS, Desk, Open, open_desk  # noqa: F401
from tests.test_cli import Shell
from tuneloom import cluster


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(tmp_path / "home", capsys, monkeypatch)


@pytest.fixture
def desk(shell: Shell, open_desk: Open) -> Iterator[Desk]:  # noqa: F811
    """The API as the installation of the shell's home, whose admin key is the owner `ada`."""
    desk = open_desk()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(desk.api.app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    cluster.write_private(shell.home / "admin-key", "ada:training\n")
    state = cluster.ClusterState(
        id="c1",
        started_at=0,
        host="127.0.0.1",
        port=port,
        gcs_address="127.0.0.1:1",
        dashboard_port=1,
        folder=shell.home,
    )
    cluster.write_state(shell.home, state)
    yield desk
    server.should_exit = True
    thread.join(10)


def test_a_draft_is_created_followed_read_and_exported(shell: Shell, desk: Desk, tmp_path: Path):
    asked = (
        "--rows",
        "12",
        "--format",
        "instruction",
        "--role",
        "technical",
        "--role",
        "creative",
        "--topic",
        "cables",
    )
    assert shell("drafts", "create", "support of a router", *asked, "--seed", "7", "--max-tokens", "90000") == 0
    id = shell.out.strip()
    request = desk.get(id)["request"]
    assert request["roles"] == ["technical", "creative"] and request["topics"] == ["cables"] and request["seed"] == 7
    assert request["max_tokens"] == 90000
    made = desk.run(id)

    assert shell("drafts", "list") == 0
    assert shell.out.splitlines()[1].split()[:4] == [id, "succeeded", "12/12", made["file_id"]]
    assert shell("drafts", "show", id) == 0
    assert "received 12, repaired 0" in shell.out and "tokens 200 in, 400 out, 2 calls" in shell.out
    assert shell("drafts", "show", id, "--json") == 0 and json.loads(shell.out)["id"] == id
    assert shell("drafts", "rows", id, "--limit", "5") == 0 and len(shell.out.splitlines()) == 5

    assert shell("files", "rows", made["file_id"], "--after", "10") == 0
    assert [json.loads(line) for line in shell.out.splitlines()] == desk.rows(made["file_id"])[10:]
    target = tmp_path / "rows.csv"
    assert shell("files", "export", made["file_id"], "--format", "csv", "--to", str(target)) == 0
    assert shell.out == f"{target}\n"
    assert shell("files", "upload", str(target)) == 0
    assert desk.rows(shell.out.strip()) == desk.rows(made["file_id"])
    assert shell("files", "export", made["file_id"], "--format", "csv", "--to", str(target)) == 1
    assert "is there already" in shell.err


def test_a_draft_is_cancelled(shell: Shell, desk: Desk):
    id = desk.create()["id"]
    assert shell("drafts", "cancel", id) == 0 and shell.out == f"cancelling {id}\n"
    assert shell("drafts", "list") == 0 and "cancelling" in shell.out
    assert desk.run(id)["status"] == "cancelled"
    assert shell("drafts", "show", "draft_none") == 1 and "No such Draft object: draft_none" in shell.err


def test_a_draft_is_watched_until_it_has_ended(shell: Shell, desk: Desk):
    id, none = desk.create(rows=20)["id"], desk.create(rows=10)["id"]
    assert desk.api.post(f"{DRAFTS}/{none}/cancel").status_code == 200
    over = threading.Event()

    def control() -> None:
        while not over.is_set():
            desk.control.tick()
            time.sleep(0.05)

    thread = threading.Thread(target=control, daemon=True)
    thread.start()
    try:
        assert shell("drafts", "watch", id) == 0
        lines = shell.out.splitlines()
        assert lines[-2].startswith("succeeded  20/20 rows  2 calls") and lines[-1] == desk.get(id)["file_id"]
        assert shell("drafts", "watch", none) == 1 and shell.out.splitlines()[-1] == "no rows"
    finally:
        over.set()
        thread.join(10)
    assert shell("drafts", "watch", "draft_none") == 1 and "No such Draft object: draft_none" in shell.err


def test_wrong_rows_are_told_beside_the_good_ones(shell: Shell, desk: Desk, tmp_path: Path):
    id = desk.api.upload(b'{"text": "a"}\n{"text": ""}\n')
    assert shell("files", "rows", id) == 0
    assert shell.out.splitlines() == ['{"text": "a"}', '{"text": ""}'] and "row 2: `text` is empty." in shell.err
    assert shell("files", "export", id, "--format", "json", "--to", str(tmp_path / "x.json")) == 1
    assert "Row 2 (line 2)" in shell.err
    assert list(tmp_path.glob("*x.json*")) == []
