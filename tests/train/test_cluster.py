"""Training as it really runs: driver, Ray Train's controller and worker in processes of their own."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.train.conftest import Lab, final_adapter, run
from tuneloom.domain import TrainOptions
from tuneloom.train.environment import WORKER_ENVIRONMENT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MARK = f"TUNELOOM_TEST_MARK={secrets.token_hex(8)}"
OPTIONS = TrainOptions(rank=4, precision="fp32", learning_rate=5e-3, checkpoint_every_steps=10)


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment of a process that belongs to a fresh local cluster."""
    name, value = MARK.split("=")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # As `tuneloom up` has it.
        patch.setenv("RAY_worker_niceness", "0")
        for name, value in WORKER_ENVIRONMENT.items():
            patch.setenv(name, value)
        import ray

        # Paths of sockets are short: pytest's own folders are too deep.
        folder = tempfile.mkdtemp(prefix="tl", dir="/tmp")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            yield {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def start(lab: Lab, cluster: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts drivers; those that still live at the end are killed."""
    (lab.settings.home / "config.yaml").write_text(
        yaml.safe_dump({"train": lab.settings.train.model_dump(exclude_defaults=True)})
    )
    drivers: list[subprocess.Popen] = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tuneloom.train", *arguments],
            env={**cluster, "TUNELOOM_HOME": str(lab.settings.home), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        drivers.append(driver)
        return driver

    yield start
    for driver in drivers:
        if driver.poll() is None:
            driver.kill()
        driver.wait(timeout=10)


def wait_until(is_so: Callable[[], object], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def worker_pids() -> list[int]:
    """Training workers of this test's own cluster."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            is_worker = entry.name.isdigit() and b"RayTrainWorker" in (entry / "cmdline").read_bytes()
            if is_worker and MARK.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_a_killed_worker_goes_on_to_the_very_same_adapter(
    lab: Lab, tmp_path: Path, start: Callable[..., subprocess.Popen]
) -> None:
    whole, broken = (lab.add_job(options=OPTIONS, n_epochs=20) for _ in range(2))
    assert run(lab, whole.id) == "published"

    driver = start(TUNELOOM_JOB=broken.id, TUNELOOM_ATTEMPT="1")
    wait_until(lambda: driver.poll() is not None or lab.progress(broken.id).logged_step >= 25)
    (pid,) = worker_pids()
    os.kill(pid, signal.SIGKILL)
    output, _ = driver.communicate(timeout=120)

    assert driver.returncode == 0, output
    assert lab.progress(broken.id).outcome == "published"
    assert any("goes on from the checkpoint" in event.message for event in lab.events(broken.id))
    assert lab.steps(broken.id) == list(range(1, 121))
    assert lab.losses(broken.id) == lab.losses(whole.id)
    assert final_adapter(lab, broken.id, tmp_path) == final_adapter(lab, whole.id, tmp_path)
    assert "Step 120/120: training loss=" in output
    assert len(output.splitlines()) < 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_ends(
    lab: Lab, start: Callable[..., subprocess.Popen], number: signal.Signals
) -> None:
    job = lab.add_job(options=TrainOptions(rank=4, precision="fp32"), n_epochs=50)
    driver = start(TUNELOOM_JOB=job.id, TUNELOOM_ATTEMPT="1")
    wait_until(lambda: driver.poll() is not None or lab.progress(job.id).logged_step >= 8)
    before = lab.checkpoint_steps(job.id)
    driver.send_signal(number)
    output, _ = driver.communicate(timeout=60)

    assert driver.returncode == 143, output
    assert lab.progress(job.id).outcome is None
    # After SIGTERM there are but three seconds; the worker may be given its end while it saves.
    assert lab.checkpoint_steps(job.id) != before or number is signal.SIGTERM
    wait_until(lambda: not worker_pids(), timeout_s=30)


def test_a_node_that_will_be_taken_away_is_left_with_the_state_saved(
    lab: Lab, start: Callable[..., subprocess.Popen]
) -> None:
    """The last of this module: nothing starts on the node afterwards."""
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    job = lab.add_job(options=TrainOptions(rank=4, precision="fp32"), n_epochs=50)
    driver = start(TUNELOOM_JOB=job.id, TUNELOOM_ATTEMPT="1")
    wait_until(lambda: driver.poll() is not None or lab.progress(job.id).logged_step >= 2)
    context = ray.get_runtime_context()
    deadline_ms = int((time.time() + 120) * 1000)
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    client = GcsClient(address=context.gcs_address)
    accepted, why = client.drain_node(context.get_node_id(), reason, "reclaimed", deadline_ms)
    assert accepted, why
    output, _ = driver.communicate(timeout=100)

    assert driver.returncode == 0, output
    progress = lab.progress(job.id)
    assert (progress.outcome, progress.error) == ("paused", None)
    assert progress.step < 300
    assert lab.checkpoint_steps(job.id)[-1] == progress.step
