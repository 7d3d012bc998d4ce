"""TRL's trainer around a base with LoRA, set for CPU and CUDA. Token ids in; no store, no Ray.

A step is one batch of the loader: its rows are cut into micro-batches by their tokens, packed end to end where the base
takes them so, and every loss is divided by the learned tokens of the whole step. So nothing depends on the cuts but
memory and speed.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tuneloom.train.answers import score_answers_only
from tuneloom.train.data import Tokens
from tuneloom.train.layers import speed_up
from tuneloom.train.models import save_adapter
from tuneloom.train.order import Batches, cut_by_tokens
from tuneloom.train.packing import IGNORED, pack, pad, try_packing
from tuneloom.train.plan import Plan, tell
from tuneloom.train.scaling import LossScale
from tuneloom.train.team import ALONE, Team

TRAINER_STATE = "trainer_state.json"
SCALE_FILE = "loss_scale"
# The folder of the adapter inside a saved state. transformers resumes an adapter from a folder of the adapter's name.
STATE_ADAPTER = "default"


@dataclass(frozen=True)
class Score:
    """Mean loss per learned token, the share of tokens that were the likeliest, and other metrics by their names."""

    loss: float
    accuracy: float
    more: dict[str, float] = field(default_factory=dict)


def model_inputs(tokens: Tokens, rows: Sequence[int], *, pad_id: int | None) -> dict[str, Any]:
    """What the model takes for these rows: packed, or filled up with `pad_id` if there is one."""
    found = []
    for row in rows:
        part = slice(tokens.offsets[row], tokens.offsets[row + 1])
        found.append((tokens.ids[part], np.where(tokens.learned[part], tokens.ids[part], IGNORED)))
    return pack(found) if pad_id is None else pad(found, pad_id)


class LoraTrainer(SFTTrainer):
    """TRL's trainer with our order of rows, our checkpoints, faster layers, and the head on answers only.

    `on_save` is called with the trainer where TRL would save; it takes the state by `save_state`. `plan` tells what the
    base has turned out to bear.
    """

    def __init__(
        self,
        model: PeftModel,
        plan: Plan,
        tokens: Tokens,
        batches: Batches,
        *,
        tokenizer: PreTrainedTokenizerBase,
        base_id: str,
        folder: Path,
        use_gpu: bool,
        callbacks: Iterable[TrainerCallback] = (),
        on_save: Callable[["LoraTrainer"], None],
        team: Team = ALONE,
    ) -> None:
        self.batches = batches
        self._team = team
        self._tokens = tokens
        self._base_id = base_id
        self._on_save = on_save
        # Learned tokens of this step that were the likeliest, if that is counted here.
        self._right: int | None = None
        has_own_precision = speed_up(model) and plan.precision != "fp32"
        self._scale = LossScale(plan.precision == "fp16")
        # accelerate knows fp16 on GPUs only, and with a scale of its own.
        self._is_cast = plan.precision == "fp16" and not has_own_precision
        with _without_deprecations():
            super().__init__(
                model=model,
                args=sft_config(plan, folder, use_gpu=use_gpu, autocast=not has_own_precision),
                train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
                processing_class=tokenizer,
                callbacks=list(callbacks),
            )
        self.remove_callback(PrinterCallback)
        self._has_own_head = score_answers_only(model.get_base_model())
        reason = try_packing(model.get_base_model()) if plan.packing else None
        self.plan = plan if reason is None else replace(tell(plan, "packing", False, reason), packing=False)
        self._pad_id = None if self.plan.packing else tokenizer.pad_token_id or 0

    def learn(self, resume_from: Path | None) -> None:
        """Train from the start, or from where `save_state` wrote `resume_from`."""
        if resume_from and (known := resume_from / SCALE_FILE).exists():
            self._scale.value = float(known.read_text())
        with _without_deprecations():
            self.train(resume_from_checkpoint=str(resume_from) if resume_from else None)

    def get_train_dataloader(self) -> DataLoader:
        return _EpochLoader(range(self._tokens.num_rows), batch_sampler=self.batches, collate_fn=self.collate)  # type: ignore[arg-type]

    def collate(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The micro-batches of one step, of those rows that are computed here."""
        parts = self.batches.cut(self._team.part(rows), padded=self._pad_id is not None)
        return [model_inputs(self._tokens, part, pad_id=self._pad_id) for part in parts]

    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a whole step; its loss, that of a mean learned token."""
        model.train()
        learned = sum(int((part["labels"][:, 1:] != IGNORED).sum()) for part in inputs)
        of_step = int(self._team.total(learned))
        if not self._team.leads:
            # Dropout of its own, and the same again in a run that goes on.
            torch.manual_seed(hash((self.plan.seed, self.state.global_step, self._team.rank)))
        total = self._scale.step(
            self.state.global_step, lambda: self._backward(model, inputs, of_step), model.parameters()
        )
        if self._right is not None:
            self._metrics["train"]["mean_token_accuracy"].append(self._right / max(1, learned))
        return total if self._team.size == 1 else self._gather(model, total, self.weigh(inputs, learned))

    def weigh(self, inputs: list[dict[str, Any]], learned: int) -> float:
        """What the metrics of this process count among those of all that share the step."""
        return learned

    def _gather(self, model: Any, loss: Tensor, weight: float) -> Tensor:
        """Gradients, metrics and loss of the step that several processes share."""
        self._team.add_gradients(model.parameters())
        metrics = self._metrics["train"]
        here = {name: float(np.mean(values)) for name, values in metrics.items() if values}
        metrics.update({name: [value] for name, value in self._team.means(here, weight).items()})
        return torch.tensor(self._team.total(loss.item()), device=loss.device)

    def _backward(self, model: Any, inputs: list[dict[str, Any]], learned: int) -> Tensor:
        """Gradients of a whole step, scaled; the loss, which is not."""
        self._right = None
        total = torch.zeros((), device=self.args.device)
        for number, part in enumerate(inputs):
            if number:
                self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
                if self.control.should_training_stop:
                    break
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(part), num_items_in_batch=learned)
            self.accelerator.backward(loss * self._scale.value)
            total += loss.detach()
        return total

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss where the head is TRL's; else the same without its other sums over the vocabulary."""
        if not self._has_own_head:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        output = model(**inputs, use_cache=False, fused_lm_head=True)
        self._right = (self._right or 0) + int(output.is_top1.sum())
        return -output.log_probs.sum() / max(1, num_items_in_batch)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        if self._is_cast:
            stack.enter_context(torch.autocast(self.args.device.type, torch.float16))
        return stack

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The next step; what it learns is counted there."""
        return [step for _, step in zip(range(num_batches), epoch_iterator, strict=False)], None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def save_state(self, folder: Path) -> None:
        """Everything that `train(resume_from_checkpoint=folder)` needs to go on as if nothing had happened."""
        save_adapter(self.model, folder / STATE_ADAPTER, self._base_id)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / TRAINER_STATE))
        (folder / SCALE_FILE).write_text(repr(self._scale.value))

    @torch.no_grad()
    def score(self, tokens: Tokens, micro_size: int, is_wanted: Callable[[], bool] = lambda: True) -> Score | None:
        """How well the model predicts the learned tokens of other rows; changes nothing of the training.

        None if it was not wanted any more before all rows were scored.
        """
        lengths = tokens.lengths
        order = np.argsort(-lengths, kind="stable").tolist()
        room = micro_size * int(lengths.max())
        loss, right, count = 0.0, 0, 0
        was_training = self.model.training
        self.model.eval()
        try:
            for rows in cut_by_tokens(order, lengths, room, padded=self._pad_id is not None):
                if not is_wanted():
                    return None
                inputs = self._prepare_inputs(model_inputs(tokens, rows, pad_id=self._pad_id))
                with self.compute_loss_context_manager():
                    output = self.model_wrapped(**inputs, fused_lm_head=True, use_cache=False)
                loss -= output.log_probs.double().sum().item()
                right += int(output.is_top1.sum())
                count += int(output.label_mask.sum())
        finally:
            self.model.train(was_training)
        return Score(loss / max(count, 1), right / max(count, 1))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._on_save(self)


class EndsTogether(TrainerCallback):
    """The last callback of every process of a team: the leader's end of the run is that of all."""

    def __init__(self, team: Team) -> None:
        self._team = team

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self._team.tell(control.should_training_stop)


