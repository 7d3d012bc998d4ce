import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.train.conftest import Lab
from tuneloom.config import Settings, TrainSettings
from tuneloom.domain import Estimate
from tuneloom.train import job
from tuneloom.train.failure import BaseUnreadable
from tuneloom.train.team import StartAgain

CODE = """
import os, threading
from tuneloom.config import TrainSettings
from tuneloom.train.job import step_back
step_back(TrainSettings(niceness={niceness}, scheduling="{scheduling}"))
found = []
thread = threading.Thread(target=lambda: found.append((os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0))))
thread.start(); thread.join()
print(*found[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has classes of scheduling")
@pytest.mark.parametrize(("scheduling", "policy"), [("nice", 0), ("batch", 3), ("idle", 5)])
def test_a_worker_steps_back_as_it_is_told_and_so_do_the_threads_that_it_starts(scheduling, policy):
    code = CODE.format(niceness=19, scheduling=scheduling)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == [str(policy), "19"]


def test_a_signal_in_the_wait_for_a_run_does_not_make_it_look_ended(tmp_path, monkeypatch):
    class Told(Exception):
        pass

    def told(*_: object) -> None:
        raise Told

    release = threading.Event()
    monkeypatch.setattr(job, "fit", lambda *_: release.wait(60))
    before = signal.signal(signal.SIGUSR1, told)
    run = job._Run(Settings(home=tmp_path), "ftjob-1", 1, {"CPU": 1})
    try:
        run.start()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(Told):
            run.join(30)
        assert not run.join(0.01)
    finally:
        signal.signal(signal.SIGUSR1, before)
        release.set()
    assert run.join(30)


@pytest.mark.parametrize(
    ("train", "memory", "expected"),
    [
        (TrainSettings(), [8e9], {"CPU": 1}),
        (TrainSettings(num_cpus=2), [8e9, 16e9], {"CPU": 2, "memory": 9e9}),
        (TrainSettings(), [8e9, 4e9], {"CPU": 1, "memory": 8e9}),
        (TrainSettings(num_gpus=1), [8e9, 16e9], {"CPU": 1, "GPU": 1}),
    ],
    ids=["one node", "several", "none has enough", "a gpu"],
)
def test_ray_keeps_memory_for_a_worker_where_there_are_several_nodes(lab: Lab, monkeypatch, train, memory, expected):
    import ray

    nodes = [{"Alive": True, "Resources": {"memory": size}} for size in memory]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"memory": 1e12}}])
    what = {"tokens": 1, "steps": 1, "seconds": 1, "seconds_low": 1, "seconds_high": 1, "based_on": "nothing"}
    asked = lab.change_job(lab.add_job().id, estimate=Estimate(memory_bytes=9_000_000_000, **what))
    assert job.resources_of(train, asked) == expected


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        ([BaseUnreadable.of("a/b", "no such file"), StartAgain()], "base_unreadable"),
        ([StartAgain(), MemoryError()], "out_of_memory"),
        ([StartAgain(), OSError("killed")], "worker_lost"),
        ([], "worker_lost"),
    ],
)
def test_the_reason_of_a_worker_without_a_voice_is_that_of_the_job(tmp_path, raised, code):
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    failures = {rank: UserExceptionWithTraceback(error, "...") for rank, error in enumerate(raised)}
    found = job.describe_end(WorkerGroupError("workers failed", failures), Settings(home=tmp_path))
    assert found.code == code
