"""Which TCP ports a local cluster takes. Nothing is held: a port is chosen here and bound by others a little later."""

import contextlib
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tuneloom.config.locks import alone
from tuneloom.errors import TuneloomError

# Below every system's range for outgoing connections, so that none of them takes a port between choice and use.
RANGE = range(20_000, 32_000)
TRIED = 200
CLAIM_TIMEOUT_S = 10.0


class NoPort(TuneloomError):
    """No port is left to take."""


def free_ports(count: int) -> list[int]:
    """That many ports which are free on every interface."""
    ports: list[int] = []
    for port in random.sample(RANGE, 500):
        if is_free(port, ""):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise NoPort(f"No {count} ports from {RANGE.start} to {RANGE.stop} are free.")


def claim(home: Path, host: str, wanted: int, is_used_by: Callable[[Path, int], bool]) -> int:
    """`wanted`, or the next port, that is free on `host` and not about to be used by another installation; 0: any.

    Serve binds its port so that others of the same user can bind it too, and then half of the requests go to each. So
    installations write down which port they take before they start; `is_used_by(home, port)` tells whether one that
    has written its name still is there.
    """
    with _registry() as folder:
        for port in free_ports(1) if wanted == 0 else range(wanted, min(wanted + TRIED, 65_536)):
            note = folder / str(port)
            owner = Path(note.read_text()) if note.exists() else home
            if is_free(port, host) and (owner == home or not is_used_by(owner, port)):
                note.write_text(str(home))
                return port
    raise NoPort(f"No port from {wanted} on is free on {host}. Set `gateway.port` in `config.yaml`.")


def is_free(port: int, host: str) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def listeners(host: str, port: int) -> set[int]:
    """The processes of this user that listen on exactly this address; empty where the system does not tell."""
    with contextlib.suppress(psutil.AccessDenied):
        found = psutil.net_connections("tcp")
        return {c.pid for c in found if c.status == "LISTEN" and c.laddr == (host, port) and c.pid is not None}
    return set()


@contextlib.contextmanager
def _registry() -> Iterator[Path]:
    """The folder of notes that all installations of this user share, ours alone for a moment."""
    folder = Path(tempfile.gettempdir()) / f"tuneloom-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.lstat().st_uid != os.getuid():
        raise NoPort(f"{folder} does not belong to you. Remove it and try again.")
    refusal = NoPort(f"Another process keeps {folder} locked. End it and try again.")
    with alone(folder / "lock", CLAIM_TIMEOUT_S, refusal):
        yield folder
