"""The training job of `make demo`, by this tree and by an earlier commit, each on a cluster of its own, in turn.

The rows, settings and base are the demo's. What is compared is the time from the job's creation to its end, and the
tokens per second between its first and its last step.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from openai import OpenAI

from bench.inputs import open_setup, parser, scratch
from bench.machine import ForeignLoad, describe
from bench.report import Report, interleave
from bench.stores import as_base
from examples import headlines
from tuneloom import bases, cluster
from tuneloom.engine.environment import ENGINE_ENVIRONMENT

NOW, BEFORE = "this tree", "the earlier commit"
ROOT = Path(__file__).parent.parent
# The last commit before training was made over.
EARLIER = "6af2e39"
_UP_TIMEOUT_S = 900.0
_JOB_TIMEOUT_S = 1800.0


@contextmanager
def open_cluster(tree: Path, home: Path, base: Path) -> Iterator[OpenAI]:
    """A client of a cluster that runs the package of `tree` in a fresh home."""
    home.mkdir(parents=True)
    entry = as_base(base)
    if (base / "tuneloom.json").exists():
        shutil.copytree(base, home / "bases" / entry.slug)
    else:
        bases.add_folder(home / "bases", base, entry.id)
    (home / "config.yaml").write_text(yaml.safe_dump({"gateway": {"port": 0}}))
    try:
        _tuneloom(tree, home, "up")
        state = cluster.read_state(home)
        assert state is not None
        key = (home / "admin-key").read_text().strip()
        yield OpenAI(base_url=f"{state.api_url}/v1", api_key=key, max_retries=8)
    finally:
        _tuneloom(tree, home, "down")
        shutil.rmtree(home, ignore_errors=True)


def train(client: OpenAI, rows: list[headlines.Row]) -> tuple[float, float, float]:
    """Run the demo's job; its seconds, its tokens per second between the first and the last step, its last loss."""
    started = time.monotonic()
    job_id = headlines.start_job(client, rows)
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in ("succeeded", "failed", "cancelled"):
        if time.monotonic() - started > _JOB_TIMEOUT_S:
            raise SystemExit("the job does not end")
        time.sleep(0.25)
    elapsed = time.monotonic() - started
    if job.status != "succeeded":
        raise SystemExit(f"the job {job.status}: {job.error}")
    steps = [event for event in client.fine_tuning.jobs.list_events(job_id, limit=100) if event.type == "metrics"]
    steps.sort(key=lambda event: event.data["step"])
    share = (len(steps) - 1) / len(steps)
    seconds = steps[-1].created_at - steps[0].created_at
    return elapsed, share * job.trained_tokens / max(1, seconds), steps[-1].data["train_loss"]


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__, repetitions=1)
    options.add_argument("--before", default=EARLIER, help="the commit to compare with")
    options.add_argument("--rows", type=int, default=400, help="of the demo's 1,200 rows: the earlier commit is slow")
    parsed = options.parse_args(arguments)
    setup = open_setup(parsed)
    rows, _ = headlines.split(headlines.load_rows())
    rows = rows[: 100 if setup.is_quick else parsed.rows]
    report = Report("demo", describe(os.cpu_count() or 1), {"base": setup.base.name, "rows": len(rows)})
    report.settings = {**report.settings, "before": parsed.before}
    with scratch(setup) as folder, _worktree(parsed.before, Path(folder) / "before") as before:
        homes: list[Path] = []

        def side(tree: Path) -> tuple[float, float, float]:
            home = Path(folder) / f"h{len(homes)}"
            homes.append(home)
            with open_cluster(tree, home, setup.base) as client:
                return train(client, rows)

        sides = {NOW: lambda: side(ROOT), BEFORE: lambda: side(before)}
        with ForeignLoad(lambda: [p for home in homes for p in cluster.processes(home)]) as load:
            found = interleave(sides, setup.repetitions)
    report.foreign_share = load.share
    medians: dict[str, dict[str, float]] = {}
    for name, runs in found.items():
        columns: list[tuple[str, str, list[Any]]] = [
            ("from creation to end", "s", [run[0] for run in runs]),
            ("between first and last step", "tok/s", [run[1] for run in runs]),
            ("last loss", "", [run[2] for run in runs]),
        ]
        medians[name] = {what: report.add(f"{name}: {what}", unit, values).median for what, unit, values in columns}
    report.ratio(
        "the demo's training, the earlier commit : this tree, seconds",
        medians[BEFORE]["from creation to end"] / medians[NOW]["from creation to end"],
        1.0,
    )
    report.finish(setup.json_path)
    return report


@contextmanager
def _worktree(commit: str, folder: Path) -> Iterator[Path]:
    """The files of a commit, in a folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True, timeout=60)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True, timeout=60)
    yield folder


def _tuneloom(tree: Path, home: Path, *arguments: str) -> None:
    # A user's shell: the environment of an engine, which this process has, is none of the trainer's.
    own = {"OMP_NUM_THREADS", *ENGINE_ENVIRONMENT}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"TUNELOOM_HOME": str(home), "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-m", "tuneloom.cli", *arguments],
        env=environment,
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=_UP_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        raise SystemExit(f"`tuneloom {' '.join(arguments)}` failed: {done.stdout[-1000:]} {done.stderr[-2000:]}")


if __name__ == "__main__":
    main(sys.argv[1:])
