"""The results file of a run: OpenAI's CSV of metrics by step, made from the job's events."""

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping

from tuneloom.domain import Event, File, Job
from tuneloom.store import Store
from tuneloom.store.records import Records

COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}
# What the method `dpo` has besides, under the names of its events.
REWARD_COLUMNS = (
    "train_reward_margin",
    "train_reward_accuracy",
    "valid_reward_margin",
    "valid_reward_accuracy",
)
PAGE = 1000


def write_results(store: Store, job: Job, at: float) -> File:
    """Store the CSV's bytes and return the record to create for it. Done again, it finds the bytes there.

    The key holds the hash of the bytes, so that a later try with more events does not meet its own earlier blob.
    """
    columns = COLUMNS | {name: name for name in REWARD_COLUMNS if job.spec.method == "dpo"}
    data = to_csv(metric_events(store.records, job), columns)
    sha256 = hashlib.sha256(data).hexdigest()
    blob = f"jobs/{job.id}/results/{sha256}.csv"
    store.blobs.write(blob, data, sha256=sha256)
    return File(
        id=f"file-{hashlib.sha256(job.id.encode()).hexdigest()[:24]}",
        owner=job.owner,
        filename=f"{job.id}-results.csv",
        purpose="fine-tune-results",
        size_bytes=len(data),
        sha256=sha256,
        blob=blob,
        created_at=at,
    )


def to_csv(events: Iterable[Event], columns: Mapping[str, str]) -> bytes:
    """One row a step, in order, with `columns` by their keys in the events' data.

    A step that was reported twice, by a resumed run, keeps its last values.
    """
    rows: dict[int, dict[str, object]] = {}
    for event in events:
        data = event.data or {}
        step = data.get("step")
        if isinstance(step, int):
            rows.setdefault(step, {}).update({key: value for key, value in data.items() if value is not None})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for step in sorted(rows):
        writer.writerow([rows[step].get(source, "") for source in columns.values()])
    return text.getvalue().encode()


def metric_events(records: Records, job: Job) -> Iterator[Event]:
    """The metrics of a run, oldest first."""
    last: Event | None = None
    while True:
        page = records.events.query({"job_id": job.id, "type": "metrics"}, limit=PAGE, after=last)
        yield from (stored.value for stored in page)
        if len(page) < PAGE:
            return
        last = page[-1].value
