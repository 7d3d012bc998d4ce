"""Queries of the seam as Firestore's structured queries."""

from collections.abc import Mapping
from typing import Any

from tuneloom.store.base import Range, Scalar, split_path
from tuneloom.store.firestore_values import ID, path_of, to_indexed
from tuneloom.store.limits import (
    check_bounds,
    check_collection,
    check_cursor,
    check_field,
    check_path,
    is_document_id,
    is_searchable,
    rank_of,
)

_NAME = "__name__"
_BOUNDS = (
    ("above", "GREATER_THAN"),
    ("at_least", "GREATER_THAN_OR_EQUAL"),
    ("below", "LESS_THAN"),
    ("at_most", "LESS_THAN_OR_EQUAL"),
)


def structured(
    root: str,
    collection: str,
    where: Mapping[str, Scalar],
    order_by: str,
    *,
    descending: bool,
    bounds: Range,
    after: tuple[Scalar, str] | None,
) -> dict[str, Any] | None:
    """The query without its limit; None if no document can fit. `root` begins the names of documents.

    Raises:
        InvalidRequest: a name, value, bound or cursor is none of the seam's.
    """
    check_collection(collection)
    filters = [_equals(path, value) for path, value in where.items()]
    if order_by != "id":
        check_field(order_by)
    check_bounds(order_by, bounds)
    limits = [(op, value) for name, op in _BOUNDS if (value := getattr(bounds, name)) is not None]
    ranks = {rank_of(value) for _, value in limits}
    if None in filters or len(ranks) > 1 or (order_by == "id" and not ranks <= {rank_of("")}):
        return None
    ids = [value for _, value in limits] if order_by == "id" else []
    if after is not None:
        check_cursor(order_by, after)
        ids.append(after[1])
    # Names are read forwards only, unless an index on another field is read; and a name must be one.
    is_backwards = descending and order_by == "id" and not where
    names = ID if is_backwards or not all(is_document_id(str(id)) for id in ids) else _NAME
    order = names if order_by == "id" else path_of(order_by)
    orders = [order] if order_by == "id" else [order, names]

    def operand(field: str, value: Scalar) -> dict[str, Any]:
        return {"referenceValue": f"{root}/{collection}/{value}"} if field == _NAME else to_indexed(value)

    for op, value in limits:
        filters.append({"fieldFilter": {"field": {"fieldPath": order}, "op": op, "value": operand(order, value)}})
    direction = "DESCENDING" if descending else "ASCENDING"
    query: dict[str, Any] = {
        "from": [{"collectionId": collection}],
        "orderBy": [{"field": {"fieldPath": field}, "direction": direction} for field in orders],
    }
    if filters:
        query["where"] = filters[0] if len(filters) == 1 else {"compositeFilter": {"op": "AND", "filters": filters}}
    if after is not None:
        value, id = after
        values = [operand(order, id if order_by == "id" else value), operand(names, id)]
        query["startAt"] = {"values": values[: len(orders)], "before": False}
    return query


def _equals(path: str, value: Scalar) -> dict[str, Any] | None:
    field = {"fieldPath": path_of(*check_path(split_path(path)))}
    if not is_searchable(value):
        return None
    if value is None:
        return {"unaryFilter": {"field": field, "op": "IS_NULL"}}
    return {"fieldFilter": {"field": field, "op": "EQUAL", "value": to_indexed(value)}}
