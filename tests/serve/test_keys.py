import asyncio
import time
from dataclasses import dataclass

import pytest

from tests.serve.conftest import PEPPER, eventually
from tests.serve.outages import Clock, Outage
from tuneloom.config import Pepper
from tuneloom.control import audit, keys
from tuneloom.domain import Rates
from tuneloom.errors import Overloaded, Unauthenticated
from tuneloom.serve import keys as serve_keys
from tuneloom.serve.key_uses import KeyUses
from tuneloom.serve.keys import UNKNOWN_BURST, UNKNOWN_S, Keys
from tuneloom.serve.reads import Reads
from tuneloom.store import Store
from tuneloom.store.records import Records

pytestmark = pytest.mark.anyio
CACHE_S, STALE_S = 2.0, 300.0


@dataclass
class Gate:
    """A gateway's keys over a store that can fail, with a clock of their own."""

    keys: Keys
    records: Records
    outage: Outage
    clock: Clock
    wall: Clock

    def mint(self, pepper: Pepper = PEPPER, **fields: object) -> keys.Minted:
        return keys.mint(self.records, pepper, **{"owner": "ada", **fields})

    async def is_refused(self, secret: str) -> bool:
        try:
            await self.keys.authenticate(secret)
        except Unauthenticated:
            return True
        return False


def make_gate(store: Store, pepper: Pepper = PEPPER, wait_s: float = 5.0) -> Gate:
    outage, clock, wall = Outage(store.records.documents), Clock(), Clock()
    wall.now = time.time()
    records = Records(outage)
    found = Keys(
        records,
        pepper,
        Reads(wait_s),
        cache_s=CACHE_S,
        stale_s=STALE_S,
        uses=KeyUses(records, flush_s=0.01),
        clock=clock,
        now=wall,
    )
    return Gate(found, store.records, outage, clock, wall)


@pytest.fixture
def gate(store: Store) -> Gate:
    return make_gate(store)


async def test_a_key_brings_its_owner_scopes_models_and_rates(gate: Gate) -> None:
    rates = Rates(requests_per_minute=3)
    minted = gate.mint(scopes=("inference", "account"), models=("bot",), rates=rates)
    principal = await gate.keys.authenticate(minted.secret)
    assert (principal.owner, principal.key_id, principal.kind) == ("ada", minted.key.id, "key")
    assert (principal.scopes, principal.models, principal.rates) == (("inference", "account"), ("bot",), rates)


async def test_a_revoked_key_is_refused_once_the_cache_ages_out(gate: Gate) -> None:
    minted = gate.mint()
    await gate.keys.authenticate(minted.secret)
    keys.revoke(gate.records, minted.key.id)
    assert (await gate.keys.authenticate(minted.secret)).key_id == minted.key.id
    gate.clock.now += CACHE_S
    with pytest.raises(Unauthenticated, match="Incorrect API key"):
        await gate.keys.authenticate(minted.secret)


async def test_the_process_that_revokes_a_key_refuses_it_at_once(gate: Gate) -> None:
    minted = gate.mint()
    await gate.keys.authenticate(minted.secret)
    keys.revoke(gate.records, minted.key.id)
    gate.keys.forget(minted.key.id)
    assert await gate.is_refused(minted.secret)


async def test_a_key_expires_while_it_is_cached(gate: Gate) -> None:
    minted = gate.mint(expires_in=60)
    await gate.keys.authenticate(minted.secret)
    gate.wall.now += 61
    with pytest.raises(Unauthenticated, match="expired"):
        await gate.keys.authenticate(minted.secret)


async def test_a_key_works_within_a_second_of_being_made(gate: Gate) -> None:
    draft = keys.draft(PEPPER, owner="ada", name="", scopes=("inference",), expires_in=None)
    assert await gate.is_refused(draft.secret)
    gate.records.commit(gate.records.keys.create(draft.key))
    gate.clock.now += UNKNOWN_S
    assert (await gate.keys.authenticate(draft.secret)).scopes == ("inference",)


