import asyncio

import pytest

from tests.serve.conftest import BASE, Service
from tests.serve.outages import Clock, Outage
from tuneloom.domain import Checkpoint, Principal, checkpoint_name
from tuneloom.errors import ModelNotFound, Overloaded
from tuneloom.serve.reads import Reads
from tuneloom.serve.resolve import Resolver
from tuneloom.store.records import Records

pytestmark = pytest.mark.anyio
STALE_S = 300.0
ADA = Principal(owner="ada", key_id="k", scopes=("inference",))


@pytest.fixture
def resolver(service: Service) -> Resolver:
    return make_resolver(service.store.records)


def make_resolver(records: Records, wait_s: float = 5.0, clock: Clock | None = None) -> Resolver:
    aliases = {"gpt-old": BASE, "gpt-gone": "x/y"}
    return Resolver(records, frozenset({BASE}), aliases, Reads(wait_s), stale_s=STALE_S, clock=clock or Clock())


async def test_a_base_and_its_alias_resolve_without_an_adapter(resolver: Resolver) -> None:
    for name in (BASE, "gpt-old"):
        target = await resolver.resolve(name, ADA)
        assert (target.name, target.base, target.adapter) == (name, BASE, None)


async def test_each_spelling_of_a_version_resolves_to_its_adapter(service: Service, resolver: Resolver) -> None:
    first = service.add_version("ada", "bot", 1)
    second = service.add_version("ada", "bot", 2)
    expected = {"bot": second, "bot@v1": first, "bot@v2": second, first.ft_name: first, second.ft_name: second}
    assert {name: (await resolver.resolve(name, ADA)).adapter for name in expected} == {
        name: version.adapter for name, version in expected.items()
    }


async def test_a_checkpoint_resolves_by_its_name_for_its_owner_only(service: Service, resolver: Resolver) -> None:
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

    assert (await resolver.resolve(names["ada"], ADA)).adapter == version.adapter
    with pytest.raises(ModelNotFound):
        await resolver.resolve(names["eve"], ADA)


async def test_a_foreign_name_in_any_spelling_is_not_found(service: Service, resolver: Resolver) -> None:
    foreign = service.add_version("eve", "bot")
    for name in ("bot", "bot@v1", foreign.ft_name, "eve:bot", "bot:v1"):
        with pytest.raises(ModelNotFound, match="does not exist or you do not have access to it"):
            await resolver.resolve(name, ADA)


async def test_a_model_without_an_active_version_says_so(service: Service, resolver: Resolver) -> None:
    service.add_version("ada", "bot", active=False)
    with pytest.raises(ModelNotFound, match="no active version"):
        await resolver.resolve("bot", ADA)


@pytest.mark.parametrize(
    "name", ["bot@v01", "bot@v١", "bot@v0", "bot@", "bot@vx", "@v1", "../bot", "bot\0", "ft:", "BOT"]
)
async def test_an_odd_name_is_not_found(service: Service, resolver: Resolver, name: str) -> None:
    service.add_version("ada", "bot")
    with pytest.raises(ModelNotFound):
        await resolver.resolve(name, ADA)


def restricted(*models: str) -> Principal:
    return Principal(owner="ada", key_id="k", scopes=("inference",), models=models)


def add_checkpoint(service: Service, suffix: str, unique: str) -> str:
    name = checkpoint_name(f"ft:{BASE}:ada:{suffix}:{unique}", 7)
    adapter = service.add_version("ada", f"x{unique.lower()}").adapter
    checkpoint = Checkpoint(
        id=f"ftckpt_{unique}", owner="ada", job_id="j", base=BASE, step=7, name=name, created_at=1.0, adapter=adapter
    )
    service.store.records.commit(service.store.records.checkpoints.create(checkpoint))
    return name


