"""The machine under a measurement: threads, versions, and what others take of it meanwhile. No torch on import."""

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType

import psutil

from tuneloom.engine.environment import ENGINE_ENVIRONMENT

PACKAGES = ("torch", "transformers", "peft", "ray", "tuneloom")


def enter_environment() -> None:
    """Start this program anew unless it has the environment of an engine's process; the C library reads it but once."""
    if any(name not in os.environ for name in ENGINE_ENVIRONMENT):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**ENGINE_ENVIRONMENT, **os.environ})


def use_threads(threads: int) -> int:
    """Set the threads of everything measured in this process and its children; 0: the cores less one, at least one.

    Call it before torch is imported: OpenMP reads how to wait only once.
    """
    count = threads or max(1, len(os.sched_getaffinity(0)) - 1)
    os.environ["OMP_NUM_THREADS"] = str(count)
    for name, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    torch.set_num_threads(count)
    return count


def describe(threads: int) -> dict[str, object]:
    """What a reader needs to judge numbers that were measured here."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": threads,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


@dataclass
class ForeignLoad:
    """A context that measures the share of the machine's cores that processes other than ours used.

    Ours are this process, its descendants, and those that `others` lists.
    """

    others: Callable[[], list[psutil.Process]] = list
    share: float = 0.0
    _cpu_s: dict[int, float] = field(default_factory=dict)
    _busy_s: float = 0.0
    _started_at: float = 0.0

    def __enter__(self) -> "ForeignLoad":
        self._cpu_s, self._busy_s, self._started_at = self._own(), _busy_s(), time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        own_s = sum(spent - self._cpu_s.get(pid, 0.0) for pid, spent in self._own().items())
        available_s = (time.monotonic() - self._started_at) * (os.cpu_count() or 1)
        self.share = max(0.0, (_busy_s() - self._busy_s - own_s) / max(available_s, 1e-9))

    def _own(self) -> dict[int, float]:
        own = psutil.Process()
        found = {}
        for process in [own, *own.children(recursive=True), *self.others()]:
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            # Of children that have ended only their parent tells.
            found[process.pid] = times.user + times.system + times.children_user + times.children_system
        return found


def _busy_s() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"
