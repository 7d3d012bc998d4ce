import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuneloom.config import BaseSettings, GatewaySettings, Settings
from tuneloom.serve import modes
from tuneloom.serve.app import base, schema

UUID_FOLDER, LONGEST_SOCKET = 57, 97


@pytest.mark.parametrize("mode", ["compat", "throughput", "haproxy"])
def test_in_every_mode_pieces_cross_by_grpc_between_replicas_and_files_do_not(tmp_path: Path, mode: str) -> None:
    flags = modes.environment(GatewaySettings(mode=mode), tmp_path, (1, 2))
    assert int(flags["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"]) == 2**31 - 1
    script = "from ray.serve._private import constants as c, handle_options as h; "
    script += "print(h.RAY_SERVE_USE_GRPC_BY_DEFAULT, c.RAY_SERVE_PROXY_USE_GRPC, c.RAY_SERVE_THROUGHPUT_OPTIMIZED)"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **flags}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-3:] == ["True", "False", str(mode != "compat")], "as Ray reads it"


def test_haproxy_keeps_its_files_and_figures_to_itself(tmp_path: Path) -> None:
    folder = Path("/tmp/tuneloom-100000-abcdef")
    flags = modes.environment(GatewaySettings(mode="haproxy", request_timeout_s=900), folder, (1234, 1235))
    files = [value for name, value in flags.items() if "HAPROXY" in name and value.startswith("/")]
    assert len(files) == 5 and all(Path(file).is_relative_to(folder) for file in files)
    sockets = [file for file in files if file.endswith(".sock")]
    assert len(sockets) == 2 and all(len(socket) + UUID_FOLDER <= LONGEST_SOCKET for socket in sockets)
    assert {flags["RAY_SERVE_HAPROXY_STATS_PORT"], flags["RAY_SERVE_HAPROXY_METRICS_PORT"]} == {"1234", "1235"}
    assert flags["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "900", "an old balancer lives as long as its longest stream"


@pytest.mark.parametrize(("mode", "first"), [("compat", "Base"), ("throughput", "Base"), ("haproxy", "Door")])
def test_the_router_of_a_base_is_never_on_the_deployment_that_haproxy_asks(tmp_path, mode: str, first: str) -> None:
    settings = Settings(home=tmp_path, bases=(BaseSettings(id="a/b"),), gateway=GatewaySettings(mode=mode))
    application = schema(settings)["applications"][0]
    assert base(application["args"])._bound_deployment.name == first
    routed = [d["name"] for d in application["deployments"] if "request_router_config" in d]
    assert routed == ["Base"]
    assert [d["name"] for d in application["deployments"]] == (["Base", "Door"] if first == "Door" else ["Base"])
