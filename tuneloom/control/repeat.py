"""Creates that are safe to repeat. A row, written in the same commit as the object, finds the object again.

Two kinds of repetition are known by their headers. OpenAI's clients send a request again after a timeout, a lost
connection or an answer of 5xx, with the same body and `X-Stainless-Retry-Count` above 0: such a retry is answered with
the object of an earlier try, if one got through within `RETRY_WINDOW_S`. `Idempotency-Key` names a request outright.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from tuneloom.control.retry import retry
from tuneloom.domain import Repeat
from tuneloom.errors import Unprocessable
from tuneloom.store.base import Write
from tuneloom.store.records import Records, Stored

RETRY_WINDOW_S = 600.0
KEY_LIFE_S = 48 * 3600.0

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What identifies a create: who asks, which route, what body, which try, and when it arrived."""

    owner: str
    route: str
    body_sha256: str
    arrived_at: float
    retry_count: int = 0
    key: str | None = None

    @property
    def row_id(self) -> str:
        if self.key is not None:
            return "key-" + _digest(self.owner, self.route, self.key)
        return "try-" + _digest(self.owner, self.route, self.body_sha256)

    def is_answered_by(self, row: Repeat) -> bool:
        """Whether `row` holds the answer to this request.

        A first try is a new create, however alike an earlier one was. But it may still be running when its own retry
        overtakes it: then the row was written by a retry, after this request came, and the object is the same one.

        Raises:
            Unprocessable: the idempotency key was used for another body.
        """
        if self.key is not None:
            if row.created_at < self.arrived_at - KEY_LIFE_S:
                return False
            if row.request_sha256 != self.body_sha256:
                raise Unprocessable(
                    "This `Idempotency-Key` was used for a request with another body. Use a new key for a new request."
                )
            return True
        if self.retry_count:
            return row.created_at >= self.arrived_at - RETRY_WINDOW_S
        return row.retry_count > 0 and row.created_at >= self.arrived_at


def create_once(
    records: Records,
    request: Request,
    make: Callable[[], tuple[str, T, Iterable[Write]]],
    load: Callable[[str], T],
) -> T:
    """Create the object that `request` asks for, or find the one that an earlier try of it has created.

    `make` gives (id, object, writes) against what is stored at that moment and may be called several times; `load`
    gives the object of an id, or raises NotFound if it was deleted since.
    """

    def once() -> T:
        row = records.repeats.find(request.row_id)
        if row is not None and request.is_answered_by(row.value):
            return load(row.value.result_id)
        result_id, result, writes = make()
        records.commit(*writes, _write_row(records, request, row, result_id))
        return result

    return retry(once)


def _write_row(records: Records, request: Request, row: Stored[Repeat] | None, result_id: str) -> Write:
    fresh = Repeat(
        id=request.row_id,
        owner=request.owner,
        request_sha256=request.body_sha256,
        result_id=result_id,
        created_at=time.time(),
        retry_count=request.retry_count,
    )
    return records.repeats.create(fresh) if row is None else records.repeats.replace(row, fresh)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()
