"""`python -m tuneloom.train`: one attempt of a job, on the Ray cluster that this process belongs to.

Launched by control, the job is named in the environment (`TUNELOOM_HOME`, `TUNELOOM_JOB`, `TUNELOOM_ATTEMPT`). By hand,
it is made from arguments (`--base --data --model`). The exit code is 0 for published, paused or cancelled.
"""

import argparse
import logging
import os
import shutil
import sys
import time

from tuneloom.config import Settings, load
from tuneloom.errors import TuneloomError
from tuneloom.store import Store, open_store
from tuneloom.train import job
from tuneloom.train.folders import run_folder


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    is_launched = not arguments and {"TUNELOOM_JOB", "TUNELOOM_ATTEMPT"} <= os.environ.keys()
    asked = None if is_launched else _parse(arguments or ["--help"])
    settings = load(os.environ.get("TUNELOOM_HOME"))
    store = open_store(settings)
    try:
        if asked is not None:
            return _run_by_hand(settings, store, asked)
        join_cluster()
        return job.drive(settings, store, os.environ["TUNELOOM_JOB"], int(os.environ["TUNELOOM_ATTEMPT"]), say)
    except TuneloomError as error:
        say(error.message)
        return job.EXIT_FAILED
    finally:
        store.close()


def _parse(arguments: list[str]) -> argparse.Namespace:
    # Here, since the driver of a launched job does without all that reading files imports.
    from tuneloom.train import by_hand

    return by_hand.parse(arguments)


def _run_by_hand(settings: Settings, store: Store, asked: argparse.Namespace) -> int:
    from tuneloom.train import by_hand

    prepared = by_hand.prepare(settings, store, asked)
    for note in prepared.notes:
        say(note)
    try:
        join_cluster()
    except TuneloomError:
        shutil.rmtree(run_folder(settings, prepared.job.id), ignore_errors=True)
        raise
    made = by_hand.create(store, prepared)
    say(f"Job {made.id}: base {made.spec.base}, seed {made.spec.seed}.")
    code = job.drive(settings, store, made.id, made.attempt, say)
    # A paused or cancelled run makes no model to wait for.
    if code == job.EXIT_OK and store.records.jobs.get(made.id).value.state not in ("paused", "cancelled"):
        for line in by_hand.how_to_call(by_hand.wait_for_version(store, made.id)):
            say(line)
    return code


def join_cluster() -> None:
    """Connect to the cluster that this process was submitted to.

    Never to another that happens to run on this machine, which is why there must be an address.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    hint = "Submit this to a running one: `ray job submit --address ADDRESS -- python -m tuneloom.train ...`."
    if not address:
        raise TuneloomError(f"This process belongs to no Ray cluster. {hint}")
    try:
        # The worker's own lines stay in its log; what matters of them comes as events.
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise TuneloomError(f"The Ray cluster at `{address}` does not answer. {hint}") from error


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # Ray 2.60 ends a process by 1 if a thread still lets go of a reference while it shuts down; a driver that is just
    # gone is cleared away as well, and sooner.
    os._exit(code)
