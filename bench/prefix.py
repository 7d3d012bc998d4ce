"""First tokens of 32 requests that share a prefix of 512 tokens, without and with the prefix cache.

Each repetition has a prefix of its own. With the cache, one request with the prefix is answered before the 32 come,
as the first user of a long system prompt does for the others. All 32 come at once; the mean over them counts.
"""

import itertools
import statistics
import sys

from bench.inputs import Setup, adapters, open_setup, parser, prompts
from bench.machine import ForeignLoad, describe, enter_environment
from bench.ours import Ours, open_engine, requests
from bench.report import Report, interleave

WITHOUT, WITH, COLD = "without prefix cache", "with it, prefix known", "with it, prefix new to all 32"


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__, repetitions=3)
    options.add_argument("--prefix", type=int, default=512)
    options.add_argument("--own", type=int, default=16, help="tokens of each prompt after the prefix")
    options.add_argument("--cache-bytes", type=int, default=1 << 30)
    parsed = options.parse_args(arguments)
    setup = open_setup(parsed)
    length, own, count = (64, 4, 4) if setup.is_quick else (parsed.prefix, parsed.own, 32)
    settings = {"base": setup.base.name, "dtype": setup.dtype, "prefix": length, "own": own, "requests": count}
    report = Report("prefix", describe(setup.threads), settings)
    seeds = itertools.count()
    cached: list[int] = []
    with (
        open_engine(setup, prefix_cache_bytes=0) as plain,
        open_engine(setup, prefix_cache_bytes=parsed.cache_bytes) as caching,
        ForeignLoad() as load,
    ):

        def run(ours: Ours, *, is_known: bool) -> float:
            first_s, found = _first_s(ours, setup, next(seeds), length, own, count, is_known=is_known)
            if is_known:
                cached.append(found)
            return first_s

        for ours in (plain, caching):
            _first_s(ours, setup, next(seeds), own, own, 4, is_known=False)
        sides = {
            WITHOUT: lambda: run(plain, is_known=False),
            WITH: lambda: run(caching, is_known=True),
            COLD: lambda: run(caching, is_known=False),
        }
        found = interleave(sides, setup.repetitions)
    report.foreign_share = load.share
    medians = {name: report.add(f"first token, {name}", "s", values).median for name, values in found.items()}
    report.ratio("first token of 32 with a shared prefix, without : with cache", medians[WITHOUT] / medians[WITH], 5)
    report.ratio("the same when all 32 are the first", medians[WITHOUT] / medians[COLD])
    report.notes.append(f"cached tokens of a request, least: {min(cached)}")
    report.finish(setup.json_path)
    return report


def _first_s(
    ours: Ours, setup: Setup, seed: int, length: int, own: int, count: int, *, is_known: bool
) -> tuple[float, int]:
    """Mean time of the first tokens, and the least number of cached tokens of a request."""
    refs = adapters(setup, 1)
    (prefix,) = prompts(setup.base, 1, length, seed=1000 + seed)
    first, *asked = [prefix + tail for tail in prompts(setup.base, count + 1, own, seed=seed)]
    if is_known:
        ours.run(requests([first], 1, refs))
    answers = ours.run(requests(asked, 2, refs)).answers
    return statistics.mean(answer.first_s for answer in answers), min(answer.cached_tokens for answer in answers)


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
