"""20,000 requests of all sizes with random aborts, deadlines, adapters and sampling: nothing may be left behind.

Runs on a base of any size; the default is a tiny random one, on which the number of requests counts and not their
tokens. Every broken request must end in an answer or a named error, and afterwards no sequence, no place in the cache
and no use of an adapter may be left. The process may not grow by more than `--growth` MB after the first quarter.
"""

import asyncio
import itertools
import random
import sys
from collections import Counter
from contextlib import aclosing
from pathlib import Path

import psutil

from bench.inputs import Setup, adapters, fetch, open_setup, parser
from bench.machine import ForeignLoad, describe, enter_environment
from bench.report import Report
from tuneloom.domain import AdapterRef
from tuneloom.engine.base import SequenceRequest
from tuneloom.engine.engine import LocalEngine
from tuneloom.engine.options import EngineConfig
from tuneloom.errors import Overloaded, TuneloomError
from tuneloom.generation import SamplingParams

_OWNERS = ("ada", "bob", "cyd", "dan")


def tiny_base(folder: Path) -> Path:
    """A random two-layer Llama in fp32, without a tokenizer."""
    if not (folder / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Traffic:
    """Random requests against one engine, a bounded number at once; `outcomes` counts how each ended."""

    def __init__(self, engine: LocalEngine, refs: list[AdapterRef], *, at_once: int, seed: int = 0) -> None:
        self._engine, self._refs, self._at_once = engine, refs, at_once
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self.outcomes: Counter[str] = Counter()

    async def send(self, count: int) -> None:
        numbers = iter(range(count))

        async def stream() -> None:
            for _ in numbers:
                await self._one()

        await asyncio.gather(*(stream() for _ in range(self._at_once)))

    async def _one(self) -> None:
        request = self._draw()
        give_up_after = self._random.choice((None, None, None, 0, 1, 3, 8))
        is_aborted = self._random.random() < 0.1
        wait_s = self._random.random() * 0.02
        reader = asyncio.create_task(self._read(request, give_up_after))
        if is_aborted:
            await asyncio.sleep(wait_s)
            # Either end of a generation may break it.
            if self._random.random() < 0.5:
                await self._engine.abort(request.id)
            else:
                reader.cancel()
        try:
            self.outcomes[await reader] += 1
        except asyncio.CancelledError:
            self.outcomes["cancelled"] += 1
        except Overloaded as error:
            self.outcomes[error.code or "overloaded"] += 1
        except TuneloomError as error:
            if error.code != "aborted":
                raise
            self.outcomes["aborted"] += 1

    async def _read(self, request: SequenceRequest, give_up_after: int | None) -> str:
        num_tokens = 0
        async with aclosing(self._engine.generate(request)) as outputs:
            async for output in outputs:
                num_tokens += len(output.tokens)
                if output.finish_reason is not None:
                    return output.finish_reason
                if give_up_after is not None and num_tokens >= give_up_after:
                    return "closed"
        raise AssertionError("a generation ended without a reason")

    def _draw(self) -> SequenceRequest:
        draw = self._random
        params = SamplingParams(
            max_tokens=draw.choice((1, 2, 5, 12, 30)),
            temperature=draw.choice((0.0, 0.7, 1.5)),
            top_p=draw.choice((1.0, 0.8)),
            top_k=draw.choice((0, 0, 5)),
            min_p=draw.choice((0.0, 0.1)),
            presence_penalty=draw.choice((0.0, 0.5)),
            repetition_penalty=draw.choice((1.0, 1.2)),
            logit_bias=draw.choice(({}, {7: -100.0})),
            seed=draw.choice((None, 1)),
            logprobs=draw.choice((None, None, 3)),
        )
        shared = [11] * draw.choice((0, 0, 40))
        return SequenceRequest(
            id=f"s{next(self._numbers)}",
            prompt_ids=(*shared, *(draw.randrange(5, 500) for _ in range(draw.choice((1, 4, 20, 60, 200))))),
            params=params,
            stop_ids=draw.choice((frozenset[int](), frozenset(range(50)))),
            owner=draw.choice(_OWNERS),
            adapter=draw.choice([None, *self._refs]),
            deadline_s=draw.choice((60.0,) * 9 + (0.05,)),
            priority=draw.choice((0, 0, 1)),
        )


async def leftovers(engine: LocalEngine, timeout_s: float = 30.0) -> dict[str, int]:
    """What the engine still holds once it has had time to end; all zero if nothing leaks. Evicts every adapter."""
    async with asyncio.timeout(timeout_s):
        while engine.stats().running or engine.stats().waiting:  # noqa: ASYNC110 - the engine has no event for it
            await asyncio.sleep(0.01)
    in_use = sum(state.in_use for state in engine.adapters())
    for state in engine.adapters():
        await engine.evict_adapter(state.sha256)
    # An adapter that something still waits for or uses would stay.
    stats = engine.stats()
    return {
        "running": stats.running,
        "waiting": stats.waiting,
        "waiting tokens": stats.waiting_tokens,
        "cache tokens in use": stats.kv_tokens_used,
        "adapters in use": in_use,
        "adapters after eviction": len(engine.adapters()),
    }


def rss_mb() -> float:
    return psutil.Process().memory_info().rss / 2**20


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=20_000)
    options.add_argument("--growth", type=float, default=64.0, help="MB that the process may grow after a quarter")
    parsed = options.parse_args(arguments)
    if parsed.base is None:
        parsed.base, parsed.dtype = tiny_base((parsed.data or parsed.home / "bench").absolute() / "tiny-base"), "fp32"
    setup = open_setup(parsed)
    count = 200 if setup.is_quick else parsed.requests
    report = Report("soak", describe(setup.threads), {"base": setup.base.name, "requests": count})
    with ForeignLoad() as load:
        sizes, left, outcomes = asyncio.run(_soak(setup, count))
    report.foreign_share = load.share
    report.add("resident size, after each quarter", "MB", sizes)
    for name, value in left.items():
        report.ratio(f"left behind: {name}", value, 0, is_limit=True)
    report.ratio("growth after the first quarter", sizes[-1] - sizes[0], parsed.growth, is_limit=True, unit=" MB")
    report.notes.append(f"ends: {dict(outcomes)}")
    report.finish(setup.json_path)
    return report


async def _soak(setup: Setup, count: int) -> tuple[list[float], dict[str, int], Counter[str]]:
    """Sizes of the process after each quarter, what is left, and how the requests ended."""
    # Fewer slots than adapters and a small host tier, so that all of them are moved and dropped all the time.
    config = EngineConfig(
        dtype=setup.dtype,
        threads=setup.threads,
        max_sequences=8,
        max_step_tokens=64,
        adapter_slots=3,
        host_cache_bytes=1 << 20,
        prefix_cache_bytes=4 << 20,
    )
    engine = LocalEngine(setup.base, config, fetch)
    await engine.start()
    try:
        traffic = Traffic(engine, adapters(setup, 6), at_once=24)
        sizes = []
        for _ in range(4):
            await traffic.send(count // 4)
            sizes.append(rss_mb())
        return sizes, await leftovers(engine), traffic.outcomes
    finally:
        await engine.close()


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
