"""Who may look after which keys. `admin` may all; `account` those of its owner that may do no more than itself.

So nobody gains by making or rotating a key: not a scope, not a model, not a day.
"""

from tuneloom.domain import ApiKey, Principal
from tuneloom.errors import PermissionDenied


def owner_of(principal: Principal, wanted: str | None) -> str | None:
    """Whose keys a call is about: None is everybody's, for an admin who names nobody.

    Raises:
        PermissionDenied: the caller has neither scope, or asks for another owner without being an admin.
    """
    if "admin" in principal.scopes:
        return wanted
    principal.require("account")
    if wanted not in (None, principal.owner):
        raise PermissionDenied("Only a key with the scope `admin` may look after the keys of other owners.")
    return principal.owner


def may_see(principal: Principal, key: ApiKey) -> bool:
    """Whether the key is about nothing that the caller's own is not for."""
    return "admin" in principal.scopes or not principal.models or _is_within(principal, key)


def check_covers(principal: Principal, key: ApiKey) -> None:
    """Refuse a key that may do what the caller may not.

    Raises:
        PermissionDenied: it has another scope, reaches other models, or ends later.
    """
    if "admin" in principal.scopes:
        return
    more = [scope for scope in key.scopes if scope not in principal.scopes]
    if more:
        raise PermissionDenied(f"The key has or would have the scope `{more[0]}`, which yours lacks.", param="scopes")
    if principal.models and not _is_within(principal, key):
        allowed = ", ".join(f"`{name}`" for name in principal.models)
        raise PermissionDenied(
            f"Your key is only for {allowed}; another one must be for these or fewer.", param="models"
        )
    if not _ends_in_time(principal, key):
        raise PermissionDenied(
            "Your key ends before this one does or would: ask for an earlier end.", param="expires_in"
        )


def inherit_end(principal: Principal, key: ApiKey) -> ApiKey:
    """A new key that was given no end, with the end of the caller's own."""
    if key.expires_at is not None or "admin" in principal.scopes:
        return key
    return key.model_copy(update={"expires_at": principal.expires_at})


def _ends_in_time(principal: Principal, key: ApiKey) -> bool:
    return principal.expires_at is None or (key.expires_at is not None and key.expires_at <= principal.expires_at)


def _is_within(principal: Principal, key: ApiKey) -> bool:
    return bool(key.models) and set(key.models) <= set(principal.models)
