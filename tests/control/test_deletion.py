import threading

import pytest

from tests.control.fakes import put_fake_adapter
from tests.control.test_models import active, add_version
from tuneloom.control import deletion
from tuneloom.domain import Checkpoint
from tuneloom.errors import ModelNotFound
from tuneloom.store.names import find_named


def test_a_deleted_version_leaves_the_highest_of_the_rest_active(store):
    versions = [add_version(store) for _ in range(3)]
    deletion.delete(store, "ada", versions[0].ft_name)
    assert active(store) == 3
    deletion.delete(store, "ada", "bot@v2")
    assert active(store) == 3
    deletion.delete(store, "ada", "bot@v3")
    assert active(store) is None
    assert store.blobs.list("imports") == []
    assert add_version(store).number == 4
    assert active(store) == 4


def test_deleting_a_model_takes_all_versions_and_their_bytes(store):
    for _ in range(3):
        add_version(store)
    kept = add_version(store, name="other")
    deletion.delete(store, "ada", "bot")
    assert [stored.value for stored in store.records.versions.query()] == [kept]
    assert find_named(store.records, "ada", "bot") is None
    assert {blob.key.rsplit("/", 1)[0] for blob in store.blobs.list("imports")} == {kept.adapter.uri}
    with pytest.raises(ModelNotFound):
        deletion.delete(store, "ada", "bot")


def test_a_model_with_very_many_versions_is_deleted_too(store, monkeypatch):
    monkeypatch.setattr(deletion, "MAX_DELETED", 5)
    for _ in range(12):
        add_version(store)
    deletion.delete(store, "ada", "bot")
    assert store.records.versions.query() == []
    assert store.blobs.list("imports") == []


def test_a_version_takes_the_checkpoints_of_its_job_with_it(store):
    version = add_version(store, job_id="ftjob-1")
    checkpoint = Checkpoint(
        id="ftckpt_1",
        owner="ada",
        job_id="ftjob-1",
        base="tiny/llama",
        step=2,
        name=version.ft_name + ":ckpt-step-2",
        created_at=1.0,
        adapter=put_fake_adapter(store, "jobs/ftjob-1/checkpoints/step-2", "c"),
    )
    store.records.commit(store.records.checkpoints.create(checkpoint))
    assert find_named(store.records, "ada", checkpoint.name).checkpoint.value == checkpoint
    deletion.delete(store, "ada", "bot@v1")
    assert store.records.checkpoints.query() == []
    assert store.blobs.list("jobs") == []


def test_bytes_that_another_record_refers_to_stay(store):
    version = add_version(store)
    copy = version.model_copy(update={"id": "ada:copy:v1", "model": "copy"})
    store.records.commit(store.records.versions.create(copy))
    deletion.delete(store, "ada", "bot")
    assert len(store.blobs.list(version.adapter.uri)) == 2


def test_deleting_versions_at_once_leaves_no_pointer_to_nothing(store):
    for _ in range(5):
        add_version(store)
    threads = [threading.Thread(target=deletion.delete, args=(store, "ada", f"bot@v{n}")) for n in (1, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert active(store) in (2, 4)
    assert find_named(store.records, "ada", "bot").version is not None