async def test_a_key_for_some_models_reaches_them_in_every_spelling_and_nothing_else(
    service: Service, resolver: Resolver
) -> None:
    bot, other = service.add_version("ada", "bot"), service.add_version("ada", "other")
    checkpoint, foreign = add_checkpoint(service, "bot", "AAAAAAAA"), add_checkpoint(service, "other", "BBBBBBBB")
    nameless = add_checkpoint(service, "", "CCCCCCCC")
    for_bot, for_base = restricted("bot"), restricted(BASE)

    for name in ("bot", "bot@v1", bot.ft_name, checkpoint):
        assert (await resolver.resolve(name, for_bot)).adapter is not None
    assert (await resolver.resolve(nameless, restricted("ft-cccccccc"))).adapter is not None
    for name in (BASE, "gpt-old"):
        assert (await resolver.resolve(name, for_base)).base == BASE
    for principal, names in (
        (for_bot, ("other", "other@v1", other.ft_name, foreign, nameless, BASE, "gpt-old")),
        (for_base, ("bot", "bot@v1", bot.ft_name, checkpoint)),
    ):
        for name in names:
            with pytest.raises(ModelNotFound) as caught:
                await resolver.resolve(name, principal)
            assert caught.value.body() == ModelNotFound.named(name).body()


async def test_a_model_that_is_not_for_a_key_does_not_tell_that_it_has_no_active_version(
    service: Service, resolver: Resolver
) -> None:
    service.add_version("ada", "bot", active=False)
    with pytest.raises(ModelNotFound, match="does not exist or you do not have access to it"):
        await resolver.resolve("bot", restricted("other"))


async def test_an_activation_counts_at_once_while_the_store_answers(service: Service, resolver: Resolver) -> None:
    service.add_version("ada", "bot", 1)
    await resolver.resolve("bot", ADA)
    second = service.add_version("ada", "bot", 2)
    assert (await resolver.resolve("bot", ADA)).adapter == second.adapter


@pytest.mark.parametrize("error", [Overloaded("The store is away."), ConnectionRefusedError(111, "refused")])
async def test_a_name_goes_where_it_went_last_while_the_store_is_down(service: Service, error: Exception) -> None:
    outage, clock = Outage(service.store.records.documents), Clock()
    resolver = make_resolver(Records(outage), clock=clock)
    first = service.add_version("ada", "bot", 1)
    await resolver.resolve("bot", ADA)
    second = service.add_version("ada", "bot", 2)
    outage.fail(error)
    clock.now += STALE_S
    assert (await resolver.resolve("bot", ADA)).adapter == first.adapter
    for name, principal in (("bot@v1", ADA), ("bot", Principal(owner="eve", key_id="k", scopes=("inference",)))):
        with pytest.raises(Overloaded) as caught:
            await resolver.resolve(name, principal)
        assert caught.value.status == 503
    with pytest.raises(ModelNotFound):
        await resolver.resolve("bot", restricted("other"))
    assert (await resolver.resolve(BASE, ADA)).base == BASE
    clock.now += 1
    with pytest.raises(Overloaded):
        await resolver.resolve("bot", ADA)
    outage.end()
    assert (await resolver.resolve("bot", ADA)).adapter == second.adapter


async def test_a_name_that_was_deleted_is_not_remembered(service: Service) -> None:
    outage = Outage(service.store.records.documents)
    resolver = make_resolver(Records(outage))
    version, records = service.add_version("ada", "bot"), service.store.records
    await resolver.resolve("bot@v1", ADA)
    records.commit(records.versions.delete(records.versions.get(version.id)))
    with pytest.raises(ModelNotFound):
        await resolver.resolve("bot@v1", ADA)
    outage.fail()
    with pytest.raises(Overloaded):
        await resolver.resolve("bot@v1", ADA)


async def test_a_slow_store_makes_requests_wait_once_and_its_answer_counts_when_it_comes(service: Service) -> None:
    outage = Outage(service.store.records.documents)
    resolver = make_resolver(Records(outage), wait_s=0.2)
    first = service.add_version("ada", "bot", 1)
    await resolver.resolve("bot", ADA)
    second = service.add_version("ada", "bot", 2)
    outage.hangs = True
    async with asyncio.timeout(10):
        for _ in range(40):
            assert (await resolver.resolve("bot", ADA)).adapter == first.adapter
    outage.end()
    for _ in range(100):
        if (await resolver.resolve("bot", ADA)).adapter == second.adapter:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the answer of the store does not count")
