"""The other side of `training`: TRL's SFTTrainer with PEFT, as TRL's documentation has it for LoRA.

A path as the model, `SFTConfig` as it comes (autocast to bf16, gradient checkpointing), packing, loss on completions
only. One packed row of `max_length`, the default 1,024, is a step: with the default of eight, its mask over 8,192
tokens would be most of the work on a CPU.
"""

import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bench.training_side import LEARNING_RATE, RANK, Log, Outcome, Run
from tuneloom.train.data import Tokens, read_tokens


def train_by_trl(run: Run) -> Outcome:
    log = Log(run.clock)
    more: dict[str, Any] = {} if run.side == "trl" else {"gradient_checkpointing": False}
    if run.side != "trl" and run.dtype == "bf16":
        more["model_init_kwargs"] = {"dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=run.base,
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=1,
                max_length=run.tokens_per_step,
                packing=True,
                completion_only_loss=True,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                bf16=run.dtype == "bf16",
                use_cpu=True,
                seed=run.seed,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **more,
            ),
            train_dataset=_dataset(read_tokens(Path(run.rows))),
            processing_class=AutoTokenizer.from_pretrained(run.tokenizer),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[log],
        )
        trainer.train()
    return log.outcome()


def _dataset(tokens: Any) -> Dataset:
    """Rows with the columns that TRL makes of prompts and completions."""
    assert isinstance(tokens, Tokens)
    parts = [slice(start, end) for start, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]
    return Dataset.from_dict(
        {
            "input_ids": [tokens.ids[part].tolist() for part in parts],
            "completion_mask": [tokens.learned[part].astype(int).tolist() for part in parts],
        }
    )
