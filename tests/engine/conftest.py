"""Engines over tiny models, and what transformers and PEFT make of the same prompts."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tuneloom.domain import AdapterRef
from tuneloom.engine.base import SequenceOutput, SequenceRequest
from tuneloom.engine.core import EngineCore
from tuneloom.engine.options import EngineConfig
from tuneloom.errors import TuneloomError
from tuneloom.generation import SamplingParams

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


def ref_of(folder: Path, rank: int = 16) -> AdapterRef:
    size = (folder / "adapter_model.safetensors").stat().st_size
    sha256 = hashlib.sha256(str(folder).encode()).hexdigest()
    return AdapterRef(sha256=sha256, uri=str(folder), rank=rank, size_bytes=size)


def fetch_local(ref: AdapterRef) -> Path:
    return Path(ref.uri)


def request(
    id: str, prompt: list[int], *, params: SamplingParams = GREEDY, adapter: AdapterRef | None = None, **more: Any
) -> SequenceRequest:
    settings = {"stop_ids": frozenset[int](), "owner": "ada", **more}
    return SequenceRequest(id=id, prompt_ids=tuple(prompt), params=params, adapter=adapter, **settings)


@dataclass
class Harness:
    """Drives a core by hand and collects what it says."""

    core: EngineCore
    outputs: dict[str, list[SequenceOutput]] = field(default_factory=dict)
    errors: dict[str, TuneloomError] = field(default_factory=dict)

    def step(self) -> None:
        for id, event in self.core.step():
            if isinstance(event, TuneloomError):
                self.errors[id] = event
            else:
                self.outputs.setdefault(id, []).append(event)

    def run(self, max_steps: int = 2000) -> None:
        """Step until nothing is left; adapters load meanwhile."""
        import time

        for _ in range(max_steps):
            if not self.core.has_sequences:
                return
            self.step()
            if not self.core.did_run:
                time.sleep(0.002)
        raise AssertionError("the engine did not finish")

    def tokens(self, id: str) -> list[int]:
        return [token.token_id for output in self.outputs.get(id, []) for token in output.tokens]

    def reason(self, id: str) -> str | None:
        return self.outputs[id][-1].finish_reason


OpenCore = Callable[..., Harness]


@pytest.fixture(scope="session")
def tiny_prompts() -> list[list[int]]:
    """30 prompts of 3 to 90 tokens."""
    return [[(7 * i + 13 * j + 3) % 500 + 5 for j in range(3 + (i * 11) % 88)] for i in range(30)]


@pytest.fixture
def open_core(tiny_base: Path) -> Iterator[OpenCore]:
    opened: list[EngineCore] = []

    def open(base: Path = tiny_base, *, fetch: Any = fetch_local, clock: Any = None, **settings: Any) -> Harness:
        config = EngineConfig(**{"dtype": "fp32", "max_sequences": 8, **settings})
        extra = {} if clock is None else {"clock": clock}
        opened.append(EngineCore(base, config, fetch, **extra))
        return Harness(opened[-1])

    yield open
    for core in opened:
        core.close()


@pytest.fixture(scope="session")
def plain_generate() -> Callable[..., list[int]]:
    """Greedy tokens by transformers, with PEFT where there is an adapter; one prompt at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    models: dict[tuple[Path, Path | None], Any] = {}

    def generate(base: Path, prompt: list[int], count: int, adapter: Path | None = None) -> list[int]:
        if (base, adapter) not in models:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
            models[base, adapter] = PeftModel.from_pretrained(model, adapter).eval() if adapter else model
        out = models[base, adapter].generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return out[0, len(prompt) :].tolist()

    return generate