async def test_a_key_of_another_installation_is_unknown(gate: Gate) -> None:
    assert await gate.is_refused(gate.mint(Pepper((b"q" * 32,))).secret)


async def test_an_unknown_secret_is_not_looked_for_again_within_a_second(gate: Gate) -> None:
    await gate.is_refused("sk-nobodys")
    calls = gate.outage.calls
    assert await gate.is_refused("sk-nobodys")
    assert gate.outage.calls == calls


async def test_a_flood_of_unknown_secrets_reaches_the_store_a_bounded_number_of_times(gate: Gate) -> None:
    known = gate.mint().secret
    await gate.keys.authenticate(known)
    calls, refused = gate.outage.calls, 0
    for number in range(round(UNKNOWN_BURST) + 50):
        try:
            await gate.keys.authenticate(f"sk-guess-{number}")
        except Overloaded as error:
            assert error.retry_after_s == 1.0
        except Unauthenticated:
            refused += 1
    assert refused == UNKNOWN_BURST
    # Two looks for each, and the use of the known key is written down.
    assert gate.outage.calls - calls <= 2 * UNKNOWN_BURST + 2
    gate.clock.now += CACHE_S / 2
    await gate.keys.authenticate(known)
    assert await gate.is_refused("sk-another")


async def test_what_is_remembered_is_bounded(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_keys, "MAX_CACHED", 2)
    monkeypatch.setattr(serve_keys, "MAX_UNKNOWN", 2)
    for secret in [gate.mint().secret for _ in range(4)]:
        await gate.keys.authenticate(secret)
    for number in range(4):
        await gate.is_refused(f"sk-guess-{number}")
    assert (len(gate.keys._known), len(gate.keys._unknown)) == (2, 2)


async def test_requests_that_come_together_share_one_lookup(gate: Gate) -> None:
    secret = gate.mint().secret
    gate.outage.delay_s = 0.05
    await asyncio.gather(*(gate.keys.authenticate(secret) for _ in range(20)))
    assert gate.outage.calls == 1


@pytest.mark.parametrize("error", [Overloaded("The store is away."), ConnectionRefusedError(111, "refused")])
async def test_a_key_that_was_seen_goes_on_while_the_store_is_down(gate: Gate, error: Exception) -> None:
    minted = gate.mint()
    await gate.keys.authenticate(minted.secret)
    gate.outage.fail(error)
    gate.clock.now += STALE_S
    assert (await gate.keys.authenticate(minted.secret)).key_id == minted.key.id
    gate.clock.now += 1
    with pytest.raises(Overloaded) as caught:
        await gate.keys.authenticate(minted.secret)
    assert (caught.value.status, caught.value.code) == (503, "overloaded")


async def test_a_key_that_was_not_seen_waits_for_the_store(gate: Gate) -> None:
    minted = gate.mint()
    gate.outage.fail()
    with pytest.raises(Overloaded):
        await gate.keys.authenticate(minted.secret)
    gate.outage.end()
    assert (await gate.keys.authenticate(minted.secret)).owner == "ada"


async def test_expired_and_revoked_keys_end_while_the_store_is_down(gate: Gate) -> None:
    expiring, revoked, changed = gate.mint(expires_in=60), gate.mint(), gate.mint()
    for minted in (expiring, revoked, changed):
        await gate.keys.authenticate(minted.secret)
    keys.revoke(gate.records, revoked.key.id)
    gate.clock.now += CACHE_S
    assert await gate.is_refused(revoked.secret)
    keys.revoke(gate.records, changed.key.id)
    gate.keys.forget(changed.key.id)
    gate.outage.fail()
    gate.wall.now += 61
    gate.clock.now += CACHE_S
    assert await gate.is_refused(expiring.secret)
    assert await gate.is_refused(revoked.secret)
    with pytest.raises(Overloaded):
        await gate.keys.authenticate(changed.secret)


