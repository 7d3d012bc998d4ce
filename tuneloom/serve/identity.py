"""Who and where a process is in the Ray cluster, and who of the others lives."""

import math
import os

# Where Serve keeps the names of its replicas.
NAMESPACE = "serve"


def own_name() -> str:
    """The name of the Serve replica that this process runs; empty outside of one."""
    import ray

    return ray.get_runtime_context().get_actor_name() or ""


def own_id() -> str:
    """The part of that name by which requests are placed."""
    from ray import serve

    return serve.get_replica_context().replica_id.unique_id


def is_replica_alive(name: str) -> bool:
    """Whether a Serve replica of that name runs. Doubt counts as yes."""
    import ray
    from ray.exceptions import RayError

    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    except RayError:
        return True
    return True


def num_here(replicas: int) -> int:
    """How many of that many replicas share this machine when they are spread evenly."""
    import ray

    machines = sum(node["Alive"] for node in ray.nodes())
    return math.ceil(replicas / max(machines, 1))


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
