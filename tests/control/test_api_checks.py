import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from tests.control.conftest import BASE, PEPPER, Api, StubAuth, _answer_error, assert_error
from tests.control.fakes import FakeChecker, FakeClock
from tuneloom.bases import add_folder
from tuneloom.control.api_checks import FAILURE_MEMORY_S, MAX_RUNNING_PER_OWNER, ChecksApi
from tuneloom.control.check import FILE_CHECK_VARIABLE, CheckReport, Note, ProcessChecker
from tuneloom.control.context import ApiContext
from tuneloom.control.file_checks import FileChecks
from tuneloom.control.sweep import FILE_CHECK_MEMORY_S, sweep
from tuneloom.domain import JobError
from tuneloom.errors import TuneloomError

ROWS = [{"input": f"say {number}", "output": "yes" if number % 2 else "no"} for number in range(12)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class Checks:
    """The endpoint with a short wait, and the part of control that carries checks out when `tick` is called."""

    def __init__(self, api: Api, wait_s: float) -> None:
        context = ApiContext(api.settings, api.store, PEPPER, lambda: None)
        app = Starlette(
            routes=ChecksApi(context, wait_s=wait_s).routes(),
            exception_handlers={TuneloomError: _answer_error},
            middleware=[Middleware(StubAuth)],
        )
        self.client = TestClient(app, base_url="http://tuneloom")
        self.checker = FakeChecker(CheckReport(ok=True, rows=12, notes=[Note(level="info", message="fine")]))
        self.clock = FakeClock(time.time())
        self._checks = FileChecks(api.store.records, self.checker, self.clock)

    def tick(self, times: int = 2) -> None:
        for _ in range(times):
            self._checks.tick()

    def ask(self, id: str, *, key: str = "ada:training", **body: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {key}"}
        return self.client.post(f"/v1/tuneloom/files/{id}/check", json={"model": BASE, **body}, headers=headers)


@pytest.fixture
def checks(api: Api) -> Checks:
    return Checks(api, wait_s=0.0)


@pytest.fixture
def working(api: Api, tiny_base: Path) -> Iterator[Checks]:
    """With the real process behind it."""
    add_folder(api.settings.bases_dir, tiny_base, BASE)
    checks = Checks(api, wait_s=60.0)
    checker = ProcessChecker(api.settings.home, 60.0, variable=FILE_CHECK_VARIABLE)
    checks._checks = FileChecks(api.store.records, checker)
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.05):
            checks.tick(1)

    thread = threading.Thread(target=work)
    thread.start()
    yield checks
    over.set()
    thread.join()
    checker.close()


def test_the_report_has_the_numbers_of_the_files_and_what_they_share(api: Api, working: Checks):
    training, validation = api.upload(lines([*ROWS, ROWS[3]])), api.upload(lines([ROWS[5], ROWS[6]]))
    answer = working.ask(training, model="gpt-4o-mini-2024-07-18", validation_file=validation)
    assert answer.status_code == 200, answer.text
    report = answer.json()
    assert (report["object"], report["status"], report["model"]) == ("file.check", "completed", BASE)
    assert (report["ok"], report["error"], report["rows"], report["validation_rows"]) == (True, None, 13, 2)
    assert report["files"]["training_file"]["duplicates"] == [[13, 4]]
    assert report["files"]["training_file"]["tokens"] == report["tokens"] > report["learned_tokens"] > 13
    assert report["overlap"] == {"rows": 2, "prompts": 0, "pairs": [[1, 6], [2, 7]]}
    assert any("repeats an earlier one (line 13 = 4)" in note["message"] for note in report["notes"])


def test_bad_rows_are_listed_with_the_file_and_line_and_options_count(api: Api, working: Checks):
    rows = [*ROWS[:5], {"input": "x"}, {**ROWS[0], "input": "say " * 40}, *ROWS[5:]]
    report = working.ask(api.upload(lines(rows)), tuneloom={"max_length": 32}).json()
    assert not report["ok"] and report["error"]["param"] == "training_file"
    assert [(problem["param"], problem["line"]) for problem in report["problems"]] == [
        ("training_file", 6),
        ("training_file", 7),
    ]
    assert report["files"]["training_file"]["long_rows"] == 1
    assert not (api.settings.home / "runs").exists()


def test_a_check_that_takes_longer_is_picked_up_by_the_same_call(api: Api, checks: Checks):
    file = api.upload(lines(ROWS))
    answer = checks.ask(file)
    assert (answer.status_code, answer.json()["status"], answer.headers["retry-after"]) == (202, "running", "2")
    assert checks.ask(file).status_code == 202
    checks.tick()
    answer = checks.ask(file)
    assert (answer.status_code, answer.json()["status"], answer.json()["rows"]) == (200, "completed", 12)
    assert checks.checker.asked == set()
    assert checks.ask(file, tuneloom={"long_rows": "cut"}).status_code == 202


def test_what_is_asked_may_not_be_anything(api: Api, checks: Checks):
    file, other = api.upload(lines(ROWS)), api.upload(b"x", name="x.txt", purpose="user_data")
    assert_error(checks.ask(file, model="none"), 404, "model")
    assert_error(checks.ask(file, epochs=3), 400, "epochs")
    assert_error(checks.ask(file, tuneloom={"rank": 8}), 400, "tuneloom.rank", "changes nothing")
    assert_error(checks.ask(file, tuneloom={"max_length": 2}), 400, "tuneloom.max_length")
    assert_error(checks.ask(file, method="dpo", tuneloom={"loss_on": "all"}), 400, "tuneloom.loss_on")
    share = {"validation_file": file, "tuneloom": {"validation_share": 0.1}}
    assert_error(checks.ask(file, **share), 400, "tuneloom.validation_share")
    assert_error(checks.ask(file, validation_file="file-none"), 400, "validation_file")
    assert_error(checks.ask(file, validation_file=other), 400, "validation_file", "fine-tune")
    assert_error(checks.ask(other), 400, "id", "fine-tune")
    assert checks.ask(file, key="ada:inference").status_code == 403


def test_files_of_others_are_as_good_as_absent(api: Api, checks: Checks):
    mine, theirs = api.upload(lines(ROWS)), api.upload(lines(ROWS), key="bob:training")
    checks.ask(theirs, key="bob:training")
    checks.tick()
    assert checks.ask(theirs, key="bob:training").status_code == 200
    foreign, absent = checks.ask(theirs), checks.ask("file-none")
    assert foreign.status_code == absent.status_code == 404
    assert foreign.text.replace(theirs, "X") == absent.text.replace("file-none", "X")
    foreign, absent = checks.ask(mine, validation_file=theirs), checks.ask(mine, validation_file="file-none")
    assert foreign.status_code == absent.status_code == 400
    assert foreign.text.replace(theirs, "X") == absent.text.replace("file-none", "X")


def test_an_owner_has_a_few_checks_at_once_and_others_theirs(api: Api, checks: Checks):
    files = [api.upload(lines(ROWS[:count])) for count in range(1, MAX_RUNNING_PER_OWNER + 2)]
    assert [checks.ask(file).status_code for file in files] == [202] * MAX_RUNNING_PER_OWNER + [429]
    assert checks.ask(files[0]).status_code == 202
    assert checks.ask(api.upload(lines(ROWS), key="bob:training"), key="bob:training").status_code == 202
    checks.tick()
    assert checks.ask(files[-1]).status_code == 202


def test_a_check_that_failed_itself_says_so_and_is_tried_again_later(api: Api, checks: Checks):
    checks.checker.report = CheckReport(ok=False, error=JobError(code="file_check_failed", message="It failed."))
    file = api.upload(lines(ROWS))
    checks.ask(file)
    checks.tick()
    assert checks.ask(file).json()["error"]["code"] == "file_check_failed"
    (stored,) = api.store.records.file_checks.query()
    past = stored.value.model_copy(update={"finished_at": time.time() - FAILURE_MEMORY_S - 1})
    api.store.records.commit(api.store.records.file_checks.replace(stored, past))
    assert checks.ask(file).status_code == 202


def test_what_was_found_is_forgotten_after_a_while_and_running_checks_stay(api: Api, checks: Checks):
    done, running = api.upload(lines(ROWS)), api.upload(lines(ROWS[:3]))
    checks.ask(done)
    checks.tick()
    checks.ask(running)
    sweep(api.store, lambda: time.time() + FILE_CHECK_MEMORY_S - 60)
    assert checks.ask(done).status_code == 200
    sweep(api.store, lambda: time.time() + FILE_CHECK_MEMORY_S + 60)
    (left,) = api.store.records.file_checks.query()
    assert left.value.spec.training_file == running


def test_a_check_that_is_gone_ends_its_process(api: Api, checks: Checks):
    checks.ask(api.upload(lines(ROWS)))
    checks.tick(1)
    (stored,) = api.store.records.file_checks.query()
    api.store.records.commit(api.store.records.file_checks.delete(stored))
    checks.tick(1)
    assert checks.checker.forgotten == [stored.value.id]
