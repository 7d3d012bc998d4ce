"""TRL's trainer around a base with LoRA, set for CPU and CUDA. Token ids in; no rows, no store, no Ray."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tuneloom.train.answers import score_answers_only
from tuneloom.train.data import Tokens
from tuneloom.train.models import save_adapter
from tuneloom.train.order import Batches
from tuneloom.train.plan import Plan

IGNORED = -100
TRAINER_STATE = "trainer_state.json"
# The folder of the adapter inside a saved state. transformers resumes an adapter from a folder of the adapter's name.
STATE_ADAPTER = "default"


@dataclass(frozen=True)
class Score:
    """Mean loss per learned token, and the share of tokens that were the likeliest."""

    loss: float
    accuracy: float


def as_dataset(tokens: Tokens) -> Dataset:
    """The columns `input_ids` and `labels`, over the arrays of `tokens`."""
    import pyarrow as pa

    labels = np.where(tokens.learned, tokens.ids, IGNORED).astype(np.int32)
    offsets = pa.array(tokens.offsets.astype(np.int64))
    columns = {
        name: pa.LargeListArray.from_arrays(offsets, pa.array(values))
        for name, values in (("input_ids", tokens.ids), ("labels", labels))
    }
    return Dataset(pa.table(columns))


class LoraTrainer(SFTTrainer):
    """TRL's trainer with our order of rows, our checkpoints, and the head on answers only.

    `on_save` is called with the trainer where TRL would save; it takes the state by `save_state`.
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
    ) -> None:
        self.batches = batches
        self._base_id = base_id
        self._on_save = on_save
        with _without_deprecations():
            super().__init__(
                model=model,
                args=sft_config(plan, folder, use_gpu=use_gpu),
                train_dataset=as_dataset(tokens),
                processing_class=tokenizer,
                callbacks=list(callbacks),
            )
        self.remove_callback(PrinterCallback)
        score_answers_only(model.get_base_model())

    def learn(self, resume_from: Path | None) -> None:
        """Train from the start, or from where `save_state` wrote `resume_from`."""
        with _without_deprecations():
            self.train(resume_from_checkpoint=str(resume_from) if resume_from else None)

    def get_train_dataloader(self) -> DataLoader:
        return _EpochLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)

    def save_state(self, folder: Path) -> None:
        """Everything that `train(resume_from_checkpoint=folder)` needs to go on as if nothing had happened."""
        save_adapter(self.model, folder / STATE_ADAPTER, self._base_id)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / TRAINER_STATE))

    @torch.no_grad()
    def score(self, tokens: Tokens, micro_size: int) -> Score:
        """How well the model predicts the learned tokens of other rows; changes nothing of the training."""
        data, collate = as_dataset(tokens), self.data_collator
        order = np.argsort(tokens.lengths, kind="stable")
        loss, right, count = 0.0, 0, 0
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), micro_size):
                rows = [data[int(row)] for row in order[start : start + micro_size]]
                inputs = self._prepare_inputs(collate(rows))
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


class _EpochLoader(DataLoader):
    """Tells its batches which epoch it is; transformers asks the loader itself."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def sft_config(plan: Plan, folder: Path, *, use_gpu: bool) -> SFTConfig:
    """TRL's settings for the plan; its defaults are for large GPUs and a terminal."""
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=plan.micro_size,
        gradient_accumulation_steps=plan.accumulation_steps,
        num_train_epochs=plan.n_epochs,
        learning_rate=plan.learning_rate,
        # The scheduler that is called `constant` there has no warm-up.
        lr_scheduler_type="constant_with_warmup" if plan.scheduler == "constant" else plan.scheduler,
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        optim="adamw_torch_fused",
        seed=plan.seed,
        bf16=plan.precision == "bf16",
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
