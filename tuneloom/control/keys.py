"""API keys: made, listed, revoked. A secret is seen once, by the caller of `mint`; the store keeps its keyed hash."""

import base64
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass

from tuneloom.control.retry import retry
from tuneloom.domain import ALL_SCOPES, OWNER, ApiKey, Scope, hash_secret, new_id
from tuneloom.errors import InvalidRequest, NotFound
from tuneloom.store.records import Records, Stored

DEFAULT_SCOPES: tuple[Scope, ...] = ("inference", "training")
MAX_LIFE_S = 10 * 365 * 86400.0

_DURATION = re.compile(r"(\d{1,10})([smhdw]?)")
_UNIT_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Minted:
    """A key and, this once, its secret."""

    key: ApiKey
    secret: str


def mint(
    records: Records,
    pepper: bytes,
    *,
    owner: str,
    name: str = "",
    scopes: Iterable[str] = DEFAULT_SCOPES,
    expires_in: str | int | None = None,
) -> Minted:
    """Make a key of `owner` that ends after `expires_in` (`30d`, `12h`, seconds), or never."""
    minted = draft(pepper, owner=owner, name=name, scopes=scopes, expires_in=expires_in)
    records.commit(records.keys.create(minted.key))
    return minted


def draft(
    pepper: bytes, *, owner: str, name: str, scopes: Iterable[str], expires_in: str | int | None, id: str | None = None
) -> Minted:
    """A checked key with a fresh secret, not stored.

    Raises:
        InvalidRequest: owner, name, scopes or expiry may not be so; `param` names which.
    """
    secret = new_secret()
    now = time.time()
    life_s = parse_duration(expires_in)
    key = ApiKey(
        id=id or new_id("key_"),
        owner=check_owner(owner),
        name=_check_name(name),
        hash=hash_secret(pepper, secret),
        redacted=redact(secret),
        scopes=_check_scopes(scopes),
        created_at=now,
        expires_at=None if life_s is None else now + life_s,
    )
    return Minted(key, secret)


def list_keys(records: Records, owner: str | None = None) -> list[ApiKey]:
    """The keys of an owner, or of everybody, newest first."""
    where = None if owner is None else {"owner": owner}
    return [stored.value for stored in records.keys.query(where, order_by="created_at", descending=True)]


def revoke(records: Records, id: str) -> ApiKey:
    """End a key; one that is revoked already stays as it is.

    Raises:
        NotFound: there is no such key.
    """

    def once() -> ApiKey:
        stored = find_key(records, id)
        if stored.value.revoked_at is not None:
            return stored.value
        revoked = stored.value.model_copy(update={"revoked_at": time.time()})
        records.commit(records.keys.replace(stored, revoked))
        return revoked

    return retry(once)


def rotate(records: Records, pepper: bytes, id: str) -> Minted:
    """Give a key a new secret; the one before it ends."""
    secret = new_secret()

    def once() -> Minted:
        stored = find_key(records, id)
        key = stored.value.model_copy(update={"hash": hash_secret(pepper, secret), "redacted": redact(secret)})
        records.commit(records.keys.replace(stored, key))
        return Minted(key, secret)

    return retry(once)


def find_key(records: Records, id: str) -> Stored[ApiKey]:
    stored = records.keys.find(id)
    if stored is None:
        raise NotFound(f"No such key: `{id}`.", param="id")
    return stored


def new_secret() -> str:
    """`sk-` and 32 random bytes in 43 characters of URL-safe base 64."""
    return "sk-" + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")


def redact(secret: str) -> str:
    return f"{secret[:6]}...{secret[-4:]}"


def parse_duration(value: str | int | None, *, param: str = "expires_in") -> float | None:
    """Seconds of `30d`, `12h`, `90m`, `2w` or a number of seconds; None stays None."""
    if value is None:
        return None
    match = _DURATION.fullmatch(str(value).strip())
    seconds = int(match[1]) * _UNIT_S[match[2]] if match else 0
    if not 0 < seconds <= MAX_LIFE_S:
        raise InvalidRequest(
            f"Invalid `{param}`: {str(value)[:40]!r}. Use seconds or a duration such as `12h`, `30d` or `4w`, "
            "at most ten years.",
            param=param,
        )
    return float(seconds)


def check_owner(owner: str) -> str:
    """Return `owner` if it may name an owner; it becomes a part of ids and model names."""
    if not OWNER.fullmatch(owner):
        raise InvalidRequest(
            f"Invalid `owner`: {owner[:80]!r}. Use 1 to 128 letters, digits, `.`, `_` or `-`, starting and ending "
            "with a letter or digit.",
            param="owner",
        )
    return owner


def _check_name(name: str) -> str:
    if len(name) > 128 or not name.isprintable():
        raise InvalidRequest("Invalid `name`. Use at most 128 printable characters.", param="name")
    return name


def _check_scopes(scopes: Iterable[str]) -> tuple[Scope, ...]:
    wanted = set(scopes)
    unknown = sorted(wanted - set(ALL_SCOPES))
    if unknown or not wanted:
        what = f"Unknown scope {unknown[0][:40]!r}" if unknown else "`scopes` is empty"
        choices = ", ".join(f"`{scope}`" for scope in ALL_SCOPES)
        raise InvalidRequest(f"{what}. Choose among {choices}.", param="scopes")
    return tuple(scope for scope in ALL_SCOPES if scope in wanted)
