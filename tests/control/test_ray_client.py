"""The launcher through Ray's own client, against a small job server that speaks its protocol on loopback."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from tests.control.conftest import add_job
from tests.control.fakes import ROOM
from tuneloom.control.launcher import LauncherUnavailable, RayJobsLauncher, ray_jobs_client


class JobServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.jobs: dict[str, dict] = {}
        self.delay_s = 0.0

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what one of the tests is about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: JobServer

    def do_GET(self) -> None:
        time.sleep(self.server.delay_s)
        if self.path == "/api/version":
            self._answer(200, {"version": "4", "ray_version": ray.__version__, "ray_commit": "x"})
            return
        id = self.path.rsplit("/", 1)[-1]
        job = self.server.jobs.get(id)
        self._answer(*((200, job) if job else (404, f"Job {id} does not exist")))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        if self.path.endswith("/stop"):
            id = self.path.split("/")[-2]
            known = id in self.server.jobs
            self._answer(*((200, {"stopped": True}) if known else (404, f"Job {id} does not exist")))
            return
        id = body["submission_id"]
        if id in self.server.jobs:
            self._answer(500, f"ValueError: Job with submission_id {id} already exists.")
            return
        self.server.jobs[id] = {**body, "type": "SUBMISSION", "status": "PENDING"}
        self._answer(200, {"job_id": id, "submission_id": id})

    def _answer(self, status: int, body: object) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    # Where the client of Ray would go by itself; and what it must not be told by an earlier test.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    server = JobServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


def make_launcher(server: JobServer, timeout_s: float = 10) -> RayJobsLauncher:
    return RayJobsLauncher(lambda: ray_jobs_client(server.url, timeout_s), Path("/home"), lambda: ROOM)


def test_an_attempt_is_launched_once_watched_and_stopped_at_the_address_given(server, store):
    launcher = make_launcher(server)
    job = add_job(store, attempt=1, attempt_open=True, state="queued")
    assert launcher.observe(job.submission_id).state == "unknown"
    launcher.launch(job)
    launcher.launch(job)
    sent = server.jobs[job.submission_id]
    assert sent["entrypoint"] == "exec python -m tuneloom.train"
    assert sent["metadata"] == {
        "name": "train bot",
        "job": job.id,
        "attempt": "1",
        "model": "bot",
        "base": "tiny/llama",
        "owner": "ada",
    }
    assert sent["runtime_env"]["env_vars"]["TUNELOOM_JOB"] == job.id
    assert launcher.observe(job.submission_id).state == "alive"
    sent["status"] = "FAILED"
    assert launcher.observe(job.submission_id).state == "failed"
    launcher.stop(job.submission_id)
    launcher.stop("unknown")


def test_a_server_that_hangs_is_given_up_in_time(server):
    launcher = make_launcher(server, timeout_s=0.3)
    assert launcher.observe("x").state == "unknown"
    server.delay_s = 5
    begun = time.monotonic()
    with pytest.raises(LauncherUnavailable):
        launcher.observe("x")
    assert time.monotonic() - begun < 3


def test_a_server_that_is_not_there_says_so(server):
    launcher = RayJobsLauncher(lambda: ray_jobs_client("http://127.0.0.1:9", 1.0), Path("/home"), lambda: ROOM)
    with pytest.raises(LauncherUnavailable):
        launcher.observe("x")
