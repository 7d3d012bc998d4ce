"""Weights & Biases: each step's metrics and the settings of a run go to the projects that the job names.

The service is beside the point of a job: it is called from a thread of its own, what it cannot take in time is dropped,
and its first failure is told once and ends it. The key comes from the environment of the trainer.
"""

import importlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from tuneloom.domain import Job, WandbIntegration
from tuneloom.train.plan import Plan
from tuneloom.train.progress import Voice

logger = logging.getLogger(__name__)

# How long the end of a run waits for what has not been sent.
FINISH_TIMEOUT_S = 20.0
MAX_PENDING = 10_000
# An operator's own values stay. Nothing of the trainer's output, code or repository leaves the machine.
ENVIRONMENT = {
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
}


def wandb_callbacks(
    job: Job, plan: Plan, voice: Voice, folder: Path, home: Path, metrics: Callable[[], dict[str, float]]
) -> list["WandbCallback"]:
    """One for each project that the job names. They come after the callback that makes `metrics` of a step.

    Files are in `folder`, which goes with the run; offline, where they are all there is, below `home`.
    """
    is_offline = os.environ.get("WANDB_MODE") == "offline"
    folder = Path(os.environ.get("WANDB_DIR") or (home if is_offline else folder))
    config = {"job": job.id, "base": job.spec.base, "method": plan.method}
    config |= {setting.name: setting.value for setting in plan.settings}
    # Without it a second run of the process would take the place of the first.
    several: dict[str, Any] = {"reinit": "create_new"} if len(job.spec.wandb) > 1 else {}
    return [
        WandbCallback(target, f"{job.id}-{number}", voice, folder, metrics, config=config, **several)
        for number, target in enumerate(job.spec.wandb)
    ]


class WandbCallback(TrainerCallback):
    """Logs one run to one project. `run_id` is the same in all attempts of a job, so that they make one run there."""

    def __init__(
        self,
        target: WandbIntegration,
        run_id: str,
        voice: Voice,
        folder: Path,
        metrics: Callable[[], dict[str, float]],
        **settings: Any,
    ) -> None:
        self._target = target
        self._voice = voice
        self._folder = folder
        self._metrics = metrics
        self._init = {
            "project": target.project,
            "name": target.name,
            "entity": target.entity,
            "tags": list(target.tags),
            "id": run_id,
            "resume": "allow",
            "dir": str(folder),
            **settings,
        }
        self._pending: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MAX_PENDING)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"wandb {run_id}", daemon=True)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._thread.start()

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if self._metrics().get("step") != state.global_step:
            # Its evaluation was cut off, and what it learned is told by the next process.
            return
        more = {name: logs[name] for name in ("learning_rate", "grad_norm") if name in logs}
        self._put((state.global_step, {**self._metrics(), **more}))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._put(None)
        if not self._is_over.is_set():
            self._thread.join(FINISH_TIMEOUT_S)
            if self._thread.is_alive():
                self._give_up(f"it did not take the last metrics in {FINISH_TIMEOUT_S:.0f} s")
        self._is_over.set()

    def _put(self, item: tuple[int, dict[str, float]] | None) -> None:
        if self._is_over.is_set():
            return
        try:
            self._pending.put_nowait(item)
        except queue.Full:
            self._give_up("it takes metrics more slowly than steps come")

    def _run(self) -> None:
        try:
            for name, value in ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            self._folder.mkdir(parents=True, exist_ok=True)
            run = importlib.import_module("wandb").init(**self._init)
            while (item := self._pending.get()) is not None and not self._is_over.is_set():
                step, metrics = item
                run.log(metrics, step=step)
            run.finish()
        except Exception as error:
            # Whatever that package raises, here or in its own network code, must not reach the training.
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        if self._is_over.is_set():
            return
        self._is_over.set()
        if key := os.environ.get("WANDB_API_KEY"):
            reason = reason.replace(key, "***")
        logger.warning("wandb failed: %s", reason)
        try:
            self._voice.say(
                f"Metrics go to the Weights & Biases project `{self._target.project}` no more ({reason[:200]}). "
                "The job goes on; its metrics are in its events.",
                level="warn",
            )
        except Exception:
            # A replaced attempt says nothing; a store that fails shows where the job needs it.
            logger.warning("that could not be told", exc_info=True)
