from collections.abc import Iterator
from pathlib import Path

import pytest

from tuneloom.domain import File, Job, JobSpec, new_id
from tuneloom.store import Store, open_blobs, open_documents
from tuneloom.store.records import Records

BASE = "tiny/llama"


def open_test_store(folder: Path) -> Store:
    return Store(Records(open_documents(f"sqlite:{folder / 'tuneloom.db'}")), open_blobs(f"file:{folder / 'blobs'}"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_test_store(tmp_path)
    yield store
    store.close()


def add_job(
    store: Store, *, owner: str = "ada", suffix: str | None = "bot", at: float = 1.8e9, **fields: object
) -> Job:
    """A job as the API creates it, with its training file."""
    file = File(
        id=new_id("file-"),
        owner=owner,
        filename="rows.jsonl",
        purpose="fine-tune",
        size_bytes=1,
        sha256="0" * 64,
        blob="files/x",
        created_at=at,
    )
    spec = JobSpec(base=BASE, training_file=file.id, suffix=suffix, seed=1)
    job = Job.model_validate(
        {"id": new_id("ftjob-"), "owner": owner, "spec": spec, "requested_model": BASE, "created_at": at, **fields}
    )
    store.records.commit(store.records.files.create(file), store.records.jobs.create(job))
    return job
