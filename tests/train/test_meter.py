import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuneloom.domain import Progress
from tuneloom.train import meter
from tuneloom.train.meter import Meter

# As the module has it, whatever a fixture of this folder says.
OOM_KILLS = meter.oom_kills
BEFORE = Progress(id="j", owner="local", attempt=1, heartbeat_at=0.0, seconds=10.0, memory_bytes=1 << 50)


def test_seconds_go_on_from_those_before_and_the_largest_memory_stays() -> None:
    now = [100.0]
    read = Meter(BEFORE, clock=lambda: now[0]).read
    now[0] += 2.5
    assert read() == {"seconds": 12.5, "starts": 1, "memory_bytes": 1 << 50}


def test_memory_is_what_the_process_holds_and_the_peak_remembers_it() -> None:
    before = meter.memory_bytes()
    held = bytearray(os.urandom(1 << 20) * 64)
    during = meter.memory_bytes()
    assert during - before > 50 << 20
    del held
    assert meter.peak_memory_bytes() >= during - (8 << 20)


def test_memory_is_short_below_a_share_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not meter.is_memory_short()
    monkeypatch.setattr(meter, "SHORT_SHARE", 1.0)
    assert meter.is_memory_short()


def test_the_kernel_counts_what_it_kills() -> None:
    assert OOM_KILLS() >= 0
    assert "oom_kill " in Path("/proc/vmstat").read_text()


def test_a_fresh_process_has_its_own_peak() -> None:
    code = "from tuneloom.train.meter import peak_memory_bytes as p; print(p())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert 5 << 20 < int(found.stdout) < 400 << 20
