"""A quiet owner with one stream beside a noisy one with 64, and how evenly owners are served while both have a queue.

The quiet owner sends W's request again and again, the next when the last is answered: alone, then while the noisy one
keeps 64 requests open. Its slowdown is the ratio of the mean times. For Jain's index two owners queue at once with 32
and 96 requests, the larger one first; service, in tokens of prompts and answers, is counted until one of them has no
request left that waits. 1 is perfectly even, 0.5 is all for one.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence

from bench.inputs import Setup, Work, adapters, open_setup, parser, prompts
from bench.machine import ForeignLoad, describe, enter_environment
from bench.ours import Ours, answer, open_engine, requests
from bench.report import Report, interleave
from tuneloom.domain import AdapterRef

ALONE, BESIDE, INDEX = "quiet owner alone", "quiet owner beside 64 streams", "Jain's index"


def jain(services: Sequence[float]) -> float:
    """Jain's index of fairness: (sum x)^2 / (n sum x^2). Jain, Chiu and Hawe, 1984."""
    squares = sum(service**2 for service in services)
    return sum(services) ** 2 / (len(services) * squares) if squares else 1.0


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__, repetitions=3)
    options.add_argument("--streams", type=int, default=64, help="of the noisy owner")
    options.add_argument("--asked", type=int, default=4, help="requests of the quiet owner in each run")
    parsed = options.parse_args(arguments)
    setup = open_setup(parsed)
    work = Work.of(setup)
    streams, asked, running = (8, 2, 4) if setup.is_quick else (parsed.streams, parsed.asked, 32)
    settings = {"base": setup.base.name, "dtype": setup.dtype, "work": work, "streams": streams}
    report = Report("fairness", describe(setup.threads), settings)
    quiet, noisy = adapters(setup, 2)
    with open_engine(setup, max_sequences=running, max_waiting=1024) as ours, ForeignLoad() as load:
        sides = {
            ALONE: lambda: ours.do(_quiet_s(ours, setup, work, quiet, asked)),
            BESIDE: lambda: ours.do(_beside_s(ours, setup, work, [quiet, noisy], asked, streams)),
            INDEX: lambda: ours.do(_index(ours, setup, work, [quiet, noisy], running)),
        }
        ours.do(_quiet_s(ours, setup, work, quiet, 1))
        ours.do(_quiet_s(ours, setup, work, noisy, 1))
        found = interleave(sides, setup.repetitions)
    report.foreign_share = load.share
    medians = {name: report.add(name, "" if name == INDEX else "s", values).median for name, values in found.items()}
    report.ratio(
        "an owner with 1 stream beside one with 64, slowdown against alone",
        medians[BESIDE] / medians[ALONE],
        2.2,
        is_limit=True,
    )
    report.ratio("Jain's index over owners that both have a queue", medians[INDEX], 0.95)
    report.finish(setup.json_path)
    return report


async def _quiet_s(ours: Ours, setup: Setup, work: Work, ref: AdapterRef, count: int) -> float:
    """Mean time of `count` requests of the quiet owner, one after another."""
    asked = requests(prompts(setup.base, count, work.prompt), work.new, [ref], owner="quiet")
    return statistics.mean([(await answer(ours.engine, request)).total_s for request in asked])


async def _beside_s(ours: Ours, setup: Setup, work: Work, refs: list[AdapterRef], count: int, streams: int) -> float:
    """The same while the noisy owner keeps `streams` requests open."""
    asked = prompts(setup.base, streams, work.prompt)

    async def stream(prompt: list[int]) -> None:
        while True:
            (request,) = requests([prompt], work.new, [refs[1]], owner="noisy")
            await answer(ours.engine, request)

    tasks = [asyncio.create_task(stream(prompt)) for prompt in asked]
    try:
        await _until_busy(ours)
        return await _quiet_s(ours, setup, work, refs[0], count)
    finally:
        await _end(ours, tasks)


async def _index(ours: Ours, setup: Setup, work: Work, refs: list[AdapterRef], running: int) -> float:
    service = {"small": 0, "large": 0}
    unstarted = {"small": running, "large": 3 * running}
    is_over = asyncio.Event()

    async def one(owner: str, prompt: list[int], ref: AdapterRef) -> None:
        (request,) = requests([prompt], work.new, [ref], owner=owner)
        has_begun = False

        def count(tokens: int) -> None:
            nonlocal has_begun
            if is_over.is_set():
                return
            if not has_begun:
                has_begun = True
                service[owner] += len(prompt)
                unstarted[owner] -= 1
            service[owner] += tokens
            if not unstarted[owner]:
                is_over.set()

        await answer(ours.engine, request, count)

    asked = prompts(setup.base, 4 * running, work.prompt)
    owners = ["large"] * (3 * running) + ["small"] * running
    tasks = [
        asyncio.create_task(one(owner, prompt, refs[owner == "large"]))
        for owner, prompt in zip(owners, asked, strict=True)
    ]
    await is_over.wait()
    await _end(ours, tasks)
    return jain(list(service.values()))


async def _until_busy(ours: Ours) -> None:
    """Return when the engine runs as much as it can: what waits is no more on its way to its first step."""
    until = time.monotonic() + 60
    while not ours.engine.stats().waiting and time.monotonic() < until:  # noqa: ASYNC110 - the engine has no event
        await asyncio.sleep(0.01)


async def _end(ours: Ours, tasks: "list[asyncio.Task[None]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    while ours.engine.stats().running or ours.engine.stats().waiting:  # noqa: ASYNC110 - the engine has no event
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
