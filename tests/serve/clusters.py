"""A real local Ray with our applications, for the tests of this folder that need one."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from openai import OpenAI

from tests.serve.conftest import BASE
from tuneloom.config import Settings
from tuneloom.serve import members, modes
from tuneloom.serve.app import base_app, schema
from tuneloom.serve.guard import PROXY_ENVIRONMENT

START_TIMEOUT_S = 240


@dataclass
class Cluster:
    url: str
    key: str
    key_of_eve: str

    def client(self, **more: Any) -> OpenAI:
        more = {"api_key": self.key, **more}
        return OpenAI(base_url=f"{self.url}/v1", **{"max_retries": 0, "timeout": 90, **more})

    def get(self, path: str, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.get(self.url + path, headers={"authorization": f"Bearer {self.key}", **named}, timeout=30)

    def stats(self) -> Any:
        from ray import serve

        return serve.get_app_handle(base_app(BASE)).stats.remote().result(timeout_s=10)

    def pids(self, application: str) -> dict[str, int]:
        """The processes of an application's running replicas, by id."""
        from ray.serve.context import _get_global_client

        details = _get_global_client().get_serve_details()["applications"][application]
        (deployment,) = details["deployments"].values()
        return {r["replica_id"]: r["pid"] for r in deployment["replicas"] if r["state"] == "RUNNING"}

    def pid(self, application: str) -> int:
        """The process of the one running replica of an application."""
        (pid,) = self.pids(application).values()
        return pid


class ray_cluster:
    """A Ray of our own with the applications of `settings`; other clusters of the host are not touched."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._folder = folder
        self._settings = settings
        self._environment = {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            # As `tuneloom up` has it. Ray's own 15 starves its workers beside other tests.
            "RAY_worker_niceness": "0",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
            **PROXY_ENVIRONMENT,
            **modes.environment(settings.gateway, folder, (0, 0)),
        }

    def __enter__(self) -> None:
        # What this process heard of the replicas of an earlier cluster.
        members._members.clear()
        os.environ.update(self._environment)
        import ray
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 << 20,
            log_to_driver=False,
            _temp_dir=str(self._folder),
        )
        deploy = schema(self._settings)
        serve.start(http_options=deploy["http_options"], logging_config=deploy["logging_config"])
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(deploy), _blocking=False)
        # Serve's own wait is a minute, which a busy machine may need for the processes alone.
        eventually(lambda: {app.status for app in serve.status().applications.values()} == {"RUNNING"}, START_TIMEOUT_S)

    def __exit__(self, *error: object) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        for name in self._environment:
            os.environ.pop(name, None)


def eventually(is_true: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until it is; what it raises meanwhile counts as not yet."""
    started = time.monotonic()
    while time.monotonic() - started < timeout_s:
        try:
            if is_true():
                return time.monotonic() - started
        except (openai.APIError, httpx.HTTPError, ValueError, KeyError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s} s")
