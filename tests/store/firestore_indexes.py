"""Which indexes Firestore needs for the queries that the code makes, read from the code.

`python -m tests.store.firestore_indexes` writes `cluster/firestore.indexes.json`. Firestore answers conditions on
several fields by merging single-field indexes; conditions with an order by another field need a composite index, which
ends with `__name__` in the same direction (https://firebase.google.com/docs/firestore/query-data/index-overview).
"""

import ast
import json
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloom.control import departures
from tuneloom.store.base import field_path, split_path
from tuneloom.store.firestore_values import COMMIT, DATA, ID, TEXT, path_of
from tuneloom.store.records import Records, Table

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "cluster" / "firestore.indexes.json"

TABLES = {
    name: table.collection
    for name, table in vars(Records(None)).items()  # type: ignore[arg-type]
    if isinstance(table, Table)
}
_BOTH = ("ASCENDING", "DESCENDING")


@dataclass(frozen=True, order=True)
class Shape:
    """What of a query decides its index. `equal` are keys of `where`, sorted."""

    collection: str
    equal: tuple[str, ...] = ()
    order_by: str = "id"
    descending: bool = False

    @property
    def is_composite(self) -> bool:
        return bool(self.equal) and self.order_by not in ("id", *self.equal)


def shape(table: str, *equal: str, order_by: str = "id", descending: bool = False) -> Shape:
    return Shape(TABLES[table], tuple(sorted(equal)), order_by, descending)


# What the calls ask whose table, conditions or order are not written where the call is, by file and function. An empty
# list: no query of records, or one that is declared where it comes from.
DECLARED: dict[str, list[Shape]] = {
    "control/api_audit.py:read_entries": [
        shape("audit_entries", *where, order_by="created_at", descending=descending)
        for where in ((), ("owner",), ("action",))
        for descending in (False, True)
    ],
    "control/api_files.py:FilesApi._list": [
        shape("files", *where, order_by="created_at", descending=descending)
        for where in (("owner",), ("owner", "purpose"))
        for descending in (False, True)
    ],
    "control/api_jobs.py:JobsApi._page_of": [
        shape("events", "job_id", descending=True),
        shape("checkpoints", "job_id", order_by="step", descending=True),
    ],
    "control/departures.py:_empty": [shape(table, "owner") for table in (*departures.FIRST, *departures.REST)],
    "control/drafting/duplicates.py:Seen._is_near": [],
    "control/pages.py:read_page": [],
    "control/webhook_dispatcher.py:Dispatcher.tick": [shape("webhook_deliveries", "state", order_by="next_at")],
    "control/webhook_dispatcher.py:Dispatcher.sweep": [shape("webhook_deliveries", order_by="done_at")],
    "serve/api_bases.py:BasesApi._names": [shape("versions", "adapter.sha256")],
    "store/check.py:_all": [shape(table) for table in TABLES],
    "store/copy.py:_all": [shape(table) for table in TABLES],
    "store/records.py:Table.query": [],
    "store/usage.py:spent.read_days": [shape("usage_months", "owner")],
    "store/usage.py:_all": [
        shape(table, *where) for table in ("usage_parts", "usage_rows") for where in ((), ("owner",))
    ],
    "store/usage_rollup.py:_drop": [shape("usage_rows"), shape("usage_folds")],
}


def entries(shapes: Iterable[Shape]) -> dict[str, Any]:
    """The index file for these queries."""
    shapes = sorted(set(shapes))
    fields: dict[tuple[str, str], tuple[str, ...]] = {}
    for collection in sorted(TABLES.values()):
        for name in (COMMIT, DATA, ID, TEXT):
            fields[collection, name] = ()
    for each in shapes:
        for path in _single(each):
            fields[each.collection, path] = _BOTH
    return {
        "indexes": [_composite(each) for each in shapes if each.is_composite],
        "fieldOverrides": [_override(*key, orders) for key, orders in sorted(fields.items())],
    }


