"""Which replicas each Serve application has, as the routers of this process hear it from Serve. No routing.

A process has one router for each application it calls, made by Serve where nobody can reach it: this is where it tells.
"""

_members: dict[str, frozenset[str]] = {}


def publish(application: str, replicas: frozenset[str]) -> None:
    """Called by the router of `application`, from its own thread."""
    _members[application] = replicas


def find(application: str) -> frozenset[str] | None:
    """The names of the replicas that take requests now; None if this process has not heard of any set yet."""
    return _members.get(application)
