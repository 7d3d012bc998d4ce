"""What happens between two steps of a run: metrics, checkpoints, and a look at what is wanted of the job."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from tuneloom.train.checkpoints import Checkpoints
from tuneloom.train.data import Tokens
from tuneloom.train.failure import NotFinite
from tuneloom.train.lora import STATE_ADAPTER, LoraTrainer
from tuneloom.train.plan import Plan
from tuneloom.train.progress import Pulse, Voice
from tuneloom.train.publish import Publisher

# Steps over which the time of a step is averaged for the estimate.
_RECENT = 20


class Steps(TrainerCallback):
    """Follows one trainer through its steps.

    A state is saved at each end of an epoch, every `plan`ned number of steps, every `interval_s` seconds, and when the
    job is paused or the process told to end. `metrics` are those of the last step.
    """

    def __init__(
        self,
        plan: Plan,
        voice: Voice,
        pulse: Pulse,
        checkpoints: Checkpoints,
        publisher: Publisher,
        *,
        every_steps: int | None,
        interval_s: float,
        validation: Tokens | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.metrics: dict[str, float] = {}
        self._plan = plan
        self._voice = voice
        self._pulse = pulse
        self._checkpoints = checkpoints
        self._publisher = publisher
        self._every_steps = every_steps
        self._interval_s = interval_s
        self._validation = validation
        self._clock = clock
        self._trainer: LoraTrainer | None = None
        self._saved_at = clock()
        self._ends: deque[float] = deque(maxlen=_RECENT + 1)
        self._scored: dict[str, float] = {}

    def follow(self, trainer: LoraTrainer) -> None:
        self._trainer = trainer

    @property
    def trainer(self) -> LoraTrainer:
        assert self._trainer is not None, "follow() comes before train()"
        return self._trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved_at = self._clock()
        self._ends.append(self._clock())

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The state can only be saved at the end of a step, but nothing of a cancelled job is kept.
        if self._pulse.intent() == "cancel":
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step
        self._ends.append(self._clock())
        ends_epoch = step % self._plan.steps_per_epoch == 0
        if ends_epoch and self._validation is not None:
            score = self.trainer.score(self._validation, self._plan.micro_size)
            self._scored = {
                "valid_loss": score.loss,
                "valid_mean_token_accuracy": score.accuracy,
                "full_valid_loss": score.loss,
                "full_valid_mean_token_accuracy": score.accuracy,
            }
        intent = self._pulse.intent(fresh=True)
        if intent == "cancel":
            control.should_training_stop = True
        elif intent in ("pause", "stop"):
            control.should_training_stop = True
            control.should_save = True
        elif ends_epoch or self._is_due(step):
            control.should_save = True

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        step, loss = state.global_step, logs["loss"]
        if not math.isfinite(loss) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise NotFinite(
                f"The loss is no number any more at step {step} (learning rate {logs['learning_rate']:.2g}). "
                "Use a smaller `learning_rate_multiplier`."
            )
        self.metrics = {
            "step": float(step),
            "train_loss": loss,
            "train_mean_token_accuracy": logs["mean_token_accuracy"],
            **self._scored,
        }
        self._scored = {}
        self._voice.metrics(
            step,
            self._sentence(step),
            {
                **self.metrics,
                "step": step,
                "total_steps": self._plan.total_steps,
                "learning_rate": logs["learning_rate"],
            },
            stage="training",
            total_steps=self._plan.total_steps,
            trained_tokens=self.trainer.batches.tokens_until(step),
            estimated_finish=self._estimate(step),
        )

    def save(self, trainer: LoraTrainer) -> None:
        """Keep the trainer's state on disk and make its adapter callable."""
        step = trainer.state.global_step
        # First: a run that goes on from this state never tells of the steps before it again.
        self._voice.heartbeat()
        path = self._checkpoints.save(step, trainer.save_state, {"metrics": self.metrics})
        self._publisher.checkpoint(path / STATE_ADAPTER, step, self.metrics, self._plan.rank)
        self._saved_at = self._clock()

    def _is_due(self, step: int) -> bool:
        if self._every_steps and step % self._every_steps == 0:
            return True
        return self._clock() - self._saved_at >= self._interval_s

    def _sentence(self, step: int) -> str:
        parts = [f"training loss={self.metrics['train_loss']:.2f}"]
        if "valid_loss" in self.metrics:
            parts.append(f"validation loss={self.metrics['valid_loss']:.2f}")
            parts.append(f"full validation loss={self.metrics['full_valid_loss']:.2f}")
        return f"Step {step}/{self._plan.total_steps}: {', '.join(parts)}"

    def _estimate(self, step: int) -> float:
        seconds = (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)
        return self._ends[-1] + seconds * (self._plan.total_steps - step)
