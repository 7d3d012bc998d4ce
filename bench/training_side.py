"""One training run in a process of its own, as our trainer or TRL's: `python -m bench.training_side JSON`.

The last line of stdout is a JSON object: losses and times of the steps, tokens, peak memory. Both sides get the same
rows as token ids, the same rate, rank and number of tokens a step; what each does with them is its own affair.
"""

import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import TrainerCallback

RANK = 16
LEARNING_RATE = 5e-4


@dataclass(frozen=True)
class Run:
    """`base` and `tokenizer` are folders, `rows` a file of `tuneloom.train.data.save_tokens`."""

    side: Literal["ours", "trl", "trl without checkpointing"]
    base: str
    tokenizer: str
    rows: str
    tokens_per_step: int
    dtype: str
    seed: int
    threads: int
    clock: str

    def as_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Outcome:
    """`seconds` and `tokens` are those of all steps but the first; `tokens` without padding."""

    losses: list[float]
    seconds: float
    tokens: int
    memory_bytes: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Log(TrainerCallback):
    """When each step ends, what it lost, and how many tokens it and those before it had, by `count`."""

    def __init__(self, clock: str, count: Callable[[int], int] | None = None) -> None:
        self._now = getattr(time, clock)
        self._count = count
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(self._now())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            self.tokens.append(self._count(state.global_step) if self._count else int(logs["num_tokens"]))

    def outcome(self) -> Outcome:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Outcome(self.losses, self.ends[-1] - self.ends[0], self.tokens[-1] - self.tokens[0], memory)


def train_ours(run: Run) -> Outcome:
    """As a job trains: the plan, the loading and the trainer of `tuneloom.train`, without store and checkpoints."""
    from tuneloom.bases import Base
    from tuneloom.domain import Hyperparameters, JobSpec, TrainOptions
    from tuneloom.train.data import Tokens, read_tokens
    from tuneloom.train.lora import Batches, LoraTrainer
    from tuneloom.train.models import add_lora, load_base, load_tokenizer
    from tuneloom.train.plan import make_plan

    tokens = read_tokens(Path(run.rows))
    assert isinstance(tokens, Tokens)
    vocabulary = json.loads((Path(run.base) / "config.json").read_text())["vocab_size"]
    base = Base("bench/base", Path(run.base), "0" * 64, 8192, vocabulary, 1 << 28)
    spec = JobSpec(
        base=base.id,
        training_file="file-rows",
        seed=run.seed,
        hyperparameters=Hyperparameters(
            n_epochs=1, batch_size=max(1, round(run.tokens_per_step / float(np.mean(tokens.lengths))))
        ),
        options=TrainOptions(rank=RANK, learning_rate=LEARNING_RATE, warmup_steps=0, precision=run.dtype),
    )
    plan = make_plan(spec, tokens, base, has_bf16=run.dtype == "bf16")
    batches = Batches(tokens.lengths, plan.batch_size, plan.micro_size, plan.seed)
    log = Log(run.clock, batches.tokens_until)
    with tempfile.TemporaryDirectory() as folder:
        trainer = LoraTrainer(
            add_lora(load_base(base, plan, use_gpu=False), plan),
            plan,
            tokens,
            batches,
            tokenizer=load_tokenizer(Base("bench/tokenizer", Path(run.tokenizer), "0" * 64, 8192, vocabulary, 1 << 28)),
            base_id=base.id,
            folder=Path(folder),
            use_gpu=False,
            callbacks=[log],
            on_save=lambda _: None,
        )
        trainer.learn(None)
    return log.outcome()


def main(arguments: list[str]) -> None:
    run = Run(**json.loads(arguments[0]))
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(run.threads)
    if run.side == "ours":
        outcome = train_ours(run)
    else:
        from bench.trl_side import train_by_trl

        outcome = train_by_trl(run)
    print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
