"""Queries of the seam as SQL. Values are always parameters; names are checked and then part of the text, because
SQLite uses an index on an expression only if the query spells that expression in the same way."""

import json
from collections.abc import Mapping
from typing import Any

from tuneloom.errors import InvalidRequest
from tuneloom.store.base import Range, Scalar, split_path
from tuneloom.store.limits import (
    check_bounds,
    check_collection,
    check_cursor,
    check_field,
    check_path,
    is_searchable,
    rank_of,
)

# What is asked for often: every request looks up a key and a name, every list is an owner's, reconcile asks by state.
INDEXES = {
    "keys": ("hash", "previous.hash", "owner"),
    "audit_entries": ("owner",),
    "events": ("job_id",),
    "versions": ("ft_name", "model", "owner"),
    "checkpoints": ("name", "job_id"),
    "jobs": ("owner", "state", "attempt_open"),
    "speeds": ("kind",),
    "files": ("owner",),
    "models": ("owner",),
    "upload_parts": ("upload_id",),
    "usage_parts": ("owner",),
    "usage_rows": ("owner",),
    "usage_months": ("owner",),
    "webhook_endpoints": ("owner",),
    "webhook_deliveries": ("endpoint_id", "state"),
}

_BOUNDS = (("above", ">"), ("at_least", ">="), ("below", "<"), ("at_most", "<="))


def select(
    collection: str,
    where: Mapping[str, Scalar],
    order_by: str,
    descending: bool,
    bounds: Range,
    limit: int | None,
    after: tuple[Scalar, str] | None,
) -> tuple[str, list[Any]]:
    """The statement that yields (id, rev, data) of the documents, and its parameters."""
    if limit is not None and limit < 0:
        raise InvalidRequest(f"`limit` is {limit}. Use 0 or more.")
    conditions = [f"collection = '{check_collection(collection)}'"]
    values: list[Any] = []
    check_bounds(order_by, bounds)
    order = ["id"] if order_by == "id" else _order(check_field(order_by))
    if order_by != "id":
        conditions.append(f"{order[0]} IS NOT NULL")
    # An owner may have most of the documents, one machine's `local` has all: any other index finds fewer.
    has_better = any(path in INDEXES.get(collection, ()) for path in where if path != "owner")
    clauses = [_equals(path, value, may_use_index=path != "owner" or not has_better) for path, value in where.items()]
    clauses += [_bound(order_by, sign, getattr(bounds, name)) for name, sign in _BOUNDS]
    clauses.append(_beyond(order_by, order, "<" if descending else ">", after))
    for clause, parameters in clauses:
        conditions.append(clause)
        values += parameters
    direction = " DESC" if descending else ""
    statement = (
        f"SELECT id, rev, data FROM documents WHERE {' AND '.join(conditions)} "
        f"ORDER BY {', '.join(term + direction for term in order)} LIMIT ?"
    )
    return statement, [*values, -1 if limit is None else limit]


def holds(data: str, parts: str, value: str) -> bool:
    """SQL function: does the document hold the value (JSON) at these parts (JSON)? For keys no JSON path can spell."""
    found = json.loads(data)
    for part in json.loads(parts):
        if not isinstance(found, dict) or part not in found:
            return False
        found = found[part]
    wanted = json.loads(value)
    return rank_of(found) == rank_of(wanted) and found == wanted


def _equals(path: str, value: Scalar, *, may_use_index: bool) -> tuple[str, list[Any]]:
    parts = check_path(split_path(path))
    if not is_searchable(value):
        return "FALSE", []
    text = json.dumps(value)
    if not all(part.isascii() and part.isidentifier() for part in parts):
        return "holds(data, ?, ?)", [json.dumps(parts), text]
    field = f"'$.{'.'.join(parts)}'"
    if rank_of(value) == 2:
        # Both numbers come from their JSON text by the same conversion, so that equal texts are equal.
        return f"{_type_rank(field)} = 2 AND json_extract(data, {field}) = json_extract(?, '$')", [text]
    # The stored text is compared: exact for every string, and `true` is not 1.
    return f"{'' if may_use_index else '+'}(data -> {field}) = ?", [text]


def _order(field: str) -> list[str]:
    return [_type_rank(f"'$.{field}'"), f"coalesce(json_extract(data, '$.{field}'), 0)", "id"]


def _bound(order_by: str, sign: str, value: Scalar) -> tuple[str, list[Any]]:
    if value is None:
        return "TRUE", []
    if order_by == "id":
        return (f"id {sign} ?", [value]) if isinstance(value, str) else ("FALSE", [])
    rank, field, _ = _order(order_by)
    return f"{rank} = {rank_of(value)} AND {field} {sign} json_extract(?, '$')", [json.dumps(value)]


def _beyond(order_by: str, order: list[str], sign: str, after: tuple[Scalar, str] | None) -> tuple[str, list[Any]]:
    if after is None:
        return "TRUE", []
    check_cursor(order_by, after)
    value, id = after
    if order_by == "id":
        return f"id {sign} ?", [id]
    place = f"({rank_of(value)}, coalesce(json_extract(?, '$'), 0), ?)"
    return f"({', '.join(order)}) {sign} {place}", [json.dumps(value), id]


def _type_rank(field: str) -> str:
    return (
        f"CASE json_type(data, {field}) WHEN 'null' THEN 0 WHEN 'true' THEN 1 WHEN 'false' THEN 1 "
        "WHEN 'integer' THEN 2 WHEN 'real' THEN 2 WHEN 'text' THEN 3 END"
    )
