import time
from pathlib import Path

from tuneloom.control import audit
from tuneloom.control.sweep import sweep
from tuneloom.domain import AuditTarget, Job, JobSpec
from tuneloom.store import Store, open_blobs, open_documents
from tuneloom.store.records import Records


def test_states_of_ended_jobs_go_and_those_of_others_stay(tmp_path: Path) -> None:
    store = Store(Records(open_documents(f"sqlite:{tmp_path / 'db'}")), open_blobs(f"file:{tmp_path / 'blobs'}"))
    spec = JobSpec(base="b", training_file="file-1", seed=1)
    now = time.time()
    kinds = {
        "ended": {"state": "cancelled", "finished_at": now},
        "alive": {"state": "cancelled", "finished_at": now, "attempt_open": True},
        "paused": {"state": "paused"},
    }
    for name, fields in kinds.items():
        job = Job(id=name, owner="local", spec=spec, requested_model="b", created_at=now, **fields)
        store.records.commit(store.records.jobs.create(job))
        store.blobs.write(f"jobs/{name}/states/step-00000001/checkpoint.json", b"{}")

    sweep(store)

    assert [bool(store.blobs.list(f"jobs/{name}/states")) for name in kinds] == [False, True, True]


def test_entries_of_the_audit_log_go_after_the_days_that_are_set(store: Store) -> None:
    made = audit.entry(audit.cli_actor(), "a.made", AuditTarget(owner="ada", type="thing", id="x"))
    store.records.commit(made)
    now = store.records.audit_entries.get(made.id).value.created_at

    sweep(store, lambda: now + 3 * 86400 - 1, audit_days=3)
    assert store.records.audit_entries.find(made.id) is not None
    sweep(store, lambda: now + 3 * 86400 + 1, audit_days=3)
    assert store.records.audit_entries.find(made.id) is None