class _EpochLoader(DataLoader):
    """Tells its batches which epoch it is; transformers asks the loader itself."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def sft_config(plan: Plan, folder: Path, *, use_gpu: bool, autocast: bool) -> SFTConfig:
    """TRL's settings for the plan; its defaults are for large GPUs and a terminal."""
    return SFTConfig(
        output_dir=str(folder),
        # A step is one item of the loader, whatever is computed at once.
        per_device_train_batch_size=plan.batch_size,
        gradient_accumulation_steps=1,
        num_train_epochs=plan.n_epochs,
        learning_rate=plan.learning_rate,
        # The scheduler that is called `constant` there has no warm-up.
        lr_scheduler_type="constant_with_warmup" if plan.scheduler == "constant" else plan.scheduler,
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        optim="adamw_torch_fused",
        seed=plan.seed,
        bf16=autocast and plan.precision == "bf16",
        use_cpu=not use_gpu,
        gradient_checkpointing=plan.gradient_checkpointing,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        # A loss that is no number must be seen, not averaged away.
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=use_gpu,
    )


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """transformers 5.23 and peft 0.21 warn of their own calls of each other: nothing that anyone here can change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def use_one_process() -> None:
    """Keep accelerate from wrapping the model for a process group of one: it costs copies and brings nothing."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK"):
        os.environ.pop(name, None)
