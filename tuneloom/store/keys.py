"""What the secret of a key stands for, by the records. The one place where keys are looked up by their secrets."""

import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tuneloom.domain import ApiKey
from tuneloom.store.base import StoreConflict
from tuneloom.store.records import Records

ATTEMPTS = 3
# A use is written down unless one this close before it is.
USE_INTERVAL_S = 60.0


class Hashed(Protocol):
    """The hash of a secret, and the id of the pepper that it was made with."""

    @property
    def hash(self) -> str: ...
    @property
    def pepper(self) -> str: ...


@dataclass(frozen=True)
class Found:
    """A key, and how its secret was recognised. `ends_at` is when this secret ends, sooner perhaps than the key."""

    key: ApiKey
    hash: str
    ends_at: float | None

    @property
    def is_previous(self) -> bool:
        return self.hash != self.key.hash

    def works(self, at: float) -> bool:
        """Whether this secret of the key is good at that time."""
        return self.key.revoked_at is None and (self.ends_at is None or at < self.ends_at)


def find_secret(records: Records, hashes: Sequence[Hashed]) -> Found | None:
    """The key of a secret by the forms in which it may be stored, the likeliest first. It may be revoked or expired."""
    for each in hashes:
        if found := _by_hash(records, each.hash):
            return found
    # Between the looks it may have been hashed anew, from an older form to the first.
    return _by_hash(records, hashes[0].hash) if len(hashes) > 1 else None


def note_use(records: Records, id: str, used_at: float, *, seen: str = "", fresh: Hashed | None = None) -> None:
    """Write down that a key was used, and `fresh` as the hash of its secret if that is still the one `seen`.

    Done best: if other writers are faster time and again, a later use is written down.
    """
    for _ in range(ATTEMPTS):
        stored = records.keys.find(id)
        if stored is None or stored.value.revoked_at is not None:
            return
        changed = _used(stored.value, used_at, seen, fresh)
        if changed == stored.value:
            return
        try:
            records.commit(records.keys.replace(stored, changed))
        except StoreConflict:
            time.sleep(0.01)
        else:
            return


def _used(key: ApiKey, used_at: float, seen: str, fresh: Hashed | None) -> ApiKey:
    update: dict[str, object] = {}
    if used_at - (key.last_used_at or 0) >= USE_INTERVAL_S:
        update["last_used_at"] = used_at
    if fresh is not None and key.hash == seen:
        update |= {"hash": fresh.hash, "pepper": fresh.pepper}
    return key.model_copy(update=update)


def _by_hash(records: Records, hash: str) -> Found | None:
    for stored in records.keys.query({"hash": hash}, limit=1):
        if hmac.compare_digest(stored.value.hash, hash):
            return Found(stored.value, hash, stored.value.expires_at)
    for stored in records.keys.query({"previous.hash": hash}, limit=1):
        key = stored.value
        if key.previous is not None and hmac.compare_digest(key.previous.hash, hash):
            ends = [at for at in (key.expires_at, key.previous.ends_at) if at is not None]
            return Found(key, hash, min(ends))
    return None
