"""Training processes die at random points of real jobs: each job still ends once, with the loss of one left alone.

Worker, driver and control of a scratch installation are killed by SIGKILL, several times in each job. A kill counts as
survived if its job succeeded with the same final loss and the same adapter, byte for byte, and made one version.
"""

import argparse
import hashlib
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.installation import Installation, open_installation, wait_for
from bench.machine import ForeignLoad, describe
from bench.report import Report, table
from tuneloom import cluster

ROWS, EPOCHS = 100, 24
TOTAL_STEPS = EPOCHS * ROWS // 4
CHECKPOINT_STEPS = 10
# Of one job: a run may lose its worker twice in an attempt, and starts anew as often as settings allow.
VICTIMS = ("worker", "driver", "control", "worker", "driver")
MIN_GAP = 4 * CHECKPOINT_STEPS
HEAD = ["job", "killed", "at step", "went on from", "s to the next step", "loss and adapter"]


@dataclass
class Kill:
    """One death. `resumed_at` is the step that the run went on from, `lost_s` the time until it took a step again."""

    job: str
    victim: str
    step: int
    resumed_at: int = 0
    lost_s: float = 0.0
    is_survived: bool = False


@dataclass(frozen=True)
class End:
    """How a job came out."""

    loss: float
    adapter: str
    versions: int


def main(arguments: list[str] | None = None) -> Report:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0, help="of the points and victims")
    options.add_argument("--quick", action="store_true", help="two kills: to see that the script works")
    options.add_argument("--threads", type=int, default=1, help="not used: jobs train with one thread")
    options.add_argument("--home", type=Path, help="not used: the installation is a scratch one")
    options.add_argument("--json", type=Path, help="also write the result there")
    parsed = options.parse_args(arguments)
    rng = random.Random(parsed.seed)
    report = Report("kills", describe(1), {"base": "tiny", "steps": TOTAL_STEPS, "seed": parsed.seed})
    with (
        open_installation(max_losses=len(VICTIMS), checkpoint_interval_s=3600.0) as service,
        ForeignLoad(lambda: cluster.processes(service.home)) as load,
    ):
        plain = _finish(service, _start(service, "plain"))
        kills = _kill_all(service, rng, 2 if parsed.quick else parsed.kills, plain)
    report.foreign_share = load.share
    survived = sum(kill.is_survived for kill in kills)
    report.add("time from a kill to the next new step", "s", [kill.lost_s for kill in kills])
    report.ratio(f"kills survived with the same loss and adapter, of {len(kills)}", survived, len(kills))
    report.notes.append(f"final loss {plain.loss:.10f} of the job that was left alone")
    report.finish(parsed.json)
    return report


def _kill_all(service: Installation, rng: random.Random, count: int, plain: End) -> list[Kill]:
    kills: list[Kill] = []
    while len(kills) < count:
        name = f"job{len(kills) // len(VICTIMS)}"
        victims = rng.sample(VICTIMS, min(len(VICTIMS), count - len(kills)))
        own = [Kill(name, victim, step) for victim, step in zip(victims, _points(rng, len(victims)), strict=True)]
        job_id = _start(service, name)
        for kill in own:
            _kill(service, job_id, kill)
        end = _finish(service, job_id)
        for kill in own:
            kill.is_survived = end == plain
        kills += own
        print("\n".join(table(HEAD, _lines(own))), flush=True)
    return kills


def _points(rng: random.Random, count: int) -> list[int]:
    """Steps at which to kill, with a checkpoint between each two of them."""
    room = TOTAL_STEPS - MIN_GAP * (count + 1)
    return [step + MIN_GAP * number for number, step in enumerate(sorted(rng.sample(range(1, room), count)))]


def _start(service: Installation, name: str) -> str:
    return service.start_job(name, rows=ROWS, epochs=EPOCHS, dropout=0.1, checkpoint_every_steps=CHECKPOINT_STEPS)


def _kill(service: Installation, job_id: str, kill: Kill) -> None:
    wait_for(f"step {kill.step}", lambda: _told(service, job_id) >= kill.step)
    before = len(_resumes(service, job_id))
    if not service.kill(kill.victim):
        raise SystemExit(f"there was no {kill.victim} to kill at step {kill.step}")
    at = time.monotonic()
    kill.step = kill.resumed_at = _told(service, job_id)
    # A worker outlives its driver for a moment, and control for good.
    if kill.victim != "control":
        kill.resumed_at = wait_for("a new start", lambda: _resumes(service, job_id)[before:])[0]
    told = _told(service, job_id)
    wait_for("a new step", lambda: _told(service, job_id) > told or told == TOTAL_STEPS)
    kill.lost_s = time.monotonic() - at


def _told(service: Installation, job_id: str) -> int:
    """The last step that the job's events tell of."""
    progress = service.progress(job_id)
    return progress.logged_step if progress else 0


def _resumes(service: Installation, job_id: str) -> list[int]:
    """The steps that the run has gone on from, in order."""
    events = service.store.records.events.query({"job_id": job_id})
    texts = [stored.value.message for stored in events]
    return [int(text.rpartition(" ")[2]) for text in texts if text.startswith("Training goes on from the checkpoint")]


def _finish(service: Installation, job_id: str) -> End:
    wait_for("the end of the job", lambda: service.job(job_id).is_terminal)
    job = service.job(job_id)
    if job.state != "succeeded":
        raise SystemExit(f"job {job_id} is {job.state}: {job.error}")
    events = [stored.value for stored in service.store.records.events.query({"job_id": job_id})]
    steps = [event.data for event in events if event.type == "metrics" and event.data]
    assert [data["step"] for data in steps] == list(range(1, TOTAL_STEPS + 1)), "each step is told once"
    versions = service.store.records.versions.query({"job_id": job_id})
    weights = service.store.blobs.read(f"{versions[0].value.adapter.uri}/adapter_model.safetensors")
    return End(steps[-1]["train_loss"], hashlib.sha256(weights).hexdigest(), len(versions))


def _lines(kills: list[Kill]) -> list[list[str]]:
    return [
        [
            kill.job,
            kill.victim,
            str(kill.step),
            str(kill.resumed_at),
            f"{kill.lost_s:.1f}",
            "same" if kill.is_survived else "OTHER",
        ]
        for kill in kills
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
