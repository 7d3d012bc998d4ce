import time

import pytest

from tests.serve.conftest import PEPPER
from tuneloom.control import keys
from tuneloom.errors import Unauthenticated
from tuneloom.serve.auth import Keys
from tuneloom.store import Store

pytestmark = pytest.mark.anyio
CACHE_S = 2.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_a_revoked_key_is_refused_once_the_cache_ages_out(store: Store) -> None:
    clock = Clock()
    cached = Keys(store.records, PEPPER, cache_s=CACHE_S, clock=clock)
    minted = keys.mint(store.records, PEPPER, owner="ada")
    secret = minted.secret

    assert (await cached.authenticate(secret)).owner == "ada"
    keys.revoke(store.records, minted.key.id)
    assert (await cached.authenticate(secret)).key_id == minted.key.id
    clock.now += CACHE_S
    with pytest.raises(Unauthenticated, match="Incorrect API key"):
        await cached.authenticate(secret)


async def test_a_key_expires_while_it_is_cached(store: Store) -> None:
    wall = Clock()
    wall.now = time.time()
    cached = Keys(store.records, PEPPER, cache_s=CACHE_S, clock=Clock(), now=wall)
    secret = keys.mint(store.records, PEPPER, owner="ada", expires_in=60).secret

    await cached.authenticate(secret)
    wall.now += 61
    with pytest.raises(Unauthenticated, match="expired"):
        await cached.authenticate(secret)


async def test_a_key_works_as_soon_as_it_is_made(store: Store) -> None:
    cached = Keys(store.records, PEPPER, cache_s=CACHE_S)
    draft = keys.draft(PEPPER, owner="ada", name="", scopes=("inference",), expires_in=None)
    with pytest.raises(Unauthenticated):
        await cached.authenticate(draft.secret)
    store.records.commit(store.records.keys.create(draft.key))
    assert (await cached.authenticate(draft.secret)).scopes == ("inference",)


async def test_a_key_of_another_installation_is_unknown(store: Store) -> None:
    secret = keys.mint(store.records, b"q" * 32, owner="ada").secret
    with pytest.raises(Unauthenticated):
        await Keys(store.records, PEPPER, cache_s=CACHE_S).authenticate(secret)
