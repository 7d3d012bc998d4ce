"""Work W: 32 requests at once, 64 prompt and 64 new tokens, greedy. Ours with and without adapters, PEFT one at a time.

PEFT answers `--peft-requests` of the requests, one after another; its time for all 32 is extrapolated from those,
which its lack of batching makes exact but for noise.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from bench import ceilings
from bench.inputs import Setup, Work, adapters, open_setup, parser, prompts
from bench.machine import ForeignLoad, describe, enter_environment
from bench.ours import Ours, open_engine, requests
from bench.report import Report, interleave
from tuneloom.domain import AdapterRef

NUM_ADAPTERS = 8
OURS, OURS_BASE, OURS_LONE = "ours, 8 adapters", "ours, no adapters", "ours, one stream"
PEFT = "transformers + PEFT, one at a time"
CEILING = "GEMM ceiling"


def work_flops(base: Path, work: Work) -> float:
    """Floating point operations that W needs without adapters: linears, head where a token is sampled, attention."""
    shape = json.loads((base / "config.json").read_text())
    width, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    head_width = shape.get("head_dim") or width // heads
    kv_width = shape["num_key_value_heads"] * head_width
    attention_linears = 2 * width * heads * head_width + 2 * width * kv_width
    body = layers * (attention_linears + 3 * width * shape["intermediate_size"])
    # The last token that is sampled is never computed on.
    computed = work.prompt + work.new - 1
    seen = computed * (computed + 1) / 2
    attention = 4 * heads * head_width * layers * seen
    head = 2 * shape["vocab_size"] * width * work.new
    return work.requests * (2 * body * computed + head + attention)


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
    with open_engine(setup, max_sequences=max(32, work.requests)) as ours:
        sides = _sides(ours, setup, work, refs, parsed.peft_requests, has_peft=not parsed.ours_only)
        for side in sides.values():
            side()
        with ForeignLoad() as load:
            found = interleave(sides, setup.repetitions)
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
    gflops = work_flops(setup.base, work) / (work.answered_tokens / medians[OURS_BASE]) / 1e9
    report.ratio("share of the compute ceiling in W without adapters", gflops / medians[CEILING], 0.6)
    report.notes.append(f"W without adapters computes {gflops:.0f} GFLOP/s ({work_flops(setup.base, work):.3g} in all)")


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
