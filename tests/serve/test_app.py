"""What is deployed, checked against Serve's own schema."""

import json
from pathlib import Path

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema

from tuneloom.config import BaseSettings, EngineSettings, GatewaySettings, Settings
from tuneloom.errors import ContextLengthExceeded, Overloaded, TuneloomError
from tuneloom.serve.app import schema
from tuneloom.serve.handles import as_our_error
from tuneloom.serve.placement import Placement
from tuneloom.serve.upstream import ReplicaLost


@pytest.fixture
def two_bases(tmp_path: Path) -> Settings:
    engine = EngineSettings(threads=2, max_sequences=4, max_waiting=6)
    bases = (BaseSettings(id="Acme/Tiny-1.5", engine=engine), BaseSettings(id="b", num_gpus=1, replicas=2))
    return Settings(home=tmp_path, bases=bases, gateway=GatewaySettings(port=8123))


def test_the_schema_is_what_serve_deploys(two_bases: Settings) -> None:
    deploy = ServeDeploySchema.model_validate(json.loads(json.dumps(schema(two_bases))))

    applications = {application.name: application for application in deploy.applications}
    assert set(applications) == {"gateway", "control", "base-acme-tiny-1-5", "base-b"}
    assert applications["gateway"].route_prefix == "/"
    assert all(a.route_prefix is None for name, a in applications.items() if name != "gateway")
    assert (deploy.http_options.host, deploy.http_options.port) == ("127.0.0.1", 8123)
    base = applications["base-acme-tiny-1-5"]
    assert base.args["base"] == "Acme/Tiny-1.5"
    assert Settings.model_validate(base.args["settings"]) == two_bases


def test_serve_never_refuses_before_the_engine_does(two_bases: Settings) -> None:
    base = schema(two_bases)["applications"][0]["deployments"][0]
    assert base["max_ongoing_requests"] > 4 + 6
    assert base["ray_actor_options"]["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "2"


def test_the_number_of_replicas_is_fixed_or_follows_the_load(tmp_path: Path) -> None:
    bases = (
        BaseSettings(id="a", replicas=2),
        BaseSettings(id="b", max_replicas=3),
        BaseSettings(id="c", min_replicas=0),
    )
    deploy = ServeDeploySchema.model_validate(schema(Settings(home=tmp_path, bases=bases)))

    fixed, growing, rare = (application.deployments[0] for application in deploy.applications[:3])
    assert fixed.num_replicas == 2
    limits = [AutoscalingConfig(**deployment.autoscaling_config) for deployment in (growing, rare)]
    assert [(limit.min_replicas, limit.max_replicas) for limit in limits] == [(1, 3), (0, 1)]
    policy = limits[0].policy
    assert policy.get_policy()(**policy.policy_kwargs)


@pytest.mark.parametrize(
    ("limits", "fewest", "most"),
    [
        ({}, 1, 1),
        ({"replicas": 3}, 3, 3),
        ({"min_replicas": 0}, 0, 1),
        ({"min_replicas": 2}, 2, 2),
        ({"max_replicas": 4}, 1, 4),
        ({"replicas": 3, "max_replicas": 2}, 2, 2),
        ({"min_replicas": 0, "max_replicas": 2}, 0, 2),
    ],
)
def test_limits_of_replicas(limits: dict[str, int], fewest: int, most: int) -> None:
    base = BaseSettings(id="b", **limits)
    assert (base.fewest_replicas, base.most_replicas) == (fewest, most)


def test_limits_that_cross_are_refused() -> None:
    with pytest.raises(ValueError, match="`min_replicas` 3 is above `max_replicas` 2"):
        BaseSettings(id="b", min_replicas=3, max_replicas=2)


def test_requests_of_a_base_are_placed_by_our_router(two_bases: Settings) -> None:
    deployment = ServeDeploySchema.model_validate(schema(two_bases)).applications[0].deployments[0]
    config = RequestRouterConfig(**deployment.request_router_config)
    assert config.get_request_router_class().__name__ == "AdapterAffinityRouter"
    Placement(**config.request_router_kwargs)


def test_two_cores_have_room_for_the_services_and_a_training_run(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    deployments = [d for a in schema(settings)["applications"] for d in a["deployments"]]
    served = sum(d["num_replicas"] * d["ray_actor_options"]["num_cpus"] for d in deployments)
    assert served + settings.train.num_cpus <= 2


def test_an_error_of_ray_means_what_the_caller_can_do() -> None:
    refusal = ContextLengthExceeded("Too long.", param="messages")
    task_error = RayTaskError("generate", "traceback", refusal).as_instanceof_cause()
    assert as_our_error(task_error, "b") is refusal

    died = RayTaskError("generate", "traceback", ActorDiedError()).as_instanceof_cause()
    assert isinstance(as_our_error(died, "b"), ReplicaLost)
    assert isinstance(as_our_error(ActorDiedError(), "b"), ReplicaLost)
    shut_down = AioRpcError(StatusCode.CANCELLED, Metadata(), Metadata())
    assert isinstance(as_our_error(shut_down, "b"), ReplicaLost)

    unexpected = as_our_error(RayTaskError("generate", "secret", ValueError("secret")).as_instanceof_cause(), "b")
    assert (type(unexpected), "secret" in unexpected.message) == (TuneloomError, False)

    busy = as_our_error(BackPressureError(1, 1), "b")
    assert type(busy) is Overloaded and busy.retry_after_s
