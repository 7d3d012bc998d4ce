import os
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.control.conftest import add_job
from tests.control.fakes import ROOM
from tuneloom.control.launcher import ENTRYPOINT, LauncherUnavailable, RayJobsLauncher, _free_memory, ray_room

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Status(StrEnum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


class FakeClient:
    """Answers as Ray's JobSubmissionClient does: RuntimeError with the status in its text for all but 200."""

    def __init__(self) -> None:
        self.jobs: dict[str, SimpleNamespace] = {}
        self.submitted: list[dict] = []
        self.failure: Exception | None = None
        self.hides_jobs = False

    def submit_job(self, **options: object) -> str:
        self._fail()
        if options["submission_id"] in self.jobs:
            raise RuntimeError(
                "Request failed with status code 500: ValueError: Job with submission_id already exists."
            )
        self.submitted.append(options)
        self.jobs[options["submission_id"]] = SimpleNamespace(status=Status.PENDING, message=None)
        self.hides_jobs = False
        return options["submission_id"]

    def get_job_info(self, id: str) -> SimpleNamespace:
        self._fail()
        if id not in self.jobs or self.hides_jobs:
            self.hides_jobs = False
            raise RuntimeError(f"Request failed with status code 404: Job {id} does not exist.")
        return self.jobs[id]

    def stop_job(self, id: str) -> bool:
        self._fail()
        if id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {id} does not exist.")
        self.jobs[id].status = Status.STOPPED
        return True

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def launcher(client: FakeClient) -> RayJobsLauncher:
    return RayJobsLauncher(lambda: client, Path("/home/of/tuneloom"), lambda: ROOM)


@pytest.fixture
def job(store):
    return add_job(store, suffix="bot; rm -rf $HOME", attempt=2, attempt_open=True, state="queued")


def test_an_attempt_is_a_ray_job_with_a_constant_entrypoint_and_ids_in_the_environment(launcher, client, job):
    launcher.launch(job)
    sent = client.submitted[0]
    assert sent["entrypoint"] == ENTRYPOINT == "exec python -m tuneloom.train"
    assert sent["submission_id"] == f"{job.id}-a2"
    environment = sent["runtime_env"]["env_vars"]
    assert environment["TUNELOOM_JOB"] == job.id
    assert environment["TUNELOOM_ATTEMPT"] == "2"
    assert environment["TUNELOOM_HOME"] == "/home/of/tuneloom"
    assert environment["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert sent["metadata"]["model"] == job.spec.suffix
    assert not any("rm -rf" in value for value in environment.values())


def test_launching_twice_submits_once(launcher, client, job):
    launcher.launch(job)
    launcher.launch(job)
    assert len(client.submitted) == 1


def test_an_id_that_another_control_submitted_in_between_counts_as_launched(launcher, client, job):
    client.jobs[job.submission_id] = SimpleNamespace(status=Status.RUNNING, message=None)
    client.hides_jobs = True
    launcher.launch(job)
    assert client.submitted == []


@pytest.mark.parametrize(
    "status, state",
    [
        ("PENDING", "alive"),
        ("RUNNING", "alive"),
        ("SUCCEEDED", "finished"),
        ("STOPPED", "finished"),
        ("FAILED", "failed"),
    ],
)
def test_the_states_of_ray_become_those_of_an_attempt(launcher, client, status, state):
    client.jobs["x"] = SimpleNamespace(status=Status(status), message="why")
    seen = launcher.observe("x")
    assert (seen.state, seen.message) == (state, "why")


def test_an_unknown_handle_is_unknown_and_stopping_it_is_fine(launcher):
    assert launcher.observe("x").state == "unknown"
    launcher.stop("x")


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("refused"),
        TimeoutError("slow"),
        RuntimeError("Request failed with status code 503: no agent"),
        PermissionError("no token"),
    ],
)
def test_a_server_that_does_not_answer_says_nothing_about_the_attempt(launcher, client, job, failure):
    client.failure = failure
    for call in (lambda: launcher.observe("x"), lambda: launcher.stop("x"), lambda: launcher.launch(job)):
        with pytest.raises(LauncherUnavailable):
            call()


def test_after_a_lost_connection_a_new_client_is_made(client):
    made: list[FakeClient] = []

    def connect() -> FakeClient:
        made.append(client)
        return client

    launcher = RayJobsLauncher(connect, Path("/home"), lambda: ROOM)
    client.failure = ConnectionError("moved")
    with pytest.raises(LauncherUnavailable):
        launcher.observe("x")
    client.failure = None
    assert launcher.observe("x").state == "unknown"
    assert len(made) == 2


def test_the_room_is_that_of_the_cluster_or_unknown_if_it_does_not_answer():
    assert RayJobsLauncher(lambda: None, Path("/home"), lambda: ROOM).room() is ROOM

    def broken():
        raise RuntimeError("the GCS is gone")

    with pytest.raises(LauncherUnavailable, match="the GCS is gone"):
        RayJobsLauncher(lambda: None, Path("/home"), broken).room()


def test_free_memory_is_that_of_the_machine_or_of_its_control_group(tmp_path):
    assert _free_memory(tmp_path, tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert _free_memory(tmp_path, tmp_path) == 8000 * 1024
    for name, text in (("max", "2000000"), ("current", "1500000"), ("stat", "anon 1\ninactive_file 300000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert _free_memory(tmp_path, tmp_path) == 800_000
    (tmp_path / "memory.max").write_text("max")
    assert _free_memory(tmp_path, tmp_path) == 8000 * 1024


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([{"Alive": True, "Resources": {"CPU": 64.0}}], (7.5, 2.0, CORES, CORES)),
        (
            [
                {"Alive": True, "Resources": {"CPU": 4.0}},
                {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 2.0}},
                {"Alive": False, "Resources": {"CPU": 32.0}},
            ],
            (7.5, 2.0, 20, 16),
        ),
    ],
)
def test_the_cores_of_one_machine_are_counted_and_those_of_many_are_what_they_claim(monkeypatch, nodes, expected):
    import ray

    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 7.5, "GPU": 2.0})
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    left = {str(number): {"memory": 1e9 * number} for number in range(3)}
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: left)
    found = ray_room()
    assert (found.free_cpus, found.free_gpus, found.cores, found.node_cores) == expected
    assert found.keeps_memory == (len(nodes) > 1)
    assert not found.keeps_memory or found.free_memory_bytes == 2_000_000_000, "the most that one node has left"
