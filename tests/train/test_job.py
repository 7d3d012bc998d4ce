import os
import signal
import subprocess
import sys
import threading

import pytest

from tuneloom.config import Settings
from tuneloom.train import job

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
    run = job._Run(Settings(home=tmp_path), "ftjob-1", 1)
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
