import sys
import time
from pathlib import Path

from tuneloom.control.check import CheckReport, ProcessChecker


def make(tmp_path: Path, program: str, timeout_s: float = 20) -> ProcessChecker:
    return ProcessChecker(tmp_path, timeout_s, command=(sys.executable, "-c", program))


def wait(checker: ProcessChecker, job_id: str = "ftjob-1", limit_s: float = 20) -> CheckReport:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        report = checker.check(job_id)
        if report is not None:
            return report
        time.sleep(0.02)
    raise AssertionError("no report")


def test_the_report_is_the_last_line_of_the_process_that_knows_home_and_job(tmp_path):
    program = (
        "import json, os; print('noise'); told = [os.environ['TUNELOOM_JOB'], os.environ['TUNELOOM_HOME']]; "
        "notes = [{'level': 'info', 'message': text} for text in told]; "
        "print(json.dumps({'ok': True, 'rows': 3, 'notes': notes}))"
    )
    report = wait(make(tmp_path, program))
    assert report.ok
    assert (report.rows, [note.message for note in report.notes]) == (3, ["ftjob-1", str(tmp_path)])


def test_a_check_that_takes_too_long_is_ended_and_says_so(tmp_path):
    checker = make(tmp_path, "import time; time.sleep(60)", timeout_s=0.2)
    report = wait(checker)
    assert not report.ok
    assert report.error.code == "file_check_timeout"
    assert checker._runs == {}


def test_a_check_that_crashes_is_tried_again_before_it_fails(tmp_path):
    program = f"open({str(tmp_path / 'tries')!r}, 'a').write('x'); raise SystemExit(3)"
    report = wait(make(tmp_path, program))
    assert report.error.code == "file_check_failed"
    assert (tmp_path / "tries").read_text() == "xxx"


def test_a_check_without_a_report_counts_as_a_crash(tmp_path):
    assert wait(make(tmp_path, "print('{}')")).error.code == "file_check_failed"


def test_forgetting_a_job_ends_its_process(tmp_path):
    checker = make(tmp_path, "import time; time.sleep(60)")
    assert checker.check("ftjob-1") is None
    process = checker._runs["ftjob-1"].process
    checker.forget("ftjob-1")
    assert process.returncode is not None
