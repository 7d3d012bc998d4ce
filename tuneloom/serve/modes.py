"""How requests reach the gateway's replicas, as Ray Serve's flags. One setting stands for a set that is tested as one.

Serve reads its flags when a process imports it, so they are in the environment of every process of the cluster.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from tuneloom.config import GatewaySettings

NUM_PORTS = 2

# By default a stopped replica waits half a minute for balancers of other machines to notice.
DRAINING_S = 2
# The most that one message of gRPC can have. A request crosses whole, and so does an answer in one piece with the
# probabilities of all its tokens; what clients send is limited where it comes in.
LARGEST_MESSAGE_BYTES = (2 << 30) - 1
# Pieces of an answer that cross by gRPC cost base and gateway a third less processor than by Ray's generators. Not from
# the gateway to the proxy: Serve makes one message of all that waits for a slow reader, and a file may be too large for
# one.
BETWEEN_REPLICAS = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_PROXY_USE_GRPC": "0",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(LARGEST_MESSAGE_BYTES),
}


def environment(gateway: GatewaySettings, folder: Path, ports: Sequence[int]) -> dict[str, str]:
    """The flags of `gateway.mode`.

    `folder`: where HAProxy keeps its files; its path and a socket's behind it must fit into 97 bytes, of which Ray
    takes 57. `ports`: free ones, for HAProxy's figures.
    """
    if gateway.mode == "compat":
        return dict(BETWEEN_REPLICAS)
    fast = {**BETWEEN_REPLICAS, "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    if gateway.mode == "throughput":
        # Without a balancer in front, requests still come in by Serve's proxy.
        return {**fast, "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
    stats, metrics = ports
    return {
        **fast,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_S),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(os.cpu_count() or 1, 4)),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(gateway.request_timeout_s)),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        # Two installations of one machine would overwrite each other's files.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "h.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
    }
