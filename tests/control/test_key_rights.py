import pytest

from tuneloom.control.key_rights import check_covers, owner_of
from tuneloom.domain import ApiKey, Principal
from tuneloom.errors import PermissionDenied


def who(*scopes: str, models: tuple[str, ...] = (), ends: float | None = None) -> Principal:
    return Principal(owner="ada", key_id="key_1", scopes=scopes, models=models, expires_at=ends)


def key(*scopes: str, models: tuple[str, ...] = (), ends: float | None = None) -> ApiKey:
    fields = {"name": "", "hash": "h", "redacted": "r", "created_at": 1.0}
    return ApiKey(id="key_2", owner="ada", scopes=scopes, models=models, expires_at=ends, **fields)


def test_an_admin_looks_after_everybodys_keys_and_an_account_after_its_owners():
    assert owner_of(who("admin"), None) is None
    assert owner_of(who("admin"), "bob") == "bob"
    assert owner_of(who("account"), None) == "ada"
    assert owner_of(who("account"), "ada") == "ada"


@pytest.mark.parametrize(("principal", "wanted"), [(who("account"), "bob"), (who("training"), None)])
def test_others_are_refused(principal, wanted):
    with pytest.raises(PermissionDenied):
        owner_of(principal, wanted)


@pytest.mark.parametrize(
    ("principal", "wanted", "is_covered"),
    [
        (who("admin"), key("admin", "training"), True),
        (who("account", "inference"), key("inference"), True),
        (who("account", "inference"), key("account", "inference"), True),
        (who("account", "inference"), key("inference", "training"), False),
        (who("account", "training"), key("admin"), False),
        (who("account", models=("bot",)), key("account", models=("bot",)), True),
        (who("account", models=("bot", "cat")), key("account", models=("cat",)), True),
        (who("account", models=("bot",)), key("account", models=("bot", "cat")), False),
        (who("account", models=("bot",)), key("account"), False),
        (who("account", ends=9.0), key("account", ends=9.0), True),
        (who("account", ends=9.0), key("account", ends=9.1), False),
        (who("account", ends=9.0), key("account"), False),
        (who("admin", ends=9.0), key("account"), True),
    ],
)
def test_nobody_looks_after_a_key_that_may_do_more(principal, wanted, is_covered):
    if is_covered:
        check_covers(principal, wanted)
        return
    with pytest.raises(PermissionDenied):
        check_covers(principal, wanted)
