from pathlib import Path

import pytest

from tuneloom.config import BaseSettings, GatewaySettings, Settings
from tuneloom.serve import modes
from tuneloom.serve.app import base, schema

UUID_FOLDER, LONGEST_SOCKET = 57, 97


def test_the_default_mode_sets_nothing(tmp_path: Path) -> None:
    assert modes.environment(GatewaySettings(), tmp_path, ()) == {}


def test_fast_modes_let_a_whole_body_cross_in_one_message(tmp_path: Path) -> None:
    for mode in ("throughput", "haproxy"):
        gateway = GatewaySettings(mode=mode, max_body_bytes=50 << 20)
        flags = modes.environment(gateway, tmp_path, (1, 2))
        assert int(flags["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"]) > 100 << 20


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
