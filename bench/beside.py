"""Time to the first token of streamed answers while a job trains on the same cores, against without a job.

A small load: one request after another, each of a new prompt, with a short pause. A job runs beside it as settings have
it, and once for each of those that hold it back more: `train.scheduling` `idle`, and `train.threads` 1. The speed of
the job is measured meanwhile, so that both sides of the bargain are seen.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

from bench.inputs import Setup, open_setup, parser, prompts
from bench.jobs import JOBS, Service, open_service
from bench.machine import ForeignLoad, describe, enter_environment
from bench.report import Report
from tuneloom import cluster
from tuneloom.config import DEFAULT_BASE

ALONE = "without a job"
SIDES: dict[str, dict[str, Any]] = {
    "beside a job": {},
    "beside a job, `scheduling: idle`": {"scheduling": "idle"},
    "beside a job, `threads: 1`": {"threads": 1},
}
PROMPT_TOKENS, ANSWER_TOKENS, PAUSE_S = 64, 8, 0.1
WINDOW_S = 20.0
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Side:
    """Milliseconds to each first token, and the tokens a second that the job learned meanwhile."""

    first_ms: list[float]
    trained_per_s: float = 0.0

    @property
    def p95_ms(self) -> float:
        return statistics.quantiles(self.first_ms, n=20, method="inclusive")[-1]


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__, repetitions=1)
    options.add_argument("--seconds", type=float, default=WINDOW_S, help="of each side")
    parsed = options.parse_args(arguments)
    setup = open_setup(parsed)
    window_s = 3.0 if setup.is_quick else parsed.seconds
    settings = {
        "base": setup.base.name,
        "prompt": PROMPT_TOKENS,
        "answer": ANSWER_TOKENS,
        "seconds of a side": window_s,
    }
    report = Report("beside", describe(setup.threads), settings)
    with open_service(setup) as service:
        file = service.upload(400, 24)
        _ask_for(service, setup, 3.0)
        with ForeignLoad(lambda: cluster.processes(service.home)) as load:
            found = {ALONE: Side(_ask_for(service, setup, window_s))}
            for name, train in SIDES.items():
                found[name] = _beside(service, setup, file, train, window_s)
    report.foreign_share = load.share
    for name, side in found.items():
        report.add(f"first token {name}", "ms", side.first_ms)
        if name != ALONE:
            report.add(f"trained {name}", "tok/s", [side.trained_per_s])
    for name in SIDES:
        wanted = 1.5 if name == next(iter(SIDES)) else None
        ratio = found[name].p95_ms / found[ALONE].p95_ms
        report.ratio(f"p95 of the first token {name} : {ALONE}", ratio, wanted, is_limit=True)
    report.notes.append(", ".join(f"p95 {name} {side.p95_ms:.0f} ms" for name, side in found.items()))
    report.finish(setup.json_path)
    return report


def _beside(service: Service, setup: Setup, file: str, train: dict[str, Any], window_s: float) -> Side:
    """Measure while a job trains that starts with these settings."""
    service.set_train(**train)
    job = service.start(file, hyperparameters={"n_epochs": 50, "batch_size": 8})
    service.wait(job, lambda shown: (shown["trained_tokens"] or 0) > 0, START_TIMEOUT_S)
    before, began_at = _trained(service, job), time.monotonic()
    first_ms = _ask_for(service, setup, window_s)
    after, seconds = _trained(service, job), time.monotonic() - began_at
    if service.job(job)["status"] != "running":
        raise SystemExit("the job ended before the measurement did")
    service.cancel(job)
    return Side(first_ms, (after - before) / seconds)


def _trained(service: Service, job: str) -> int:
    """Tokens learned so far, by the last step that was told."""
    events = service.call("GET", f"{JOBS}/{job}/events", params={"limit": 20})["data"]
    step = next(event["data"]["step"] for event in events if event["type"] == "metrics")
    estimate = service.job(job)["tuneloom"]["estimate"]
    return round(step * estimate["tokens"] / estimate["steps"])


def _ask_for(service: Service, setup: Setup, seconds: float) -> list[float]:
    """Milliseconds to the first token of each answer of a client that asks for so long."""
    found, until = [], time.monotonic() + seconds
    while time.monotonic() < until or len(found) < 2:
        (prompt,) = prompts(setup.base, 1, PROMPT_TOKENS)
        found.append(1000 * _first_token_s(service, prompt))
        time.sleep(PAUSE_S)
    return found


def _first_token_s(service: Service, prompt: list[int]) -> float:
    body = {"model": DEFAULT_BASE, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "stream": True}
    began_at, first_s = time.perf_counter(), 0.0
    with service.client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not first_s and line.startswith("data: {") and json.loads(line[6:])["choices"]:
                first_s = time.perf_counter() - began_at
    return first_s


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
