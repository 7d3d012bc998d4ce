"""Lists of the API: one page after a cursor, newest or oldest first, with `has_more`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tuneloom.domain import Record
from tuneloom.store.base import Scalar
from tuneloom.store.records import Table

T = TypeVar("T", bound=Record)

CHUNK = 500


@dataclass(frozen=True)
class Page(Generic[T]):
    items: list[T]
    has_more: bool

    def body(self, show: Callable[[T], dict[str, Any]]) -> dict[str, Any]:
        """The list object, each item as `show` gives it."""
        data = [show(item) for item in self.items]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": self.has_more,
        }


def read_page(
    table: Table[T],
    where: Mapping[str, Scalar],
    *,
    order_by: str,
    limit: int,
    after: T | None = None,
    descending: bool = True,
    keep: Callable[[T], bool] = lambda _: True,
) -> Page[T]:
    """At most `limit` records that `keep` accepts, after the record `after`."""
    items: list[T] = []
    while True:
        size = min(limit + 1, CHUNK)
        batch = table.query(where, order_by=order_by, descending=descending, limit=size, after=after)
        for stored in batch:
            if keep(stored.value):
                items.append(stored.value)
            if len(items) > limit:
                return Page(items[:limit], True)
        if len(batch) < size:
            return Page(items, False)
        after = batch[-1].value
