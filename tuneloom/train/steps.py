"""What happens between two steps of a run: metrics, evaluations, checkpoints, a look at what is wanted of the job."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState

from tuneloom.store.peft_folder import WEIGHTS_FILE
from tuneloom.train import meter
from tuneloom.train.best import BestAdapter
from tuneloom.train.checkpoints import Checkpoints, SavedState
from tuneloom.train.data import Tokens
from tuneloom.train.deaths import Deaths
from tuneloom.train.evaluations import Evaluation, Evaluations
from tuneloom.train.failure import NotFinite
from tuneloom.train.lora import STATE_ADAPTER, LoraTrainer
from tuneloom.train.models import save_adapter
from tuneloom.train.pace import Pace
from tuneloom.train.plan import Plan
from tuneloom.train.progress import Pulse, Voice
from tuneloom.train.publish import Publisher


@dataclass(frozen=True)
class Places:
    """Where a run keeps what it has reached."""

    checkpoints: Checkpoints
    best: BestAdapter
    publisher: Publisher
    deaths: Deaths


class Steps(TrainerCallback):
    """Follows one trainer through its steps.

    A state is saved at each end of an epoch, every `plan`ned number of steps, every `interval_s` seconds, and when the
    job is paused or the process told to end. `metrics` are those of the last step. `clock` gives Unix seconds.
    """

    def __init__(
        self,
        plan: Plan,
        voice: Voice,
        pulse: Pulse,
        places: Places,
        *,
        base_id: str,
        interval_s: float,
        validation: Tokens | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.metrics: dict[str, float] = {}
        self.evaluations = Evaluations(plan.early_stopping_patience, plan.early_stopping_min_delta)
        self._best_metrics: dict[str, float] = {}
        self._plan = plan
        self._voice = voice
        self._pulse = pulse
        self._places = places
        self._base_id = base_id
        self._interval_s = interval_s
        self._validation = validation
        self._clock = clock
        self._trainer: LoraTrainer | None = None
        self._saved_at = clock()
        self._pace = Pace()
        self._scored: dict[str, float] = {}
        self._is_cut_off = False
        # What the step logged whose evaluation was cut off.
        self._unscored: dict[str, float] | None = None

    def follow(self, trainer: LoraTrainer) -> None:
        self._trainer = trainer

    def go_on_from(self, state: SavedState | None) -> bool:
        """Know what was known when `state` was saved, and make its adapter callable.

        An evaluation that the end of the process cut off is made up for; False if this one is cut off too.
        """
        self._places.best.restore(state.path if state else None)
        if state is None:
            return True
        self.metrics = state.facts["metrics"]
        self._best_metrics = state.facts["best_metrics"]
        self.evaluations.restore(state.facts["evaluations"])
        adapter = state.path / STATE_ADAPTER
        if (logs := state.facts.get("unscored")) is not None:
            set_peft_model_state_dict(self.trainer.model, load_file(adapter / WEIGHTS_FILE))
            if not self._evaluate(state.step):
                return False
            self._pace.start(self._clock(), state.step, self.trainer.batches.tokens_until(state.step))
            self._tell(state.step, logs)
        self._places.publisher.checkpoint(adapter, state.step, self.metrics, self._plan.rank)
        return True

    def last_step(self, state: SavedState | None) -> int:
        """The step at which training is over. Where that is before the last of the plan, it is told."""
        step = max(self.trainer.state.global_step, state.step if state else 0)
        assert step == self._plan.total_steps or self.evaluations.is_over, "training ends early for no reason"
        if step < self._plan.total_steps:
            best = self.evaluations.best
            assert best is not None, "no run stops early without an evaluation"
            self._voice.say(
                f"Training stops early at step {step}: {self.evaluations.patience} evaluations in a row brought no "
                f"lower validation loss; the adapter of step {best.step} is kept (validation loss {best.loss:.2f})"
            )
        return step

    def take_best(self) -> dict[str, float]:
        """Give the model the adapter that is handed over, and return its metrics.

        That is the one of the last step, or where the run may stop early, the one with the least validation loss.
        """
        folder = self._places.best.folder
        if self.evaluations.patience is None or not folder.exists():
            return self.metrics
        set_peft_model_state_dict(self.trainer.model, load_file(folder / WEIGHTS_FILE))
        return self._best_metrics

    @property
    def trainer(self) -> LoraTrainer:
        assert self._trainer is not None, "follow() comes before train()"
        return self._trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved_at = self._clock()
        self._pace.start(self._clock(), state.global_step, self.trainer.batches.tokens_until(state.global_step))

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The state can only be saved at the end of a step, but nothing of a cancelled job is kept.
        if self._pulse.intent() == "cancel":
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step
        self._pace.step(self._clock(), step, self.trainer.batches.tokens_until(step))
        ends_epoch = step % self._plan.steps_per_epoch == 0
        intent, is_scored = self._pulse.intent(fresh=True), not self._is_evaluated(step)
        while intent == "run" and not is_scored:
            is_scored = self._evaluate(step)
            intent = self._pulse.intent(fresh=True)
        self._is_cut_off = not is_scored
        if intent == "cancel":
            control.should_training_stop = True
        elif intent in ("pause", "stop") or self.evaluations.is_over:
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
            raise self._not_finite("loss", step, logs["learning_rate"])
        if self._is_cut_off:
            # The next process evaluates first, and then tells of this step.
            self._unscored = logs
        else:
            self._tell(step, logs)

    def _tell(self, step: int, logs: dict[str, float]) -> None:
        """Report a step with what was logged of it."""
        self._unscored = None
        self.metrics = {
            "step": float(step),
            "train_loss": logs["loss"],
            "train_mean_token_accuracy": logs["mean_token_accuracy"],
            **{name: value for name, value in logs.items() if name.startswith("train_reward_")},
            **self._scored,
        }
        best = self.evaluations.best
        if best is not None and best.step == step:
            self._best_metrics = self.metrics
        self._scored = {}
        finish_at = self._pace.finish_at(self._plan.total_steps)
        self._voice.metrics(
            step,
            self._sentence(step),
            {
                **self.metrics,
                "step": step,
                "total_steps": self._plan.total_steps,
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs["grad_norm"],
                "tokens_per_second": round(self._pace.tokens_per_second, 1),
                "memory_bytes": meter.memory_bytes(),
                "estimated_finish": int(finish_at),
            },
            stage="training",
            total_steps=self._plan.total_steps,
            trained_tokens=self.trainer.batches.tokens_until(step),
            estimated_finish=finish_at,
        )

    def save(self, trainer: LoraTrainer) -> None:
        """Keep the trainer's state on disk and make its adapter callable."""
        step = trainer.state.global_step
        # First: a run that goes on from this state never tells of the steps before it again.
        self._voice.heartbeat()

        def write(folder: Path) -> None:
            trainer.save_state(folder)
            self._places.best.copy_into(folder)

        facts = {
            "metrics": self.metrics,
            "best_metrics": self._best_metrics,
            "evaluations": self.evaluations.facts(),
            "micro_size": self._plan.micro_size,
            "unscored": self._unscored,
        }
        path = self._places.checkpoints.save(step, write, facts)
        self._places.deaths.saved()
        if self._unscored is None:
            self._places.publisher.checkpoint(path / STATE_ADAPTER, step, self.metrics, self._plan.rank)
        self._saved_at = self._clock()

    def _is_evaluated(self, step: int) -> bool:
        if self._validation is None:
            return False
        every = self._plan.evaluate_every_steps or self._plan.steps_per_epoch
        return step % every == 0 or step == self._plan.total_steps

    def _evaluate(self, step: int) -> bool:
        """Score the validation rows; False if something else is wanted of the job before all are."""
        assert self._validation is not None, "there are rows to evaluate on"
        score = self.trainer.score(self._validation, self._plan.micro_size, lambda: self._pulse.intent() == "run")
        if score is None:
            return False
        if not math.isfinite(score.loss):
            raise self._not_finite("validation loss", step, self._plan.learning_rate)
        self._scored = {
            "valid_loss": score.loss,
            "valid_mean_token_accuracy": score.accuracy,
            "full_valid_loss": score.loss,
            "full_valid_mean_token_accuracy": score.accuracy,
            **score.more,
        }
        is_best = self.evaluations.add(Evaluation(step, score.loss, score.accuracy))
        if is_best and self.evaluations.patience is not None:
            self._places.best.keep(lambda folder: save_adapter(self.trainer.model, folder, self._base_id))
        return True

    def _not_finite(self, what: str, step: int, learning_rate: float) -> NotFinite:
        wider = ", or `bf16` or `fp32` as `tuneloom.precision`" if self._plan.precision == "fp16" else ""
        return NotFinite(
            f"The {what} is no number any more at step {step} (learning rate {learning_rate:.2g}). "
            f"Use a smaller `learning_rate_multiplier`{wider}."
        )

    def _is_due(self, step: int) -> bool:
        every = self._plan.checkpoint_every_steps
        return bool(every and step % every == 0) or self._clock() - self._saved_at >= self._interval_s

    def _sentence(self, step: int) -> str:
        parts = [f"training loss={self.metrics['train_loss']:.2f}"]
        if "valid_loss" in self.metrics:
            parts.append(f"validation loss={self.metrics['valid_loss']:.2f}")
            parts.append(f"full validation loss={self.metrics['full_valid_loss']:.2f}")
        return f"Step {step}/{self._plan.total_steps}: {', '.join(parts)}"
