"""`tuneloom files` as a stranger meets it: the check of local rows without a server, and the calls of the API."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import Shell
from tuneloom import cluster

BASE = "tiny/llama"
ROWS = [{"input": f"say {number}", "output": "yes" if number % 2 else "no"} for number in range(12)]


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(tmp_path / "home", capsys, monkeypatch)


@pytest.fixture
def tiny_home(shell: Shell, tiny_base: Path) -> None:
    """A home that serves the tiny base."""
    assert shell("bases", "add", str(tiny_base), "--id", BASE) == 0
    (shell.home / "config.yaml").write_text("bases: [{id: tiny/llama}]\nbase_aliases: {old-name: tiny/llama}\n")


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.usefixtures("tiny_home")
def test_good_rows_are_told_in_numbers(shell: Shell, tmp_path: Path):
    rows = write(tmp_path / "rows.jsonl", [*ROWS, ROWS[3]])
    validation = write(tmp_path / "v.jsonl", [ROWS[5], {"input": "say 4", "output": "maybe"}])
    assert shell("files", "check", rows, "--base", "old-name", "--validation", validation) == 0
    first, second = shell.out.split("v.jsonl")
    assert first.startswith(f"for {BASE}, supervised\n\nrows.jsonl (`input`/`output`)\n")
    facts = {line[2:20].strip(): line[20:].strip() for line in first.splitlines() if line.startswith("  ")}
    assert facts["rows"] == "13"
    assert facts["tokens"].endswith("limit 512)") and "p50" in facts["tokens"] and "p95" in facts["tokens"]
    assert int(facts["learned tokens"]) >= 26
    assert facts["repeated rows"] == "1 (line 13 = 4)"
    assert "warning: 1 validation row is among the training rows too (line 1 = 6)" in second
    assert "warning: 1 validation row has the prompt of a training row, with another answer" in second
    assert second.endswith("\nit can be trained on\n")
    assert list(shell.home.glob("runs/*")) == []


@pytest.mark.usefixtures("tiny_home")
def test_each_problem_is_printed_with_its_file_and_line_and_the_exit_code_is_1(shell: Shell, tmp_path: Path):
    rows = write(tmp_path / "rows.jsonl", [*ROWS, "oops", {"input": "red " * 600, "output": "no"}])
    validation = write(tmp_path / "v.jsonl", [{"text": 1}])
    assert shell("files", "check", rows, "--validation", validation) == 1
    assert "rows too long      1 (--long-rows cut would lose" in shell.out
    told = shell.out.split("it cannot be trained on: 3 problems\n")[1].splitlines()
    assert [line.split(":")[0].strip() for line in told] == [
        "rows.jsonl, line 13",
        "rows.jsonl, line 14",
        "v.jsonl, line 1",
    ]
    assert shell.err == ""


@pytest.mark.usefixtures("tiny_home")
def test_options_are_those_of_a_job(shell: Shell, tmp_path: Path):
    rows = write(tmp_path / "rows.jsonl", [*ROWS, {"input": "say", "output": "no " * 60}])
    options = ["--max-length", "32", "--long-rows", "cut", "--validation-share", "0.25", "--loss-on", "all"]
    assert shell("files", "check", rows, *options, "--json") == 0
    report = json.loads(shell.out)
    assert (report["ok"], report["rows"], report["validation_rows"], report["longest"]) == (True, 10, 3, 32)
    assert report["files"]["training_file"]["long_rows"] == 1
    assert report["learned_tokens"] == report["tokens"] - report["rows"]
    pairs = write(tmp_path / "p.jsonl", [{"prompt": f"{n}", "chosen": " yes", "rejected": " no"} for n in range(12)])
    assert shell("files", "check", pairs) == 1 and "`dpo`" in shell.out
    assert shell("files", "check", pairs, "--method", "dpo") == 0 and "for tiny/llama, dpo" in shell.out


@pytest.mark.usefixtures("tiny_home")
def test_csv_and_json_are_read_as_an_upload_would(shell: Shell, tmp_path: Path):
    (tmp_path / "rows.csv").write_text("input,output\n" + "".join(f"say {n},yes\n" for n in range(12)))
    assert shell("files", "check", str(tmp_path / "rows.csv"), "--json") == 0
    from_csv = json.loads(shell.out)
    (tmp_path / "rows.json").write_text(json.dumps([{"input": f"say {n}", "output": "yes"} for n in range(12)]))
    assert shell("files", "check", str(tmp_path / "rows.json"), "--json") == 0
    assert json.loads(shell.out)["tokens"] == from_csv["tokens"]


@pytest.mark.usefixtures("tiny_home")
def test_what_is_wrong_with_a_csv_file_is_told_as_of_any_other(shell: Shell, tmp_path: Path):
    """Every row up to the limit, by the line in the file that was given."""
    path = tmp_path / "rows.csv"
    path.write_text("input,output\n" + "say,\n" * 30 + "a,b,c\n")
    assert shell("files", "check", str(path)) == 1
    told = shell.out.split("it cannot be trained on: 31 problems\n")[1].splitlines()
    assert told[0] == "  rows.csv, line 2: `output` is empty." and len(told) == 31
    assert shell("files", "check", str(path), "--json") == 1
    report = json.loads(shell.out)
    assert (report["ok"], report["problem_count"], report["error"]["code"]) == (False, 31, "invalid_file")
    assert [(each["line"], each["field"]) for each in report["problems"]][-2:] == [(31, "output"), (32, None)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base", "none"], "`none` does not exist"),
        (["--long-rows", "drop"], "`--long-rows`"),
        (["--method", "rl"], "`--method`"),
        (["--validation-share", "0.9"], "`--validation-share`"),
        (["--validation-share", "0.1", "--validation", "ROWS"], "tuneloom.validation_share"),
    ],
)
@pytest.mark.usefixtures("tiny_home")
def test_a_wrong_option_is_named(options: list[str], message: str, shell: Shell, tmp_path: Path):
    rows = write(tmp_path / "rows.jsonl", ROWS)
    assert shell("files", "check", rows, *(rows if option == "ROWS" else option for option in options)) == 1
    assert message in shell.err and shell.out == ""
    assert shell("files", "check", str(tmp_path / "none.jsonl")) == 2 and "does not exist" in shell.err


@pytest.mark.usefixtures("tiny_home")
def test_the_command_itself_prints_no_noise_and_ends_with_its_code(shell: Shell, tmp_path: Path):
    rows = write(tmp_path / "rows.jsonl", ROWS[:5])
    command = [sys.executable, "-m", "tuneloom.cli", "--home", str(shell.home), "files", "check", rows]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "")
    assert (
        "it cannot be trained on: 1 problem\n  rows.jsonl, The file has 5 rows; at least 10 are needed." in done.stdout
    )


@pytest.fixture
def api(shell: Shell) -> Iterator[list[tuple[str, Any]]]:
    """A server with one file in the place of the API; the list has what it was asked, and the parts of a form."""
    asked: list[tuple[str, Any]] = []
    file = {
        "id": "file-1",
        "bytes": 1234,
        "created_at": 1_700_000_000,
        "purpose": "fine-tune",
        "filename": "rows.jsonl",
    }

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            kind = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
            parts = BytesParser().parsebytes(kind + body).get_payload() if body else []
            form = {part.get_param("name", header="content-disposition"): part.get_payload() for part in parts}
            asked.append((f"{self.command} {self.path}", form))
            known = "file-2" not in self.path
            answer = {"data": [file]} if "limit" in self.path else file
            data = json.dumps(answer if known else {"error": {"message": "No such File object: file-2"}}).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _handle

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster.write_private(shell.home / "admin-key", "sk-admin\n")
    state = cluster.ClusterState(
        id="c1",
        started_at=0,
        host="127.0.0.1",
        port=server.server_port,
        gcs_address="127.0.0.1:1",
        dashboard_port=1,
        folder=shell.home,
    )
    cluster.write_state(shell.home, state)
    yield asked
    server.shutdown()
    server.server_close()


def test_files_are_listed_uploaded_shown_and_deleted_by_the_api(
    shell: Shell,
    api: list[tuple[str, Any]],
    tmp_path: Path,
):
    assert shell("files", "list") == 0
    row = shell.out.splitlines()[1].split()
    assert row == ["file-1", "1,234", "2023-11-14", "22:13:20Z", "fine-tune", "rows.jsonl"]
    assert shell("files", "upload", write(tmp_path / "rows.jsonl", ["{}"])) == 0 and shell.out == "file-1\n"
    assert shell("files", "show", "file-1") == 0 and json.loads(shell.out)["bytes"] == 1234
    assert shell("files", "delete", "file-1") == 0 and "deleted file-1" in shell.out
    assert shell("files", "delete", "file-2") == 1 and "No such File object: file-2" in shell.err
    assert [what for what, _ in api] == [
        "GET /v1/files?limit=100",
        "POST /v1/files",
        "GET /v1/files/file-1",
        "DELETE /v1/files/file-1",
        "DELETE /v1/files/file-2",
    ]
    assert api[1][1] == {"purpose": "fine-tune", "file": "{}"}
