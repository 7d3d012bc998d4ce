"""How far the estimates of jobs were off: jobs one after another on a real local cluster, predicted against actual.

The first job of a kind is estimated by a guess, the second from the first, and so on. Each has rows, lengths and epochs
of its own, so that none repeats another; the last has four times as many rows in a step.
"""

import sys

from bench.inputs import open_setup, parser
from bench.jobs import open_service
from bench.machine import ForeignLoad, describe, enter_environment
from bench.report import Report
from tuneloom import cluster

# Rows, words of a prompt and of its answer, epochs, rows of a step.
SIZES = ((60, 12, 3, 4), (120, 16, 3, 4), (90, 14, 6, 4), (160, 14, 3, 16))
JOB_TIMEOUT_S = 900.0


def main(arguments: list[str] | None = None) -> Report:
    parsed = parser(__doc__, repetitions=1).parse_args(arguments)
    setup = open_setup(parsed)
    sizes = [(rows // 3, words // 2, 1, batch) for rows, words, _, batch in SIZES] if setup.is_quick else SIZES
    report = Report("estimate", describe(setup.threads), {"base": setup.base.name, "rows, words, epochs, batch": sizes})
    with open_service(setup) as service, ForeignLoad(lambda: cluster.processes(service.home)) as load:
        for number, (rows, words, epochs, batch) in enumerate(sizes, 1):
            file = service.upload(rows, words, seed=number)
            id = service.start(file, hyperparameters={"n_epochs": epochs, "batch_size": batch})
            ours = service.wait(id, lambda job: job["status"] == "succeeded", JOB_TIMEOUT_S)["tuneloom"]
            before, taken = ours["estimate"], ours["usage"]
            report.add(f"job {number}, estimated", "s", [before["seconds"]])
            report.add(f"job {number}, taken", "s", [taken["seconds"]])
            wanted = None if number == 1 else 0.25
            name = f"time of job {number} : its estimate, off by"
            report.ratio(name, abs(taken["estimate_error"]), wanted, is_limit=True)
            report.notes.append(
                f"job {number}: {before['seconds_low']:.0f} to {before['seconds_high']:.0f} s, from "
                f"{before['based_on']}; memory {before['memory_bytes'] / 1e9:.2f} GB estimated, "
                f"{taken['memory_bytes'] / 1e9:.2f} GB taken"
            )
    report.foreign_share = load.share
    report.finish(setup.json_path)
    return report


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
