"""Serve's request router for bases: requests go where `placement` says. No hashing, no rates.

Serve pickles this module by value, so everything with a state that others must see is imported from elsewhere.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from tuneloom.serve import members
from tuneloom.serve.placement import Placement, RoutingKey


class AdapterAffinityRouter(RequestRouter):
    """Ranks the replicas by the routing key in a request's session id; without one by their queues.

    Not a FIFO router: that would hand the replica that was found for one request to the oldest that waits.
    """

    def initialize_state(self, **options: Any) -> None:
        """`options` are those of `Placement`."""
        self._placement = Placement(**options)
        self._waiting: dict[int, PendingRequest] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        key = RoutingKey()
        if pending_request is not None:
            key = RoutingKey.parse(pending_request.metadata.session_id)
            context = pending_request.routing_context
            if not context.should_backoff:
                self._placement.count(key)
            # Every replica is in every answer: when none has room, asking again at once is of no use.
            context.should_backoff = True
        queues = self.replica_queue_len_cache
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: queues.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        return [[replicas[name]] for name in self._placement.order(key, loads)]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._publish()

    def _publish(self) -> None:
        members.publish(self.app_name, frozenset(replica.unique_id for replica in self.curr_replicas))

    # Ray 2.60 finds the request that a replica was chosen for by the id of the HTTP request, which all calls made in
    # one share, so that of several such calls only one is ever sent. These three find it by its own metadata object.
    # To be removed when `RequestRouter` keeps one entry for each pending request; a test compares its source.

    def _add_pending_request_to_indices(self, pending_request: PendingRequest) -> None:
        self._waiting[id(pending_request.metadata)] = pending_request

    def _remove_pending_request_from_indices(self, pending_request: PendingRequest) -> None:
        self._waiting.pop(id(pending_request.metadata), None)

    def _get_pending_request_matching_internal_request_id(self, request_metadata: Any = None) -> PendingRequest | None:
        found = self._waiting.get(id(request_metadata))
        return found if found is not None and not found.future.done() else None
