"""What a gateway's interpreter does under load: shares of the samples that hold its lock, by whose code runs.

A sample counts for the innermost of its frames that belongs to one of `PARTS`: what the standard library does counts
for whoever called it.
"""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

# Beginnings of paths, the more special first.
PARTS = {
    "limits": ("tuneloom/serve/limits",),
    "key check": ("tuneloom/serve/auth", "tuneloom/serve/key"),
    "store": ("tuneloom/store",),
    "the application's rest": ("tuneloom/",),
    "Starlette": ("starlette/",),
    "the HTTP server": ("uvicorn/",),
    "Ray Serve": ("ray/serve/",),
    "gRPC": ("grpc/",),
    "Ray": ("ray/",),
}
OTHER = "the event loop and other threads"
SAMPLES_PER_S = 100


def profile(pid: int, drive: Callable[[], object], seconds: int) -> dict[str, float]:
    """Shares of each part in percent, while `drive` is called over and over. Empty where py-spy may not look."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        command = [str(Path(sys.executable).parent / "py-spy"), "record", "--pid", str(pid), "--gil"]
        command += ["--duration", str(seconds), "--rate", str(SAMPLES_PER_S), "--format", "raw", "--output", str(raw)]
        spy = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while spy.poll() is None:
            drive()
        return shares(raw.read_text(encoding="utf-8")) if raw.exists() else {}


def shares(raw: str) -> dict[str, float]:
    """Of py-spy's raw format: a line for each stack, its frames from the outermost, and how often it was seen."""
    counts: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        counts[_part_of(stack.split(";"))] += int(count)
    return {part: 100 * count / counts.total() for part, count in counts.most_common()}


def _part_of(frames: list[str]) -> str:
    for frame in reversed(frames):
        path = frame.rpartition(" (")[2]
        for part, beginnings in PARTS.items():
            if path.startswith(beginnings):
                return part
    return OTHER
