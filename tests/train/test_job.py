import subprocess
import sys

import pytest

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
