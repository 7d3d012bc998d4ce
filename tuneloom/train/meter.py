"""What a job takes: seconds of its processes and the most memory one of them held. Reads the operating system only."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuneloom.domain import Progress

_CGROUP = Path("/sys/fs/cgroup")
# A limit at or above this is how a cgroup says that there is none.
_NO_LIMIT = 1 << 60
# Ray ends a worker when 95 % of the memory are taken.
SHORT_SHARE = 0.08


class Meter:
    """Counts on from what earlier starts and attempts of the job have taken."""

    def __init__(self, before: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self._before = before
        self._clock = clock
        self._started_at = clock()

    def read(self) -> dict[str, Any]:
        """The fields of `Progress`."""
        seconds = self._before.seconds + self._clock() - self._started_at
        most = max(self._before.memory_bytes, peak_memory_bytes())
        return {"seconds": seconds, "starts": self._before.starts + 1, "memory_bytes": most}


def peak_memory_bytes() -> int:
    """The most that this process has held: on the device where it computes on one, else in host memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # `getrusage` would count what the process held that started this one, until it became this program.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) << 10


def memory_bytes() -> int:
    """What this process holds now, there where `peak_memory_bytes` looks."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def is_memory_short() -> bool:
    """Whether the machine, or the container that this process is in, has nearly no memory left."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    limit = _number(_CGROUP / "memory.max")
    if limit is not None and limit < _NO_LIMIT:
        used = (_number(_CGROUP / "memory.current") or 0) - _inactive_files()
        if limit - used < SHORT_SHARE * limit:
            return True
    return free < SHORT_SHARE * total


def oom_kills() -> int:
    """Processes that the kernel has ended for want of memory since the machine started, here and in this container."""
    counts = 0
    for path in (Path("/proc/vmstat"), _CGROUP / "memory.events"):
        if path.exists():
            counts += sum(
                int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("oom_kill ")
            )
    return counts


def _inactive_files() -> int:
    """Pages of files that the kernel takes back first, though they count as used."""
    path = _CGROUP / "memory.stat"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdigit() else None
