import pytest

from tests.serve.conftest import Service
from tuneloom.errors import Unauthenticated
from tuneloom.serve.auth import looks_like_jwt, read_bearer

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("header", ["Bearer sk-1", "bearer sk-1", "BEARER   sk-1 "])
def test_a_bearer_token_is_read_whatever_the_case_of_its_scheme(header: str) -> None:
    assert read_bearer(header) == "sk-1"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc"])
def test_a_request_without_a_token_is_told_how_to_send_one(header: str | None) -> None:
    with pytest.raises(Unauthenticated, match="Authorization: Bearer") as caught:
        read_bearer(header)
    assert caught.value.code is None


def test_keys_do_not_look_like_tokens_of_people() -> None:
    assert looks_like_jwt("eyJhbGciOi.eyJzdWIi.c2ln")
    assert not looks_like_jwt("sk-eyJ.a.b")


async def test_two_keys_in_one_request_are_none(service: Service) -> None:
    one, other = (f"Bearer {service.key(owner)}" for owner in ("ada", "bob"))
    async with service.http() as client:
        refused = await client.get("/v1/models", headers=[("authorization", one), ("authorization", other)])
        twice = await client.get("/v1/models", headers=[("authorization", one), ("authorization", one)])
    assert (refused.status_code, twice.status_code) == (400, 200)
    assert "Authorization" in refused.json()["error"]["message"]


async def test_a_refusal_names_the_scheme_as_http_asks_for(service: Service) -> None:
    async with service.http("sk-wrong") as client:
        assert (await client.get("/v1/models")).headers["www-authenticate"] == "Bearer"


async def test_only_urls_of_the_api_need_a_caller(service: Service) -> None:
    async with service.http() as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
