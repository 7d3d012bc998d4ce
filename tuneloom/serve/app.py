"""Settings become Serve applications: `schema` for the cluster, and the builders that the schema names.

`schema` is pure, and importing this module is cheap: whoever deploys needs neither Serve nor torch. The processes of
the cluster it is deployed on should have `guard.PROXY_ENVIRONMENT` in their environment.
"""

from typing import TYPE_CHECKING, Any

from tuneloom.bases import slug
from tuneloom.config import BaseSettings, Settings
from tuneloom.engine.environment import ENGINE_ENVIRONMENT

if TYPE_CHECKING:
    from ray.serve import Application

GATEWAY_APP = "gateway"
CONTROL_APP = "control"
BASE_DEPLOYMENT = "Base"

# A dead replica is seen at the next check: this, a process start and a model's load must fit into a minute.
HEALTH = {"health_check_period_s": 2.0, "health_check_timeout_s": 20.0}
LIGHT_CPUS = 0.1
# A call of `stats` or a health check must get through while the engine has all the requests that it takes.
SPARE_REQUESTS = 64
ROUTER = "tuneloom.serve.router.AdapterAffinityRouter"
SCALING = "tuneloom.serve.scaling:WaitingTokensPolicy"
REPORTS_PER_WINDOW = 5


def base_app(base_id: str) -> str:
    """The name of the application that runs a base."""
    return f"base-{slug(base_id)}"


def schema(settings: Settings) -> dict[str, Any]:
    """What to deploy, in the form of `ray.serve.schema.ServeDeploySchema`, as plain JSON."""
    return {
        "http_options": {"host": settings.gateway.host, "port": settings.gateway.port},
        # Access logs hold method, path and status: no bodies, so no prompts, and no keys.
        "logging_config": {"encoding": "JSON", "log_level": "INFO"},
        "applications": [
            *(_base(settings, base) for base in settings.bases),
            _control(settings),
            _gateway(settings),
        ],
    }


def _gateway(settings: Settings) -> dict[str, Any]:
    deployment = {
        "name": "Gateway",
        "num_replicas": settings.gateway.replicas,
        "max_ongoing_requests": settings.gateway.max_ongoing_requests,
        "graceful_shutdown_timeout_s": 20.0,
        "ray_actor_options": {"num_cpus": LIGHT_CPUS},
        **HEALTH,
    }
    return _application(GATEWAY_APP, "gateway", deployment, {"settings": _plain(settings)}, route_prefix="/")


def _control(settings: Settings) -> dict[str, Any]:
    deployment = {
        "name": "Control",
        "num_replicas": 1,
        "max_ongoing_requests": 100,
        "graceful_shutdown_timeout_s": 10.0,
        "ray_actor_options": {"num_cpus": LIGHT_CPUS},
        **HEALTH,
    }
    return _application(CONTROL_APP, "control", deployment, {"settings": _plain(settings)})


def _base(settings: Settings, base: BaseSettings) -> dict[str, Any]:
    environment = dict(ENGINE_ENVIRONMENT)
    if base.engine.threads:
        environment["OMP_NUM_THREADS"] = str(base.engine.threads)
    deployment = {
        "name": BASE_DEPLOYMENT,
        **_number_of_replicas(base),
        "request_router_config": {
            "request_router_class": ROUTER,
            "request_router_kwargs": {
                "load_factor": base.load_factor,
                "slack": base.load_slack,
                "rate_per_replica": base.spread_rate,
            },
        },
        # The engine's own queue is what refuses, with a reason; Serve's never fills before it.
        "max_ongoing_requests": base.engine.max_sequences + base.engine.max_waiting + SPARE_REQUESTS,
        "graceful_shutdown_timeout_s": 20.0,
        "ray_actor_options": {
            "num_cpus": base.num_cpus,
            "num_gpus": base.num_gpus,
            "runtime_env": {"env_vars": environment},
        },
        **HEALTH,
    }
    args = {"settings": _plain(settings), "base": base.id}
    application = _application(base_app(base.id), "base", deployment, args)
    if settings.gateway.mode == "haproxy":
        application["deployments"].append({"name": "Door", "ray_actor_options": {"num_cpus": 0}, **HEALTH})
    return application


def _number_of_replicas(base: BaseSettings) -> dict[str, Any]:
    if base.fewest_replicas == base.most_replicas:
        return {"num_replicas": base.most_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": base.fewest_replicas,
            "max_replicas": base.most_replicas,
            "look_back_period_s": base.scale_window_s,
            "metrics_interval_s": base.scale_window_s / REPORTS_PER_WINDOW,
            "upscale_delay_s": base.scale_up_delay_s,
            "downscale_delay_s": base.scale_down_delay_s,
            "downscale_to_zero_delay_s": base.scale_to_zero_delay_s,
            "policy": {
                "policy_function": SCALING,
                "policy_kwargs": {
                    "target_waiting_tokens": base.target_waiting_tokens,
                    "max_sequences": base.engine.max_sequences,
                },
            },
        }
    }


def _application(
    name: str, builder: str, deployment: dict[str, Any], args: dict[str, Any], *, route_prefix: str | None = None
) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": route_prefix,
        "import_path": f"{__name__}:{builder}",
        "args": args,
        "deployments": [deployment],
    }


def _plain(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def gateway(args: dict[str, Any]) -> "Application":
    from ray import serve

    from tuneloom.serve.gateway import Gateway

    return serve.deployment(name="Gateway")(serve.ingress()(Gateway)).bind(args["settings"])


def base(args: dict[str, Any]) -> "Application":
    from ray import serve

    from tuneloom.serve.door import Door
    from tuneloom.serve.replica import Base

    bound = serve.deployment(name=BASE_DEPLOYMENT)(Base).bind(args["settings"], args["base"])
    behind_haproxy = args["settings"]["gateway"]["mode"] == "haproxy"
    return serve.deployment(name="Door")(Door).bind(bound) if behind_haproxy else bound


def control(args: dict[str, Any]) -> "Application":
    from ray import serve

    from tuneloom.control.deployment import Control

    return serve.deployment(name="Control")(Control).bind(args["settings"])
