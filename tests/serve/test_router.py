"""The router on Ray's own classes, without a cluster, and what it relies on in the Ray that it is written for."""

import asyncio
import inspect
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from ray.serve import context as serve_context
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.default_impl import get_request_metadata
from ray.serve._private.handle_options import DynamicHandleOptions, InitHandleOptions
from ray.serve.request_router import PendingRequest, RequestRouter

from tuneloom.serve import members
from tuneloom.serve.placement import rendezvous
from tuneloom.serve.router import AdapterAffinityRouter

pytestmark = pytest.mark.anyio


class FakeReplica:
    """What the router sees of a replica, of Ray's `RunningReplica`."""

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, DeploymentID("Base", "base-test"))
        self.max_ongoing_requests = 100

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


@pytest.fixture
def router() -> Iterator[Any]:
    made = AdapterAffinityRouter(
        DeploymentID("Base", "base-test"), DeploymentHandleSource.UNKNOWN, use_replica_queue_len_cache=True
    )
    made.initialize_state()
    yield made


def pending(session_id: str, internal_id: str = "one") -> Any:
    return PendingRequest([], {}, RequestMetadata("r", internal_id, session_id=session_id))


async def test_calls_made_inside_one_request_are_all_sent_and_to_one_replica(router: Any) -> None:
    router.update_replicas([FakeReplica(f"r{i}") for i in range(4)])
    calls = [router._choose_replica_for_request(pending("adapter-7/")) for _ in range(16)]
    async with asyncio.timeout(10):
        chosen = await asyncio.gather(*calls)
    assert {replica.replica_id.unique_id for replica in chosen} == {
        rendezvous("adapter-7", ["r0", "r1", "r2", "r3"])[0]
    }
    assert not router._waiting


async def test_a_call_that_is_cancelled_or_sent_again_leaves_nothing_behind(router: Any) -> None:
    waiting = asyncio.create_task(router._choose_replica_for_request(pending("a/")))
    await asyncio.sleep(0.01)
    assert len(router._waiting) == 1
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not router._waiting

    router.update_replicas([FakeReplica("r0")])
    call = pending("a/")
    await router._choose_replica_for_request(call)
    async with asyncio.timeout(10):
        await router._choose_replica_for_request(call, is_retry=True)
    assert not router._waiting


async def test_the_keys_of_a_dead_replica_move_and_the_process_knows_who_is_left(router: Any) -> None:
    replicas = {name: FakeReplica(name) for name in ("r0", "r1", "r2")}
    router.update_replicas(list(replicas.values()))
    assert members.find("base-test") == {"r0", "r1", "r2"}
    first, second, _ = rendezvous("a", replicas)
    assert (await router._choose_replica_for_request(pending("a/"))).replica_id.unique_id == first
    router.on_replica_actor_died(replicas[first].replica_id)
    assert (await router._choose_replica_for_request(pending("a/"))).replica_id.unique_id == second
    assert members.find("base-test") == set(replicas) - {first}


# The parts of Ray that `AdapterAffinityRouter` overrides or relies on. When one of these fails after a change of
# Ray, read the named code anew, adapt the router, and only then this list.


PRIVATE = {
    "self._add_pending_request_to_indices(": 1,
    "self._remove_pending_request_from_indices(": 2,
    "self._get_pending_request_matching_internal_request_id(": 1,
    "_pending_requests_by_id": 5,
}


def test_ray_is_the_one_that_the_router_was_written_for() -> None:
    lock = (Path(__file__).parents[2] / "requirements.lock").read_text()
    assert version("ray") == "2.60.0" and "ray==2.60.0" in lock.splitlines()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("initialize_state", ["self", "kwargs"]),
        ("choose_replicas", ["self", "candidate_replicas", "pending_request"]),
        ("update_replicas", ["self", "replicas"]),
        ("on_replica_actor_died", ["self", "replica_id"]),
        ("_add_pending_request_to_indices", ["self", "pending_request"]),
        ("_remove_pending_request_from_indices", ["self", "pending_request"]),
        ("_get_pending_request_matching_internal_request_id", ["self", "request_metadata"]),
    ],
)
def test_what_the_router_overrides_has_the_signature_it_expects(method: str, parameters: list[str]) -> None:
    for kind in (RequestRouter, AdapterAffinityRouter):
        found = list(inspect.signature(getattr(kind, method)).parameters)
        assert [name if name != "options" else "kwargs" for name in found] == parameters


def test_ray_looks_for_waiting_requests_only_by_the_methods_that_the_router_overrides() -> None:
    source = inspect.getsource(RequestRouter)
    assert {name: source.count(name) for name in PRIVATE} == PRIVATE
    assert "replica, request_metadata" in inspect.getsource(RequestRouter._fulfill_pending_requests)


def test_ray_itself_still_loses_calls_made_inside_one_request() -> None:
    """When it no longer does, the three overrides can go."""
    source = inspect.getsource(RequestRouter._add_pending_request_to_indices)
    assert "pending_request.metadata.internal_request_id" in source


def test_no_header_of_a_client_reaches_the_router_of_a_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve keeps a client's session id for the call of the gateway; ours takes only what its handle is told."""
    context = serve_context._RequestContext(session_id="theirs", multiplexed_model_id="theirs")
    monkeypatch.setattr(serve_context, "_get_serve_request_context", lambda: context)
    init = InitHandleOptions.create()
    for options, ours in ((DynamicHandleOptions(), ""), (DynamicHandleOptions(session_id="ours"), "ours")):
        metadata = get_request_metadata(init, options)
        assert (metadata.session_id, metadata.multiplexed_model_id) == (ours, "")