def missing(each: Shape, file: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries that the file would need for this query, and has not."""
    wanted = [_composite(each)] if each.is_composite else [_override(each.collection, p, _BOTH) for p in _single(each)]
    have = [*file["indexes"], *file["fieldOverrides"]]
    return [entry for entry in wanted if entry not in have]


def _single(each: Shape) -> list[str]:
    """The Firestore fields whose own indexes answer the query; none if a composite one does."""
    if each.is_composite:
        return []
    paths = [path_of(*split_path(path)) for path in each.equal]
    if each.order_by == "id":
        return paths or ([ID] if each.descending else [])
    return paths or [path_of(each.order_by)]


def _composite(each: Shape) -> dict[str, Any]:
    order = "DESCENDING" if each.descending else "ASCENDING"
    fields = [{"fieldPath": path_of(*split_path(path)), "order": "ASCENDING"} for path in each.equal]
    fields += [{"fieldPath": path, "order": order} for path in (path_of(each.order_by), "__name__")]
    return {"collectionGroup": each.collection, "queryScope": "COLLECTION", "fields": fields}


def _override(collection: str, path: str, orders: tuple[str, ...]) -> dict[str, Any]:
    indexes = [{"order": order, "queryScope": "COLLECTION"} for order in orders]
    return {"collectionGroup": collection, "fieldPath": path, "indexes": indexes}


@dataclass(frozen=True)
class Call:
    """A call of `query` or `read_page` in the code. `shapes` is None if they cannot be read from it."""

    place: str
    line: int
    shapes: tuple[Shape, ...] | None


def calls() -> Iterator[Call]:
    """Every call in tuneloom that asks the store for documents."""
    for path in sorted((ROOT / "tuneloom").rglob("*.py")):
        name = str(path.relative_to(ROOT / "tuneloom"))
        if not name.startswith(("store/sqlite", "store/firestore")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            has_pages = any(
                isinstance(node, ast.ImportFrom)
                and node.module == "tuneloom.control.pages"
                and any(alias.name == "read_page" for alias in node.names)
                for node in ast.walk(tree)
            )
            yield from _Reader(name, has_pages).read(tree, [])


class _Reader:
    """Finds the calls of one file, each with the function it stands in."""

    def __init__(self, name: str, has_pages: bool) -> None:
        self._name = name
        self._has_pages = has_pages

    def read(self, node: ast.AST, inside: list[ast.AST]) -> Iterator[Call]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = [*inside, node]
        if isinstance(node, ast.Call) and (arguments := self._arguments(node)):
            place = ".".join(each.name for each in inside if not isinstance(each, ast.Module))  # type: ignore[attr-defined]
            yield Call(f"{self._name}:{place}", node.lineno, self._shapes(node, *arguments, inside))
        for child in ast.iter_child_nodes(node):
            yield from self.read(child, inside)

    def _arguments(self, call: ast.Call) -> tuple[ast.AST, ast.AST | None] | None:
        """(table, where) if it is such a call."""
        if isinstance(call.func, ast.Attribute) and call.func.attr == "query":
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            return call.func.value, call.args[0] if call.args else given.get("where")
        if isinstance(call.func, ast.Name) and call.func.id == "read_page" and self._has_pages:
            return call.args[0], call.args[1]
        return None

    def _shapes(
        self, call: ast.Call, table: ast.AST, where: ast.AST | None, inside: list[ast.AST]
    ) -> tuple[Shape, ...] | None:
        scope = next((each for each in reversed(inside) if not isinstance(each, ast.ClassDef)), None)
        collection = _collection(table, scope)
        conditions = _conditions(where, scope)
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        order = given.get("order_by", ast.Constant("id"))
        is_pages = isinstance(call.func, ast.Name)
        descending = given.get("descending", ast.Constant(is_pages))
        if collection is None or conditions is None or not isinstance(order, ast.Constant) or None in given:
            return None
        ways = [descending.value] if isinstance(descending, ast.Constant) else [False, True]
        return tuple(Shape(collection, equal, str(order.value), way) for equal in conditions for way in ways)


def _collection(node: ast.AST, scope: ast.AST | None) -> str | None:
    if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("records"):
        return TABLES.get(node.attr)
    if isinstance(node, ast.Name) and (value := _only_value(node.id, scope)) is not None:
        return _collection(value, None)
    return None


def _conditions(node: ast.AST | None, scope: ast.AST | None) -> list[tuple[str, ...]] | None:
    """The keys of `where`, for each form that it may have."""
    match node:
        case None | ast.Constant(value=None):
            return [()]
        case ast.Dict():
            if all(isinstance(key, ast.Constant) for key in node.keys):
                return [tuple(sorted(key.value for key in node.keys if isinstance(key, ast.Constant)))]
        case ast.IfExp():
            forms = [_conditions(node.body, scope), _conditions(node.orelse, scope)]
            if forms[0] is not None and forms[1] is not None:
                return forms[0] + forms[1]
        case ast.Name() if (value := _only_value(node.id, scope)) is not None:
            return _conditions(value, None)
    return None


def _only_value(name: str, scope: ast.AST | None) -> ast.AST | None:
    """What a local name stands for, if it is set once and not changed."""
    found: list[ast.AST | None] = []
    for node in ast.walk(scope) if scope is not None else ():
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign):
            targets, value = list(node.targets), node.value
        elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.For):
            targets, value = [node.target], node.value if isinstance(node, ast.AnnAssign) else None
        elif isinstance(node, ast.arg) and node.arg == name:
            return None
        for target in targets:
            if isinstance(target, ast.Tuple):
                names = [each.id for each in target.elts if isinstance(each, ast.Name)]
                values = list(value.elts) if isinstance(value, ast.Tuple) else [None] * len(names)
                found += [values[names.index(name)]] if name in names and len(values) == len(names) else []
            elif isinstance(target, ast.Name) and target.id == name:
                found.append(value)
            elif isinstance(target, ast.Subscript) and ast.unparse(target.value) == name:
                return None
    return found[0] if len(found) == 1 else None


def declared() -> set[Shape]:
    """All queries that the code makes, as far as it is known."""
    read = {each for call in calls() for each in call.shapes or ()}
    return read | {each for shapes in DECLARED.values() for each in shapes}


def render(shapes: Iterable[Shape]) -> str:
    return json.dumps(entries(shapes), indent=2) + "\n"


def recorded(collection: str, where: Any, order_by: str, descending: bool) -> Shape:
    """The shape of a query that was made."""
    return Shape(collection, tuple(sorted(field_path(*split_path(key)) for key in where or {})), order_by, descending)


def is_asked_by_tuneloom() -> bool:
    """Whether the query that is being made comes from the code, and not from a test that looks into the store."""
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(sys._getframe(2)))
    caller = next(file for file in files if not file.endswith("/store/records.py"))
    return caller.startswith(str(ROOT / "tuneloom"))


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(render(declared()), encoding="utf-8")
