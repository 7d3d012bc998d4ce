"""What is measured on: the options that all scripts share, the base, random adapters made by PEFT, random prompts."""

import argparse
import hashlib
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.machine import use_threads
from tuneloom.bases import fetch_default, get_base
from tuneloom.config import DEFAULT_BASE
from tuneloom.domain import AdapterRef
from tuneloom.errors import ModelNotFound

RANK = 16
_FACTOR_STD = 0.02
_seeds = itertools.count(1 << 20)


@dataclass(frozen=True)
class Setup:
    """One run's options. `data` is a folder for adapters and stores, kept for the next run; `now` the clock, in s."""

    base: Path
    data: Path
    threads: int
    repetitions: int
    is_quick: bool
    dtype: str
    json_path: Path | None
    now: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Work:
    """`requests` at once, each of `prompt` tokens and answered with `new` ones."""

    requests: int = 32
    prompt: int = 64
    new: int = 64

    @classmethod
    def of(cls, setup: Setup) -> "Work":
        return cls(4, 12, 6) if setup.is_quick else cls()

    @property
    def answered_tokens(self) -> int:
        return self.requests * self.new


def parser(description: str | None, *, repetitions: int = 5) -> argparse.ArgumentParser:
    """The options that every script takes; `open_setup` reads them."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--home", type=Path, default=Path(os.environ.get("TUNELOOM_HOME") or ".tuneloom"))
    options.add_argument("--base", type=Path, help="a folder with another base than the default one of the home")
    options.add_argument("--random", action="store_true", help="random weights in the default base's shape")
    options.add_argument("--data", type=Path, help="where adapters are kept; by default `bench` in the home")
    options.add_argument("--threads", type=int, default=0, help="0: the cores less one, at least one")
    options.add_argument("--reps", type=int, default=repetitions)
    options.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    options.add_argument(
        "--cpu-clock", action="store_true", help="count processor time instead: for a busy machine, with one thread"
    )
    options.add_argument("--quick", action="store_true", help="tiny sizes: to see that the script works")
    options.add_argument("--json", type=Path, help="also write the result there")
    return options


def open_setup(options: argparse.Namespace) -> Setup:
    """Fix the threads and find the base; the default one is fetched the first time."""
    threads = use_threads(options.threads)
    home = options.home.absolute()
    data = (options.data or home / "bench").absolute()
    data.mkdir(parents=True, exist_ok=True)
    base = options.base or (random_base(data / "random-base") if options.random else _default_base(home))
    repetitions = 1 if options.quick else options.reps
    now = time.process_time if options.cpu_clock else time.perf_counter
    return Setup(base.absolute(), data, threads, repetitions, options.quick, options.dtype, options.json, now)


def random_base(folder: Path) -> Path:
    """A checkpoint in the shape of SmolLM2-135M with random bf16 weights and no tokenizer."""
    if not (folder / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rope_theta=100000.0,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def adapters(setup: Setup, count: int) -> list[AdapterRef]:
    """`count` rank-16 adapters on all linear layers of the base; `uri` is the local folder of each."""
    root = setup.data / f"adapters-{_name_of(setup.base)}"
    folders = [root / f"a{i:04d}" for i in range(count)]
    missing = [(i, folder) for i, folder in enumerate(folders) if not (folder / "adapter_config.json").exists()]
    if missing:
        with adapter_maker(setup.base) as make:
            for i, folder in missing:
                make(folder, i)
    return [_ref(folder) for folder in folders]


def fetch(ref: AdapterRef) -> Path:
    """For engines without a blob store behind them."""
    return Path(ref.uri)


@contextmanager
def adapter_maker(base: Path) -> Iterator["_Maker"]:
    """Makes adapters one after another from a single model in memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    yield _Maker(get_peft_model(model, config))


class _Maker:
    def __init__(self, model) -> None:  # type: ignore[no-untyped-def]
        self._model = model

    def __call__(self, folder: Path, seed: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self._model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0.0, _FACTOR_STD, generator=generator)
        self._model.save_pretrained(folder)
        # PEFT writes the folder of the base; two machines must get the same bytes.
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": DEFAULT_BASE}))


def prompts(base: Path, count: int, length: int, *, seed: int | None = None) -> list[list[int]]:
    """Random token ids, none of them special; without a seed new ones at each call, so that no cache knows them."""
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    numbers = random.Random(next(_seeds) if seed is None else seed)
    return [[numbers.randrange(20, vocabulary) for _ in range(length)] for _ in range(count)]


def scratch(setup: Setup) -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(dir=setup.data, prefix="run-")


def _default_base(home: Path) -> Path:
    try:
        return get_base(home / "bases", DEFAULT_BASE).path
    except ModelNotFound:
        return fetch_default(home / "bases", print).path


def _name_of(base: Path) -> str:
    return f"{base.name}-{hashlib.sha256((base / 'config.json').read_bytes()).hexdigest()[:8]}"


def _ref(folder: Path) -> AdapterRef:
    weights = folder / "adapter_model.safetensors"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return AdapterRef(sha256=digest, uri=str(folder), rank=RANK, size_bytes=weights.stat().st_size)
