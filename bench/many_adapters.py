"""W over 1,000 registered adapters, called by Zipf's law, with 16 slots, against W over 8; and what a cold one costs.

The adapters come out of a blob store through the replica's disk cache, which starts empty: an adapter that is called
for the first time is read, checked, brought into memory and copied to a slot while the others run. Each run answers
`--rounds` times W's requests, 32 at once. For the cold one's cost, a single request is answered while nothing else
runs: by an adapter that only the blob store has, and the same again at once.
"""

import itertools
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from bench.inputs import Setup, Work, open_setup, parser, prompts, scratch
from bench.machine import ForeignLoad, describe, enter_environment
from bench.ours import Ours, open_engine, requests
from bench.report import Report, interleave
from bench.stores import register
from bench.work import NUM_ADAPTERS
from tuneloom.domain import AdapterRef
from tuneloom.serve.disk import DiskCache

SLOTS = 16
MANY, FEW = "{count} adapters by Zipf", "8 adapters"
_DISK_BYTES = 64 << 30


def zipf(refs: list[AdapterRef], count: int, seed: int) -> list[AdapterRef]:
    """`count` of `refs`; the n-th most called one is called 1/n as often as the first."""
    weights = [1 / rank for rank in range(1, len(refs) + 1)]
    return random.Random(seed).choices(refs, weights, k=count)


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__, repetitions=3)
    options.add_argument("--registered", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=4, help="times W's requests in each run")
    options.add_argument("--cold", type=int, default=20, help="cold adapters whose first token is timed")
    parsed = options.parse_args(arguments)
    setup = open_setup(parsed)
    count, rounds, num_cold = (12, 1, 2) if setup.is_quick else (parsed.registered, parsed.rounds, parsed.cold)
    work = Work.of(setup)
    stored = register(setup, count + num_cold)
    settings = {"base": setup.base.name, "dtype": setup.dtype, "work": work, "rounds": rounds, "slots": SLOTS}
    report = Report("many_adapters", describe(setup.threads), settings)
    with scratch(setup) as folder:
        disk = DiskCache(stored.blobs, Path(folder), _DISK_BYTES)
        with open_engine(setup, disk.fetch, adapter_slots=SLOTS) as ours, ForeignLoad() as load:
            refs, cold = stored.refs[:count], stored.refs[count:]
            sides = _sides(ours, setup, work, refs, rounds)
            sides[FEW]()
            found = interleave(sides, setup.repetitions)
            late = [_lateness_s(ours, setup, work, ref) for ref in cold]
            stats = ours.engine.stats()
            report.notes.append(
                f"{stats.adapter_loads} adapters read, {stats.adapter_evictions} slots taken from another"
            )
    report.foreign_share = load.share
    many = report.add(MANY.format(count=count), "tok/s", found[MANY]).median
    few = report.add(FEW, "tok/s", found[FEW]).median
    report.add("first token of a cold adapter, after that of a warm one", "ms", [1000 * each for each in late])
    report.ratio(f"W over {count:,} registered adapters (Zipf 1.0, {SLOTS} slots) : over 8", many / few, 0.7)
    report.ratio(
        "cold adapter's first token after a warm one's, median",
        1000 * statistics.median(late),
        150,
        is_limit=True,
        unit=" ms",
    )
    report.finish(setup.json_path)
    return report


def _sides(ours: Ours, setup: Setup, work: Work, refs: list[AdapterRef], rounds: int) -> dict[str, Callable[[], float]]:
    count = work.requests * rounds
    seeds = itertools.count()

    def run(chosen: list[AdapterRef]) -> float:
        asked = prompts(setup.base, count, work.prompt)
        return ours.run(requests(asked, work.new, chosen), at_once=work.requests).tokens_per_s

    few = refs[-NUM_ADAPTERS:]
    return {MANY: lambda: run(zipf(refs, count, next(seeds))), FEW: lambda: run(few)}


def _lateness_s(ours: Ours, setup: Setup, work: Work, ref: AdapterRef) -> float:
    """How much later the first token comes when only the blob store has the adapter."""

    def first_s() -> float:
        return ours.run(requests(prompts(setup.base, 1, work.prompt), 2, [ref])).answers[0].first_s

    cold, warm, again = first_s(), first_s(), first_s()
    return cold - min(warm, again)


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
