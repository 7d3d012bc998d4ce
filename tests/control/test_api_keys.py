import pytest

from tests.control.conftest import PEPPER, assert_error

KEYS = "/v1/tuneloom/keys"
ADMIN = "root:admin"


def find(api, secret: str) -> list[str]:
    return [s.value.id for s in api.store.records.keys.query({"hash": PEPPER.hash(secret).hash})]


def test_an_admin_makes_a_key_for_an_owner_sees_its_secret_once_and_revokes_it(api):
    body = {"name": "laptop", "owner": "ada", "scopes": ["inference"], "expires_in": "30d"}
    made = api.post(KEYS, json=body, key=ADMIN).json()
    assert find(api, made["secret"]) == [made["id"]]
    assert (made["owner"], made["scopes"]) == ("ada", ["inference"])
    assert made["expires_at"] - made["created_at"] == 30 * 86400
    listed = api.get(KEYS, key=ADMIN).json()["data"]
    assert [key["id"] for key in listed] == [made["id"]]
    assert made["secret"] not in str(listed)
    assert api.get(KEYS, params={"owner": "bob"}, key=ADMIN).json()["data"] == []
    assert api.delete(f"{KEYS}/{made['id']}", key=ADMIN).json()["revoked_at"] is not None


def test_a_retried_creation_is_one_key_with_the_secret_that_was_seen(api):
    first = api.post(KEYS, json={"name": "x"}, key=ADMIN).json()
    second = api.post(KEYS, json={"name": "x"}, key=ADMIN, headers={"x-stainless-retry-count": "1"}).json()
    assert second["id"] == first["id"]
    assert find(api, second["secret"]) == [first["id"]]
    assert find(api, first["secret"]) == []


@pytest.mark.parametrize("key", ["ada:training,inference", "ada:inference"])
def test_keys_are_for_admins(api, key):
    for call in (api.get(KEYS, key=key), api.post(KEYS, json={}, key=key), api.delete(f"{KEYS}/x", key=key)):
        assert_error(call, 403, None, "`account`")


@pytest.mark.parametrize(
    "body, param", [({"scopes": ["root"]}, "scopes"), ({"expires_in": "soon"}, "expires_in"), ({"x": 1}, "x")]
)
def test_what_a_key_may_not_be_is_named(api, body, param):
    assert_error(api.post(KEYS, json=body, key=ADMIN), 400, param)
