"""Work W: 32 requests at once, 64 prompt and 64 new tokens, greedy. Ours with and without adapters, PEFT one at a time.

PEFT answers `--peft-requests` of the requests, one after another; its time for all 32 is extrapolated from those,
which its lack of batching makes exact but for noise.

Two ceilings stand beside W. One is that of multiplications alone. The other also counts what each step reads: all
weights and adapters once, keys and values of all rows; where a CPU has matrix units, 32 rows are multiplied in less
time than their weights take to come from memory. Weights that stay in the CPU's cache may come faster than that.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import ceilings
from bench.anatomy import Anatomy
from bench.inputs import RANK, Setup, Work, adapters, open_setup, parser, prompts
from bench.machine import ForeignLoad, describe, enter_environment
from bench.ours import Ours, open_engine, requests
from bench.report import Report, interleave
from tuneloom.domain import AdapterRef
from tuneloom.engine.options import EngineConfig

NUM_ADAPTERS = 8
OURS, OURS_BASE, OURS_LONE = "ours, 8 adapters", "ours, no adapters", "ours, one stream"
PEFT = "transformers + PEFT, one at a time"
CEILING = "GEMM ceiling"
STEP_TOKENS = EngineConfig().max_step_tokens


@dataclass(frozen=True)
class Shape:
    """Numbers of a dense base: weights of the `body` that every token meets, those of the `head`, those of one adapter
    of rank `RANK` on all linears; of one token, those of its keys and values, and multiplications with one it sees.
    """

    body: int
    head: int
    adapter: int
    kv: int
    seen_flops: int

    @classmethod
    def of(cls, base: Path) -> "Shape":
        config = json.loads((base / "config.json").read_text())
        width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        inner, head_width = config["intermediate_size"], config.get("head_dim") or width // heads
        query, group = heads * head_width, config["num_key_value_heads"] * head_width
        linears = [(width, query), (width, group), (width, group), (query, width)]
        linears += [(width, inner), (width, inner), (inner, width)]
        return cls(
            body=layers * sum(inputs * outputs for inputs, outputs in linears),
            head=config["vocab_size"] * width,
            adapter=layers * RANK * sum(map(sum, linears)),
            kv=2 * layers * group,
            seen_flops=4 * query * layers,
        )


def work_flops(base: Path, work: Work) -> float:
    """Floating point operations that W needs without adapters: linears, head where a token is sampled, attention."""
    shape = Shape.of(base)
    # The last token that is sampled is never computed on.
    computed = work.prompt + work.new - 1
    seen = computed * (computed + 1) / 2
    return work.requests * (2 * shape.body * computed + 2 * shape.head * work.new + shape.seen_flops * seen)


def least_s(shape: Shape, work: Work, *, num_adapters: int, item: int, gflops: float, gb_per_s: float) -> float:
    """The time that W takes where every step is as quick as its multiplications or its bytes allow, the slower of both.

    Prompts are read `STEP_TOKENS` at a time, then come steps of one token for each request; numbers take `item` bytes.
    """

    def step_s(tokens: int, rows: int, kept: float) -> float:
        """`rows` of its tokens are sampled from; `kept` tokens' keys and values are read."""
        flops = tokens * 2 * (shape.body + (shape.adapter if num_adapters else 0)) + rows * 2 * shape.head
        numbers = shape.body + shape.head + num_adapters * shape.adapter + kept * shape.kv
        return max((flops + kept * shape.seen_flops) / gflops, numbers * item / gb_per_s) / 1e9

    prompt_tokens = work.requests * work.prompt
    steps = -(-prompt_tokens // STEP_TOKENS)
    total_s = steps * step_s(prompt_tokens // steps, work.requests // steps, prompt_tokens / steps)
    for length in range(work.prompt + 1, work.prompt + work.new):
        total_s += step_s(work.requests, work.requests, work.requests * length)
    return total_s


def ours_sides(ours: Ours, setup: Setup, work: Work, refs: list[AdapterRef]) -> dict[str, Callable[[], float]]:
    """Answer tokens per second of W over all adapters and over none."""

    def run(chosen: list[AdapterRef]) -> float:
        asked = prompts(setup.base, work.requests, work.prompt)
        return ours.run(requests(asked, work.new, chosen)).tokens_per_s

    return {OURS: lambda: run(refs), OURS_BASE: lambda: run([])}


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__)
    options.add_argument("--peft-requests", type=int, default=4, help="of W's requests, those that PEFT answers")
    options.add_argument("--ours-only", action="store_true", help="leave PEFT out")
    parsed = options.parse_args(arguments)
    setup = open_setup(parsed)
    work = Work.of(setup)
    refs = adapters(setup, NUM_ADAPTERS)
    report = Report(
        "work",
        describe(setup.threads),
        {"base": setup.base.name, "dtype": setup.dtype, "work": work, "clock": setup.now.__name__},
    )
    # Steps are paced by the wall's clock, which says nothing of a machine whose processor time is counted.
    pace = {} if setup.now is time.perf_counter else {"max_step_ms": 1e9}
    with open_engine(setup, max_sequences=max(32, work.requests), **pace) as ours:
        sides = _sides(ours, setup, work, refs, parsed.peft_requests, has_peft=not parsed.ours_only)
        for side in sides.values():
            side()
        with ForeignLoad() as load:
            found = interleave(sides, setup.repetitions)
        _dissect(report, sides, setup)
    report.foreign_share = load.share
    _evaluate(report, found, setup, work)
    report.finish(setup.json_path)
    return report


def _sides(
    ours: Ours, setup: Setup, work: Work, refs: list[AdapterRef], num_peft: int, *, has_peft: bool
) -> dict[str, Callable[[], float]]:
    def few() -> list[list[int]]:
        return prompts(setup.base, min(num_peft, work.requests), work.prompt)

    sides = ours_sides(ours, setup, work, refs)
    sides[OURS_LONE] = lambda: ours.run(requests(few(), work.new, refs), at_once=1).tokens_per_s
    if has_peft:
        from bench.peft_side import PeftSide

        peft = PeftSide(setup, refs)
        sides[PEFT] = lambda: peft.tokens_per_s(few(), work.new, refs)
    sides[CEILING] = lambda: ceilings.gemm_gflops(setup.dtype, size=256 if setup.is_quick else 2048, now=setup.now)
    return sides


def _dissect(report: Report, sides: dict[str, Callable[[], float]], setup: Setup) -> None:
    """The parts of a step in which all requests decode."""
    for name in (OURS_BASE, OURS):
        anatomy = Anatomy(time.perf_counter if setup.now is time.perf_counter else time.thread_time)
        with anatomy.watching():
            sides[name]()
        parts = anatomy.decode()
        shares = ", ".join(f"{part} {ms:.1f} ms ({ms / sum(parts.values()):.0%})" for part, ms in parts.items())
        report.notes.append(f"A step of {name}, all rows decoding, takes {sum(parts.values()):.1f} ms: {shares}")


def _evaluate(report: Report, found: dict[str, list[float]], setup: Setup, work: Work) -> None:
    report.ceilings = ceilings.measure(is_quick=setup.is_quick)
    medians = {
        name: report.add(name, "GFLOP/s" if name == CEILING else "tok/s", values).median
        for name, values in found.items()
    }
    if PEFT in medians:
        report.ratio("W over 8 adapters, ours : transformers + PEFT one at a time", medians[OURS] / medians[PEFT], 18)
        report.ratio("one lone stream, ours : transformers + PEFT generate", medians[OURS_LONE] / medians[PEFT], 2)
    report.ratio("W over 8 adapters : without adapters, both ours", medians[OURS] / medians[OURS_BASE], 0.85)
    shape, base_s = Shape.of(setup.base), work.answered_tokens / medians[OURS_BASE]
    flops = work_flops(setup.base, work)
    gflops = flops / base_s / 1e9
    report.ratio("share of the compute ceiling in W without adapters", gflops / medians[CEILING], 0.6)
    none_s, some_s = (
        least_s(
            shape,
            work,
            num_adapters=count,
            item=2 if setup.dtype == "bf16" else 4,
            gflops=medians[CEILING],
            gb_per_s=report.ceilings["DRAM read GB/s"],
        )
        for count in (0, NUM_ADAPTERS)
    )
    report.ratio("share of what multiplications and memory allow in W without adapters", none_s / base_s)
    report.ratio("the same over 8 adapters", some_s / (work.answered_tokens / medians[OURS]))
    report.ratio("W over 8 adapters : without, by multiplications and memory alone", none_s / some_s)
    report.notes.append(f"W without adapters computes {gflops:.0f} GFLOP/s ({flops:.3g} in all)")


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