async def test_a_revocation_counts_as_soon_as_the_store_is_back(gate: Gate) -> None:
    minted = gate.mint()
    await gate.keys.authenticate(minted.secret)
    keys.revoke(gate.records, minted.key.id)
    gate.outage.fail()
    gate.clock.now += CACHE_S
    await gate.keys.authenticate(minted.secret)
    gate.outage.end()
    assert await gate.is_refused(minted.secret)


async def test_a_store_that_hangs_holds_nobody_up_whose_key_was_seen(store: Store) -> None:
    gate = make_gate(store, wait_s=0.05)
    minted = gate.mint()
    await gate.keys.authenticate(minted.secret)
    gate.outage.hangs = True
    for _ in range(5):
        gate.clock.now += CACHE_S
        async with asyncio.timeout(5):
            await gate.keys.authenticate(minted.secret)
    keys.revoke(gate.records, minted.key.id)
    gate.outage.end()

    async def refused() -> bool:
        gate.clock.now += CACHE_S
        return await gate.is_refused(minted.secret)

    for _ in range(100):
        if await refused():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the answer of the store does not count")


async def test_a_secret_before_a_rotation_works_until_its_overlap_ends(gate: Gate) -> None:
    first = gate.mint()
    second = keys.rotate(gate.records, PEPPER, first.key.id, "1h")
    for secret in (first.secret, second.secret):
        assert (await gate.keys.authenticate(secret)).key_id == first.key.id
    third = keys.rotate(gate.records, PEPPER, first.key.id, "2h")
    gate.clock.now += CACHE_S
    assert await gate.is_refused(first.secret)
    assert not await gate.is_refused(second.secret)
    gate.wall.now += 2 * 3600 + 1
    assert await gate.is_refused(second.secret)
    assert not await gate.is_refused(third.secret)


async def test_a_key_under_an_old_pepper_is_hashed_anew_when_it_is_used(store: Store) -> None:
    old, current = b"o" * 32, b"c" * 32
    gate = make_gate(store, Pepper((current, old)))
    minted = gate.mint(Pepper((old,)))
    assert (await gate.keys.authenticate(minted.secret)).key_id == minted.key.id
    wanted = Pepper((current,)).hash(minted.secret)
    await eventually(lambda: gate.records.keys.get(minted.key.id).value.hash == wanted.hash)
    assert gate.records.keys.get(minted.key.id).value.pepper == wanted.pepper
    assert not await make_gate(store, Pepper((current,))).is_refused(minted.secret)


async def test_uses_are_written_to_the_minute_and_not_for_every_request(gate: Gate) -> None:
    minted = gate.mint()

    def last_used() -> float | None:
        return gate.records.keys.get(minted.key.id).value.last_used_at

    for _ in range(50):
        await gate.keys.authenticate(minted.secret)
    await eventually(lambda: last_used() == gate.wall.now)
    first = gate.wall.now
    gate.clock.now += CACHE_S
    gate.wall.now += 59
    await gate.keys.authenticate(minted.secret)
    await asyncio.sleep(0.05)
    assert last_used() == first
    gate.wall.now += 1
    await gate.keys.authenticate(minted.secret)
    await eventually(lambda: last_used() == gate.wall.now)


async def test_uses_that_the_store_does_not_take_are_written_later(gate: Gate) -> None:
    minted = gate.mint()
    await gate.keys.authenticate(minted.secret)
    gate.outage.fail()
    await asyncio.sleep(0.05)
    assert gate.records.keys.get(minted.key.id).value.last_used_at is None
    gate.outage.end()
    await eventually(lambda: gate.records.keys.get(minted.key.id).value.last_used_at == gate.wall.now)


async def test_what_changes_a_key_meanwhile_is_kept_when_its_use_is_written(gate: Gate) -> None:
    minted = gate.mint()
    await gate.keys.authenticate(minted.secret)
    keys.update(gate.records, minted.key.id, lambda key: key.model_copy(update={"name": "new"}), audit.cli_actor())
    await eventually(lambda: gate.records.keys.get(minted.key.id).value.last_used_at is not None)
    assert gate.records.keys.get(minted.key.id).value.name == "new"
