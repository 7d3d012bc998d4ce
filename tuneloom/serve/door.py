"""The ingress that HAProxy asks of every application. It stands before a base whose requests come by its handle."""

from typing import Any


class Door:
    """Does nothing: Serve allows no router of our own on an application's first deployment while HAProxy balances."""

    def __init__(self, behind: Any) -> None:
        self._behind = behind
