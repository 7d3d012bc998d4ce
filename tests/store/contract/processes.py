"""Processes beside that of the tests."""

import multiprocessing
from collections.abc import Callable
from typing import Any

SPAWN = multiprocessing.get_context("spawn")
PROCESS_TIMEOUT_S = 60


def in_processes(count: int, target: Callable[..., None], *args: Any) -> None:
    children = [SPAWN.Process(target=target, args=args) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(PROCESS_TIMEOUT_S)
    assert [child.exitcode for child in children] == [0] * count
