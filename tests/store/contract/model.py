"""A store as a plain dictionary: random commits and queries, and what they must give."""

import uuid
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.store.contract.opened import ids
from tuneloom.store.base import Create, Delete, Documents, Increment, Range, Replace, StoreConflict, Write


class DocumentsMachine(RuleBasedStateMachine):
    """Random commits and queries against a plain dictionary that does the same."""

    ID = st.sampled_from("abcdé")
    VALUE = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.sampled_from([0.5, -1.5, 1.0, 1759300000.123456, 2**53 + 1]),
        st.sampled_from(["", "a", "A", "é", "1", "a'b", "\0"]),
    )
    DATA = st.fixed_dictionaries({}, optional={"v": VALUE, "w": st.integers(0, 2), "n": st.integers(-5, 5)})
    STEP = st.tuples(st.sampled_from(["create", "replace", "stale", "delete", "drop", "add"]), ID, DATA)

    def __init__(self, documents: Documents) -> None:
        super().__init__()
        self.documents = documents
        self.model: dict[str, dict[str, Any]] = {}
        self.revs: dict[str, str] = {}
        self.old_revs: set[str] = set()

    @initialize()
    def take_an_empty_collection(self) -> None:
        self.name = f"c{uuid.uuid4().hex}"

    @rule(steps=st.lists(STEP, min_size=1, max_size=4, unique_by=lambda step: step[1]))
    def commit(self, steps: list[tuple[str, str, dict[str, Any]]]) -> None:
        writes = [self.write(*step) for step in steps]
        expected = None if any(not self.is_allowed(write) for write in writes) else dict(self.model)
        try:
            revs = self.documents.commit(writes)
        except StoreConflict:
            assert expected is None
            return
        assert expected is not None, writes
        for write in writes:
            self.apply(write)
        new = {id: rev for (_, id), rev in revs.items()}
        assert set(new) == {write.id for write in writes if not isinstance(write, Delete)}
        assert not set(new.values()) & self.old_revs, "a revision came back"
        self.old_revs |= set(new.values())
        self.revs = {id: new.get(id, self.revs.get(id, "")) for id in self.model}

    @rule(
        where=st.dictionaries(st.sampled_from("vw"), VALUE, max_size=1),
        order_by=st.sampled_from(["id", "v", "n"]),
        descending=st.booleans(),
        low=st.one_of(st.none(), VALUE),
        is_open=st.booleans(),
        limit=st.one_of(st.none(), st.integers(1, 3)),
        cursor=st.one_of(st.none(), ID),
    )
    def query(
        self,
        where: dict[str, Any],
        order_by: str,
        descending: bool,
        low: Any,
        is_open: bool,
        limit: int | None,
        cursor: str | None,
    ) -> None:
        keys = {id: self.key(id, order_by) for id in self.model if order_by == "id" or order_by in self.model[id]}
        chosen = [id for id in keys if all(same(self.model[id], field, value) for field, value in where.items())]
        bounds = None
        if low is not None:
            bounds = Range(above=low) if is_open else Range(at_least=low)
            chosen = [id for id in chosen if admits(keys[id], low, is_open)]
        chosen.sort(key=keys.__getitem__, reverse=descending)
        after = None
        if cursor in keys:
            after = (cursor if order_by == "id" else self.model[cursor][order_by], cursor)
            mark = keys[cursor]
            chosen = [id for id in chosen if (keys[id] < mark if descending else keys[id] > mark)]
        found = self.documents.query(
            self.name, where, order_by=order_by, descending=descending, bounds=bounds, limit=limit, after=after
        )
        assert ids(found) == chosen[:limit]

    @invariant()
    def holds_the_same(self) -> None:
        if self.revs or not self.model:
            found = self.documents.query(getattr(self, "name", "nothing"))
            assert [(d.id, d.data, d.rev) for d in found] == [
                (id, self.model[id], self.revs[id]) for id in sorted(self.model)
            ]

    def write(self, kind: str, id: str, data: dict[str, Any]) -> Write:
        match kind:
            case "create":
                return Create(self.name, id, data)
            case "replace":
                return Replace(self.name, id, data, self.revs.get(id, "never"))
            case "stale":
                return Replace(self.name, id, data, min(self.old_revs - {self.revs.get(id)}, default="never"))
            case "delete":
                return Delete(self.name, id, self.revs.get(id, "never"))
            case "drop":
                return Delete(self.name, id)
        return Increment(self.name, id, "n", data.get("n", 1))

    def is_allowed(self, write: Write) -> bool:
        match write:
            case Create():
                return write.id not in self.model
            case Delete(rev=None) | Increment():
                return write.id in self.model
        return write.id in self.model and write.rev == self.revs[write.id]

    def apply(self, write: Write) -> None:
        match write:
            case Create() | Replace():
                self.model[write.id] = dict(write.data)
            case Delete():
                del self.model[write.id]
            case Increment():
                data = self.model[write.id]
                self.model[write.id] = {**data, write.field: data.get(write.field, 0) + write.by}

    def key(self, id: str, order_by: str) -> tuple[Any, ...]:
        value = id if order_by == "id" else self.model[id][order_by]
        return (rank(value), 0 if value is None else value, id)


def rank(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool):
        return 1
    return 2 if isinstance(value, int | float) else 3


def same(data: dict[str, Any], field: str, value: Any) -> bool:
    return field in data and rank(data[field]) == rank(value) and data[field] == value


def admits(key: tuple[Any, ...], low: Any, is_open: bool) -> bool:
    return key[0] == rank(low) and (key[1] > low if is_open else key[1] >= low)
