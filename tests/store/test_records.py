from pathlib import Path

import pytest

from tuneloom.domain import AdapterRef, Checkpoint, Event, Job, JobError, JobSpec, Record, TrainOptions
from tuneloom.errors import InvalidRequest, NotFound, TuneloomError
from tuneloom.store.base import Create, StoreConflict, field_path
from tuneloom.store.records import Records
from tuneloom.store.sqlite import SqliteDocuments


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(SqliteDocuments(tmp_path / "documents.db"))


def job(id: str, **changes: object) -> Job:
    spec = JobSpec(
        base="tiny/llama",
        training_file="file-1",
        seed=7,
        options=TrainOptions(target_modules=("q_proj",)),
        metadata={"team": "x", "a.b `c`": "y"},
    )
    return Job.model_validate(
        {"id": id, "owner": "ada", "spec": spec, "requested_model": "tiny", "created_at": 1.5, **changes}
    )


def event(id: str, created_at: float) -> Event:
    return Event(id=id, owner="ada", job_id="job", created_at=created_at, message="m")


def test_a_record_comes_back_equal(records: Records) -> None:
    written = job("a", error=JobError(code="x", message="y"), result_files=("file-2",))
    revs = records.commit(records.jobs.create(written))
    stored = records.jobs.get("a")
    assert stored.value == written
    assert stored.rev == revs["jobs", "a"]


def test_an_absent_record_is_none_or_not_found(records: Records) -> None:
    assert records.jobs.find("a") is None
    with pytest.raises(NotFound, match="`a`"):
        records.jobs.get("a")


def test_a_change_needs_the_record_as_it_was_read(records: Records) -> None:
    records.commit(records.jobs.create(job("a")))
    stored = records.jobs.get("a")
    records.commit(records.jobs.replace(stored, stored.value.model_copy(update={"state": "queued"})))
    for write in (records.jobs.replace(stored, stored.value), records.jobs.delete(stored)):
        with pytest.raises(StoreConflict):
            records.commit(write)
    assert records.jobs.get("a").value.state == "queued"
    records.commit(records.jobs.delete(records.jobs.get("a")))
    assert records.jobs.find("a") is None


def test_writes_of_several_tables_are_one_commit(records: Records) -> None:
    records.commit(records.jobs.create(job("a")))
    with pytest.raises(StoreConflict):
        records.commit(records.events.create(event("e1", 1)), records.jobs.create(job("a")))
    assert records.events.query() == []


def test_records_are_found_by_their_fields_page_by_page(records: Records) -> None:
    times = [3.25, 1.0, 2.0, 2.0, 1759300000.123457]
    records.commit(*[records.events.create(event(f"e{i}", at)) for i, at in enumerate(times)])
    seen: list[str] = []
    after = None
    while page := records.events.query({"job_id": "job"}, order_by="created_at", limit=2, after=after):
        seen += [stored.value.id for stored in page]
        after = page[-1].value
    assert seen == ["e1", "e2", "e3", "e0", "e4"]


def test_jobs_are_found_by_metadata(records: Records) -> None:
    records.commit(records.jobs.create(job("a")), records.jobs.create(job("b", owner="eve")))
    found = records.jobs.query({"owner": "ada", field_path("spec", "metadata", "a.b `c`"): "y"})
    assert [stored.value.id for stored in found] == ["a"]
    assert records.jobs.query({field_path("spec", "metadata", "a.b `c`"): "x"}) == []


def test_a_record_of_another_version_is_named_and_not_guessed(records: Records) -> None:
    data = {**job("a").model_dump(mode="json"), "later_field": 1}
    records.commit(Create("jobs", "a", data))
    with pytest.raises(TuneloomError, match=r"jobs/a.*later_field"):
        records.jobs.get("a")
    with pytest.raises(TuneloomError, match=r"jobs/a.*later_field"):
        records.jobs.query()


def test_what_could_not_be_read_back_is_not_written(records: Records) -> None:
    adapter = AdapterRef(sha256="0" * 64, uri="jobs/a/a1", rank=4, size_bytes=1)
    checkpoint = Checkpoint(
        id="c",
        owner="ada",
        job_id="a",
        base="b",
        step=1,
        name="n",
        created_at=1,
        adapter=adapter,
        metrics={"loss": float("nan")},
    )
    with pytest.raises(InvalidRequest, match=r"metrics\.loss"):
        records.commit(records.checkpoints.create(checkpoint))


def test_every_kind_of_record_has_its_table(records: Records) -> None:
    tables = {table._type: table.collection for table in vars(records).values() if hasattr(table, "_type")}
    assert set(tables) == set(Record.__subclasses__())
    assert all(getattr(records, collection) for collection in tables.values())
