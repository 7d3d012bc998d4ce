import time

import httpx2
import openai
import pytest

from tests.control.conftest import PEPPER, assert_error
from tuneloom.store.keys import find_secret

PATH = "/v1/organization/admin_api_keys"
ADMIN = "root:admin"
pytestmark = pytest.mark.anyio


@pytest.fixture
def admin_keys(api):
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=api.app))
    client = openai.AsyncOpenAI(api_key="x", admin_api_key=ADMIN, base_url="http://tuneloom/v1", http_client=http)
    return client.admin.organization.admin_api_keys


async def test_the_openai_client_makes_lists_and_deletes_admin_keys(api, admin_keys):
    made = await admin_keys.create(name="ci", expires_in_seconds=600)
    assert made.expires_at == pytest.approx(time.time() + 600, abs=30)
    found = find_secret(api.store.records, PEPPER.hashes(made.value))
    assert found is not None and (found.key.id, found.key.owner, found.key.scopes) == (made.id, "root", ("admin",))
    second = await admin_keys.create(name="other")
    api.post("/v1/tuneloom/keys", json={"scopes": ["inference"]}, key=ADMIN)

    assert [key.id async for key in admin_keys.list(limit=1)] == [made.id, second.id]
    assert [key.id async for key in admin_keys.list(order="desc")] == [second.id, made.id]
    assert (await admin_keys.retrieve(made.id)).owner.id == "root"
    assert (await admin_keys.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await admin_keys.retrieve(made.id)
    assert api.store.records.keys.get(made.id).value.revoked_at is not None
    actions = [stored.value.action for stored in api.store.records.audit_entries.query(order_by="created_at")]
    assert actions == ["api_key.created"] * 3 + ["api_key.deleted"]


def test_a_retried_creation_is_one_key(api):
    first = api.post(PATH, json={"name": "x"}, key=ADMIN).json()
    second = api.post(PATH, json={"name": "x"}, key=ADMIN, headers={"x-stainless-retry-count": "1"}).json()
    assert second["id"] == first["id"]
    assert find_secret(api.store.records, PEPPER.hashes(second["value"])) is not None


def test_other_keys_are_not_found_here_and_others_may_not_look(api):
    other = api.post("/v1/tuneloom/keys", json={"scopes": ["inference"]}, key=ADMIN).json()["id"]
    for method in ("GET", "DELETE"):
        foreign = api.call(method, f"{PATH}/{other}", key=ADMIN)
        absent = api.call(method, f"{PATH}/key_none", key=ADMIN)
        assert foreign.status_code == absent.status_code == 404
        assert foreign.content == absent.content.replace(b"key_none", other.encode())
        assert_error(api.call(method, f"{PATH}/{other}", key="ada:account,training"), 403, None, "`admin`")
    assert_error(api.post(PATH, json={"name": "x"}, key="ada:account"), 403, None, "`admin`")
    assert_error(api.get(PATH, key="ada:account"), 403, None, "`admin`")


@pytest.mark.parametrize(
    ("body", "param"), [({}, "name"), ({"name": "x", "expires_in_seconds": 0}, "expires_in_seconds")]
)
def test_what_is_wrong_is_named(api, body, param):
    assert_error(api.post(PATH, json=body, key=ADMIN), 400, param)
