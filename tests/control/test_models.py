import threading

import pytest

from tests.control.fakes import put_fake_adapter
from tuneloom import bases
from tuneloom.control import deletion, models
from tuneloom.domain import new_id
from tuneloom.errors import AdapterRejected, Conflict, InvalidRequest, ModelNotFound
from tuneloom.store import Store
from tuneloom.store.names import find_named


def add_version(
    store: Store, name: str = "bot", owner: str = "ada", base: str = "tiny/llama", job_id: str | None = None
):
    unique = new_id("")

    def once():
        addition = models.add_version(
            store.records,
            owner=owner,
            name=name,
            base=base,
            adapter=put_fake_adapter(store, f"imports/{unique}", unique),
            unique=unique[:8],
            suffix=name,
            at=1.0,
            job_id=job_id,
        )
        store.records.commit(*addition.writes)
        return addition.version

    return models.retry(once)


def active(store: Store, name: str = "bot") -> int | None:
    return models.get_model(store.records, "ada", name).value.active


def test_the_first_version_is_active_and_later_ones_wait(store):
    assert [add_version(store).number for _ in range(3)] == [1, 2, 3]
    assert active(store) == 1


def test_every_name_of_a_version_finds_it(store):
    first, second = add_version(store), add_version(store)
    for name, version in (("bot", first), ("bot@v1", first), ("bot@v2", second), (second.ft_name, second)):
        assert find_named(store.records, "ada", name).version.value == version
    for name in ("bot@v3", "bot@v01", "bot@v", "bot@v-1", "bot@v١", "bot@2", "Bot", "ft:", "ft:x", "", "@v1", "a/b"):
        assert find_named(store.records, "ada", name) is None
    for name in ("bot", "bot@v1", first.ft_name):
        assert find_named(store.records, "bob", name) is None


def test_activating_and_rolling_back_move_the_pointer(store):
    for _ in range(3):
        add_version(store)
    models.activate(store.records, "ada", "bot", 3)
    assert active(store) == 3
    deletion.delete(store, "ada", "bot@v2")
    assert models.rollback(store.records, "ada", "bot").active == 1
    with pytest.raises(Conflict, match="no version before"):
        models.rollback(store.records, "ada", "bot")
    with pytest.raises(ModelNotFound):
        models.activate(store.records, "ada", "bot", 9)
    with pytest.raises(ModelNotFound):
        models.activate(store.records, "bob", "bot", 1)


def test_a_model_stays_on_its_base(store):
    add_version(store)
    with pytest.raises(InvalidRequest, match="is on the base `tiny/llama`"):
        add_version(store, base="other/base")


def test_versions_made_at_once_get_numbers_of_their_own(store):
    threads = [threading.Thread(target=add_version, args=(store,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    numbers = [version.number for version in models.list_versions(store.records, "ada", "bot")]
    assert numbers == [1, 2, 3, 4]


@pytest.fixture(scope="session")
def bases_dir(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("bases")
    bases.add_folder(folder, tiny_base, "tiny/llama")
    return folder


def test_an_adapter_trained_elsewhere_becomes_a_version(store, bases_dir, tiny_adapters):
    base = bases.get_base(bases_dir, "tiny/llama")
    version = models.import_adapter(store, "ada", base, "bot", tiny_adapters[0], max_rank=64)
    assert (version.pinned_name, version.adapter.rank, version.job_id) == ("bot@v1", 4, None)
    again = models.import_adapter(store, "ada", base, "bot", tiny_adapters[1], max_rank=64)
    assert again.number == 2
    assert again.ft_name != version.ft_name


def test_an_adapter_that_does_not_fit_leaves_nothing(store, bases_dir, tiny_adapters):
    base = bases.get_base(bases_dir, "tiny/llama")
    with pytest.raises(AdapterRejected):
        models.import_adapter(store, "ada", base, "bot", tiny_adapters[3], max_rank=8)
    assert store.records.models.query() == []
    assert store.blobs.list("imports") == []
