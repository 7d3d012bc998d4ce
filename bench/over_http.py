"""W over 8 adapters through HTTP on a real local cluster, against the engine alone in this process.

A cluster is brought up in a scratch home on a free port and taken down at the end. Prompts are token ids. Answers may
end early only at the base's end token, so prompts are chosen whose answers do not have it. They are the same in each
repetition, so neither side keeps prefixes.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.inputs import Setup, Work, adapters, open_setup, parser, prompts, scratch
from bench.machine import ForeignLoad, describe, enter_environment
from bench.ours import Ours, open_engine, requests
from bench.report import Report, interleave
from bench.stores import as_base
from bench.work import NUM_ADAPTERS
from tuneloom import bases, cluster
from tuneloom.config import DEFAULT_BASE
from tuneloom.domain import AdapterRef

ENGINE, STREAMED, UNARY = "engine level", "HTTP, streamed", "HTTP, in one piece"
_UP_TIMEOUT_S = 900
# How the page tells one mode's rows from another's.
NAMES = {"compat": "", "throughput": " (`throughput`)", "haproxy": " behind HAProxy"}
WHAT_STREAMS_COST = (
    "A streamed piece crosses from the replica to the gateway (by gRPC, in every mode) and from there to Serve's proxy "
    "(by a generator of Ray; behind HAProxy this second way falls away); an answer in one piece crosses once. Each way "
    "costs about a millisecond of processor, hardly any of it ours: what the gateway itself does with a piece takes "
    "0.07 ms, pickling it 0.005 ms. On two cores that share their units this is time that the engine lacks. gRPC took "
    "a third off what replica and gateway spend on a piece (1,280 pieces of 32 streams, twice each way; on a loaded "
    "machine, with the proxy's unchanged part as the measure). gRPC to the proxy took a quarter off its part and "
    "is not used: Serve sends what waits for a slow reader as one message, which a large file would not fit."
)


@dataclass(frozen=True)
class Server:
    url: str
    key: str
    home: Path


@contextmanager
def open_cluster(home: Path, setup: Setup, refs: list[AdapterRef], mode: str = "compat") -> Iterator[Server]:
    """A cluster that serves the base and the adapters, as models `a0`, `a1`..., until the end of the context."""
    home.mkdir(parents=True, exist_ok=True)
    base = as_base(setup.base)
    place = home / "bases" / base.slug
    if (setup.base / "tuneloom.json").exists():
        shutil.copytree(setup.base, place)
    else:
        bases.add_folder(home / "bases", setup.base, base.id)
    engine = {"dtype": setup.dtype, "threads": setup.threads, "prefix_cache_bytes": 0}
    config = {"gateway": {"port": 0, "mode": mode}, "bases": [{"id": DEFAULT_BASE, "engine": engine}]}
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    try:
        tuneloom(home, "up")
        for i, ref in enumerate(refs):
            tuneloom(home, "models", "import", ref.uri, "--name", f"a{i}")
        state = cluster.read_state(home)
        assert state is not None
        yield Server(state.api_url, (home / "admin-key").read_text().strip(), home)
    finally:
        tuneloom(home, "down")


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__, repetitions=3)
    options.add_argument("--mode", default="compat", choices=("compat", "throughput", "haproxy"), help="gateway.mode")
    parsed = options.parse_args(arguments)
    setup = open_setup(parsed)
    work = Work.of(setup)
    refs = adapters(setup, NUM_ADAPTERS)
    report = Report(
        "over_http" if parsed.mode == "compat" else f"over_http_{parsed.mode}",
        describe(setup.threads),
        {"base": setup.base.name, "dtype": setup.dtype, "work": work, "mode": parsed.mode},
    )
    with scratch(setup) as folder, open_engine(setup, prefix_cache_bytes=0) as ours:
        asked = _endless_prompts(ours, setup, work, refs)
        with open_cluster(Path(folder), setup, refs, parsed.mode) as server:
            sides = _sides(ours, server, asked, work, refs)
            for side in sides.values():
                side()
            with ForeignLoad(lambda: cluster.processes(server.home)) as load:
                found = interleave(sides, setup.repetitions)
    report.foreign_share = load.share
    medians = {name: report.add(name, "tok/s", values).median for name, values in found.items()}
    where = f"W through HTTP on a real local cluster{NAMES[parsed.mode]}"
    report.ratio(f"{where}, streamed : engine level", medians[STREAMED] / medians[ENGINE], 0.9)
    report.ratio(f"{where}, in one piece : engine level", medians[UNARY] / medians[ENGINE], 0.9)
    report.notes.append(WHAT_STREAMS_COST)
    report.finish(setup.json_path)
    return report


def _sides(
    ours: Ours, server: Server, asked: list[list[int]], work: Work, refs: list[AdapterRef]
) -> dict[str, Callable[[], float]]:
    return {
        ENGINE: lambda: ours.run(requests(asked, work.new, refs)).tokens_per_s,
        STREAMED: lambda: asyncio.run(_over_http(server, asked, work, len(refs), is_streamed=True)),
        UNARY: lambda: asyncio.run(_over_http(server, asked, work, len(refs), is_streamed=False)),
    }


def _endless_prompts(ours: Ours, setup: Setup, work: Work, refs: list[AdapterRef]) -> list[list[int]]:
    """Prompts for each place of W whose answers do not have the end token."""
    ends = _end_tokens(setup.base)
    chosen: list[list[int]] = []
    for seed in range(20):
        drawn = prompts(setup.base, work.requests, work.prompt, seed=seed)
        answers = ours.run(requests(drawn, work.new, refs)).answers
        kept = [prompt for prompt, found in zip(drawn, answers, strict=True) if not ends & set(found.tokens)]
        # A prompt keeps its adapter only in its own place.
        if len(kept) == work.requests:
            return drawn
        chosen = max(chosen, kept, key=len)
    raise SystemExit(f"only {len(chosen)} of {work.requests} prompts have answers without an end; try another base")


def _end_tokens(base: Path) -> set[int]:
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (base / name).exists():
            ends = json.loads((base / name).read_text()).get("eos_token_id")
            found |= set(ends if isinstance(ends, list) else [ends]) - {None}
    return found


async def _over_http(
    server: Server, asked: list[list[int]], work: Work, num_models: int, *, is_streamed: bool
) -> float:
    """Answer tokens per second of all prompts at once."""
    async with httpx.AsyncClient(
        base_url=server.url,
        headers={"Authorization": f"Bearer {server.key}"},
        timeout=3600,
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    ) as client:
        started = time.perf_counter()
        counts = await asyncio.gather(
            *(
                _complete(client, f"a{i % num_models}", prompt, work.new, is_streamed=is_streamed)
                for i, prompt in enumerate(asked)
            )
        )
        elapsed = time.perf_counter() - started
    if min(counts) < work.new:
        raise SystemExit(f"an answer has {min(counts)} of {work.new} tokens; the two sides did not do the same work")
    return sum(counts) / elapsed


async def _complete(client: httpx.AsyncClient, model: str, prompt: list[int], new: int, *, is_streamed: bool) -> int:
    """The number of tokens that the server counts in one answer."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0}
    if not is_streamed:
        answer = await client.post("/v1/completions", json=body)
        return answer.raise_for_status().json()["usage"]["completion_tokens"]
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    usage = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if '"usage":{' in line.replace(" ", ""):
                usage = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    return usage


def tuneloom(home: Path, *arguments: str) -> None:
    environment = {**os.environ, "TUNELOOM_HOME": str(home)}
    command = [sys.executable, "-m", "tuneloom.cli", *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_UP_TIMEOUT_S, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise SystemExit(f"`tuneloom {' '.join(arguments)}` failed: {done.stdout[-1000:]} {done.stderr[-2000:]}")


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
