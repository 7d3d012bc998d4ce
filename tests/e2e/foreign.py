"""Somebody else's Ray on the same host."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tuneloom import ports


@contextlib.contextmanager
def foreign_cluster() -> Iterator[psutil.Process]:
    """A small Ray cluster as somebody else would start it: in a folder, on ports and under rules of its own."""
    folder = Path(tempfile.mkdtemp(prefix="fo-"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNELOOM_"))}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "FOREIGN": str(folder)}
    gcs, client, agent = (str(port) for port in ports.free_ports(3))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--include-dashboard", "false"]
    command += ["--port", gcs, "--ray-client-server-port", client, "--dashboard-agent-listen-port", agent]
    command += ["--temp-dir", str(folder), "--num-cpus", "1", "--object-store-memory", str(80 << 20)]
    try:
        subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, start_new_session=True)
        yield next(process for process in _of(folder) if "gcs_server" in " ".join(process.cmdline()))
    finally:
        for process in _of(folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FOREIGN") == str(folder):
                found.append(process)
    return found
