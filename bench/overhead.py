"""What a job takes besides its steps: from the request to the model that can be called, on a warm cluster.

A tiny base on a scratch installation, so that nearly all of the time is overhead. The stages come from the records,
looked at every 20 ms.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

from bench.installation import Installation, open_installation, wait_for
from bench.machine import ForeignLoad, describe
from bench.report import Report, table
from tuneloom import cluster

ROWS, EPOCHS = 24, 2
# Each stage ends where the next of these is seen.
STAGES = {
    "created": "files are checked in a process of their own",
    "queued": "control launches, Ray starts the driver",
    "starting": "Ray Train starts controller and worker",
    "reading files": "tokens are read, rendering is checked",
    "loading": "torch and the trainer are imported, the base is loaded",
    "training": "steps",
    "checking": "an engine computes with the adapter",
    "publishing": "files, manifest, last word",
    "published": "control registers the version",
}


def main(arguments: list[str] | None = None) -> Report:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--reps", type=int, default=3)
    options.add_argument("--quick", action="store_true", help="one job: to see that the script works")
    options.add_argument("--threads", type=int, default=1, help="not used: jobs train with one thread")
    options.add_argument("--home", type=Path, help="not used: the installation is a scratch one")
    options.add_argument("--json", type=Path, help="also write the result there")
    parsed = options.parse_args(arguments)
    report = Report("overhead", describe(1), {"base": "tiny", "steps": EPOCHS * ROWS // 4})
    with open_installation() as service:
        if not parsed.quick:
            _run(service, "warm")
        with ForeignLoad(lambda: cluster.processes(service.home)) as load:
            runs = [_run(service, f"job{number}") for number in range(1 if parsed.quick else parsed.reps)]
    report.foreign_share = load.share
    overheads = [sum(seconds for stage, seconds in run.items() if stage != "training") for run in runs]
    report.add("job without its steps", "s", overheads)
    report.add("its steps", "s", [run["training"] for run in runs])
    report.ratio("overhead of a job on a warm cluster", statistics.median(overheads), 20.0, is_limit=True, unit=" s")
    medians = {stage: statistics.median(run[stage] for run in runs) for stage in STAGES}
    report.notes += [f"{medians[stage]:.1f} s: {text}" for stage, text in STAGES.items()]
    print("\n".join(table(["stage", "s", ""], [[s, f"{medians[s]:.2f}", text] for s, text in STAGES.items()])))
    report.finish(parsed.json)
    return report


def _run(service: Installation, name: str) -> dict[str, float]:
    """Seconds in each stage of one job."""
    started_at = time.monotonic()
    job_id = service.start_job(name, rows=ROWS, epochs=EPOCHS)
    seen = {"created": started_at}

    def look() -> bool:
        now, job, progress = time.monotonic(), service.job(job_id), service.progress(job_id)
        if job.files_checked:
            seen.setdefault("queued", now)
        if progress is not None and progress.stage in STAGES:
            seen.setdefault(progress.stage, now)
        return job.is_terminal

    wait_for("the end of the job", look)
    ended_at = time.monotonic()
    job = service.job(job_id)
    if job.state != "succeeded":
        raise SystemExit(f"job {job_id} is {job.state}: {job.error}")
    # A stage that was too short to be seen took no time.
    marks = [*((stage, seen.get(stage)) for stage in STAGES), ("", ended_at)]
    return _spans(marks)


def _spans(marks: list[tuple[str, float | None]]) -> dict[str, float]:
    spans, end = {}, marks[-1][1]
    assert end is not None, "every job ends"
    for stage, at in reversed(marks[:-1]):
        spans[stage] = 0.0 if at is None else end - at
        end = end if at is None else at
    return spans


if __name__ == "__main__":
    main(sys.argv[1:])
