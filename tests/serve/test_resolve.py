import pytest

from tests.serve.conftest import BASE, Service
from tuneloom.domain import Checkpoint, Principal, checkpoint_name
from tuneloom.errors import ModelNotFound
from tuneloom.serve.resolve import Resolver

ADA = Principal(owner="ada", key_id="k", scopes=("inference",))


@pytest.fixture
def resolver(service: Service) -> Resolver:
    return Resolver(service.store.records, frozenset({BASE}), {"gpt-old": BASE, "gpt-gone": "x/y"})


def test_a_base_and_its_alias_resolve_without_an_adapter(resolver: Resolver) -> None:
    for name in (BASE, "gpt-old"):
        target = resolver.resolve(name, ADA)
        assert (target.name, target.base, target.adapter) == (name, BASE, None)


def test_each_spelling_of_a_version_resolves_to_its_adapter(service: Service, resolver: Resolver) -> None:
    first = service.add_version("ada", "bot", 1)
    second = service.add_version("ada", "bot", 2)
    expected = {"bot": second, "bot@v1": first, "bot@v2": second, first.ft_name: first, second.ft_name: second}
    assert {name: resolver.resolve(name, ADA).adapter for name in expected} == {
        name: version.adapter for name, version in expected.items()
    }


def test_a_checkpoint_resolves_by_its_name_for_its_owner_only(service: Service, resolver: Resolver) -> None:
    version = service.add_version("ada", "bot")
    names = {}
    for owner in ("ada", "eve"):
        names[owner] = checkpoint_name(f"ft:{BASE}:{owner}:bot:12345678", 7)
        checkpoint = Checkpoint(
            id=f"ftckpt_{owner}",
            owner=owner,
            job_id="j",
            base=BASE,
            step=7,
            name=names[owner],
            created_at=1.0,
            adapter=version.adapter,
        )
        service.store.records.commit(service.store.records.checkpoints.create(checkpoint))

    assert resolver.resolve(names["ada"], ADA).adapter == version.adapter
    with pytest.raises(ModelNotFound):
        resolver.resolve(names["eve"], ADA)


def test_a_foreign_name_in_any_spelling_is_not_found(service: Service, resolver: Resolver) -> None:
    foreign = service.add_version("eve", "bot")
    for name in ("bot", "bot@v1", foreign.ft_name, "eve:bot", "bot:v1"):
        with pytest.raises(ModelNotFound, match="does not exist or you do not have access to it"):
            resolver.resolve(name, ADA)


def test_a_model_without_an_active_version_says_so(service: Service, resolver: Resolver) -> None:
    service.add_version("ada", "bot", active=False)
    with pytest.raises(ModelNotFound, match="no active version"):
        resolver.resolve("bot", ADA)


@pytest.mark.parametrize(
    "name", ["bot@v01", "bot@v١", "bot@v0", "bot@", "bot@vx", "@v1", "../bot", "bot\0", "ft:", "BOT"]
)
def test_an_odd_name_is_not_found(service: Service, resolver: Resolver, name: str) -> None:
    service.add_version("ada", "bot")
    with pytest.raises(ModelNotFound):
        resolver.resolve(name, ADA)
