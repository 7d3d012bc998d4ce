"""A name that is given another version 2,000 times while W runs: no token of a wrong version, no error.

Records, resolver, blob store, disk cache and engine stand in one process. 32 streams ask the name over and over; each
request is resolved when it comes, and must be answered as the version that it was resolved to answers alone.

In bf16 a batch may round a tie between two tokens another way than a single sequence does. Where the version itself
gives its two best tokens almost the same probability (`--tie`, in nats), either may follow, and the comparison of that
answer ends there; the number of such answers is told. `--dtype fp32` hardly has any. Prompts come again and again, so
what was computed before them by one version is also seen not to reach another.
"""

import asyncio
import itertools
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.inputs import Setup, Work, adapters, open_setup, parser, prompts, scratch
from bench.machine import ForeignLoad, describe, enter_environment
from bench.ours import Ours, answer, open_engine, requests
from bench.report import Report
from bench.stores import as_base
from tuneloom.control import models
from tuneloom.domain import AdapterRef, Principal
from tuneloom.engine.base import SequenceRequest
from tuneloom.errors import TuneloomError
from tuneloom.generation import SamplingParams
from tuneloom.serve.disk import DiskCache
from tuneloom.serve.reads import Reads
from tuneloom.serve.resolve import Resolver
from tuneloom.store import Store, open_blobs, open_documents
from tuneloom.store.records import Records

OWNER, NAME = "bench", "swapped"
_DISK_BYTES = 1 << 34


@dataclass(frozen=True)
class Expected:
    """What a version answers alone: its tokens, and for each the runner-up and how far that is behind, in nats."""

    tokens: tuple[int, ...]
    second: tuple[int, ...]
    margins: tuple[float, ...]


@dataclass
class Tally:
    swaps: int = 0
    answers: int = 0
    tokens: int = 0
    wrong: int = 0
    ties: int = 0
    errors: list[str] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__)
    options.add_argument("--swaps", type=int, default=2000)
    options.add_argument("--versions", type=int, default=4)
    options.add_argument("--interval", type=float, default=0.05, help="seconds between two swaps")
    options.add_argument("--tie", type=float, default=0.05)
    parsed = options.parse_args(arguments)
    setup = open_setup(parsed)
    swaps, interval = (10, 0.01) if setup.is_quick else (parsed.swaps, parsed.interval)
    work = Work.of(setup)
    report = Report("hot_swap", describe(setup.threads), {"base": setup.base.name, "dtype": setup.dtype, "work": work})
    started = time.monotonic()
    with scratch(setup) as folder:
        store = _open_store(Path(folder))
        versions = _import(store, setup, parsed.versions)
        disk = DiskCache(store.blobs, Path(folder) / "cache", _DISK_BYTES)
        with open_engine(setup, disk.fetch) as ours, ForeignLoad() as load:
            asked = prompts(setup.base, work.requests, work.prompt)
            expected = {ref.sha256: _expect(ours, asked, work, ref) for ref in versions}
            started = time.monotonic()
            tally = ours.do(_swap_under_load(ours, store, asked, work, expected, swaps, interval, parsed.tie))
        store.close()
    report.foreign_share = load.share
    elapsed_s = time.monotonic() - started
    report.add("swaps", "", [tally.swaps])
    report.add("answers", "", [tally.answers])
    report.add("answer tokens", "tok/s", [tally.tokens / elapsed_s])
    report.ratio("tokens of a wrong version", tally.wrong, 0, is_limit=True)
    report.ratio("errors", len(tally.errors), 0, is_limit=True)
    report.notes.append(
        f"{tally.answers} answers by {len(tally.versions)} versions during {tally.swaps} swaps in {elapsed_s:.0f} s; "
        f"{tally.ties} of them left the version's own answer at a tie"
    )
    report.notes += tally.errors[:3]
    report.finish(setup.json_path)
    return report


def _open_store(folder: Path) -> Store:
    documents = open_documents(f"sqlite:{folder / 'records.db'}")
    return Store(Records(documents), open_blobs(f"file:{folder / 'blobs'}"))


def _import(store: Store, setup: Setup, count: int) -> list[AdapterRef]:
    base = as_base(setup.base)
    folders = [Path(ref.uri) for ref in adapters(setup, count)]
    return [models.import_adapter(store, OWNER, base, NAME, folder, max_rank=64).adapter for folder in folders]


def _expect(ours: Ours, asked: list[list[int]], work: Work, ref: AdapterRef) -> list[Expected]:
    """A version's own answers, each made while nothing else runs."""
    params = SamplingParams(max_tokens=work.new, temperature=0.0, logprobs=2)
    return [ours.do(_expect_one(ours, request)) for request in requests(asked, work.new, [ref], params=params)]


async def _expect_one(ours: Ours, request: SequenceRequest) -> Expected:
    tokens = [token async for output in ours.engine.generate(request) for token in output.tokens]
    best_two = [sorted(token.top, key=lambda pair: -pair[1])[:2] for token in tokens]
    seconds = [
        next(other for other, _ in pair if other != token.token_id)
        for token, pair in zip(tokens, best_two, strict=True)
    ]
    return Expected(
        tuple(token.token_id for token in tokens),
        tuple(seconds),
        tuple(first[1] - second[1] for first, second in best_two),
    )


async def _swap_under_load(
    ours: Ours,
    store: Store,
    asked: list[list[int]],
    work: Work,
    expected: dict[str, list[Expected]],
    swaps: int,
    interval_s: float,
    tie: float,
) -> Tally:
    resolver = Resolver(store.records, frozenset(), {}, Reads(10.0), stale_s=0)
    principal = Principal(owner=OWNER, key_id="bench", scopes=())
    tally = Tally()
    is_done = asyncio.Event()

    async def stream(i: int) -> None:
        while not is_done.is_set():
            try:
                target = await resolver.resolve(NAME, principal)
                assert target.adapter is not None
                (request,) = requests([asked[i]], work.new, [target.adapter])
                found = (await answer(ours.engine, request)).tokens
            except TuneloomError as error:
                tally.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)
                continue
            tally.answers += 1
            tally.tokens += len(found)
            tally.versions.add(target.adapter.sha256)
            _judge(tally, found, expected[target.adapter.sha256][i], tie)

    streams = [asyncio.create_task(stream(i)) for i in range(len(asked))]
    numbers = itertools.cycle(range(1, len(expected) + 1))
    try:
        for _ in range(swaps):
            await asyncio.to_thread(models.activate, store.records, OWNER, NAME, next(numbers))
            tally.swaps += 1
            await asyncio.sleep(interval_s)
    finally:
        is_done.set()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*streams)
    return tally


def _judge(tally: Tally, found: tuple[int, ...], expected: Expected, tie: float) -> None:
    """Count the tokens that are not the version's own."""
    for i, (token, own) in enumerate(zip(found, expected.tokens, strict=False)):
        if token == own:
            continue
        if expected.margins[i] <= tie and token == expected.second[i]:
            tally.ties += 1
        else:
            tally.wrong += len(found) - i
        return
    tally.wrong += abs(len(found) - len(expected.tokens))


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
