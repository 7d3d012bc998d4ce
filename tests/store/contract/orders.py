"""Documents in their order, by bounds and page by page."""

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.store.contract.model import DocumentsMachine
from tests.store.contract.opened import Opened, ids
from tuneloom.store.base import Create, Delete, Documents, Range


class OfOrders(Opened):
    # Of random commits and queries; fewer where each call takes milliseconds.
    NUM_EXAMPLES = 60

    def test_order_is_null_then_booleans_then_numbers_then_text(self, mixed: Documents) -> None:
        expected = ["null", "no", "yes", "neg", "zero", "half", "one", "text"]
        assert ids(mixed.query("things", order_by="v")) == expected
        assert ids(mixed.query("things", order_by="v", descending=True)) == expected[::-1]

    def test_equal_values_are_ordered_by_id_in_the_same_direction(self, documents: Documents) -> None:
        documents.commit([Create("things", id, {"v": 1}) for id in "cab"] + [Create("things", "z", {"v": 0})])
        assert ids(documents.query("things", order_by="v")) == ["z", "a", "b", "c"]
        assert ids(documents.query("things", order_by="v", descending=True)) == ["c", "b", "a", "z"]

    def test_text_is_ordered_by_code_point(self, documents: Documents) -> None:
        texts = ["", "A", "B", "a", "aa", "b", "é", "日", "🙂"]
        documents.commit([Create("things", f"{-i}", {"v": text}) for i, text in enumerate(texts)])
        assert [d.data["v"] for d in documents.query("things", order_by="v")] == texts

    @pytest.mark.parametrize(
        ("bounds", "expected"),
        [
            (Range(), ["0", "1", "2", "3", "t"]),
            (Range(above=1), ["2", "3"]),
            (Range(at_least=1), ["1", "2", "3"]),
            (Range(below=2), ["0", "1"]),
            (Range(at_most=2.0), ["0", "1", "2"]),
            (Range(above=0, at_most=2), ["1", "2"]),
            (Range(above=2, below=1), []),
            (Range(at_least="a"), ["t"]),
            (Range(at_least=False), []),
            (Range(at_least=1, below="z"), []),
        ],
    )
    def test_bounds_admit_values_of_their_own_type(
        self, documents: Documents, bounds: Range, expected: list[str]
    ) -> None:
        documents.commit([Create("things", str(i), {"v": i}) for i in range(4)] + [Create("things", "t", {"v": "b"})])
        assert ids(documents.query("things", order_by="v", bounds=bounds)) == expected
        assert ids(documents.query("things", order_by="v", bounds=bounds, descending=True)) == expected[::-1]

    def test_bounds_on_the_id(self, documents: Documents) -> None:
        documents.commit([Create("things", id, {"v": 1}) for id in "abcd"])
        assert ids(documents.query("things", {"v": 1}, bounds=Range(above="a", at_most="c"))) == ["b", "c"]

    @pytest.mark.parametrize("edge", ["", "b/", "b\0", "."])
    def test_bounds_and_cursors_need_not_be_ids_of_documents(self, documents: Documents, edge: str) -> None:
        documents.commit([Create("things", id, {"v": 1}) for id in "abcd"])
        behind = [id for id in "abcd" if id > edge]
        assert ids(documents.query("things", bounds=Range(above=edge))) == behind
        assert ids(documents.query("things", {"v": 1}, bounds=Range(at_least=edge), descending=True)) == behind[::-1]
        assert ids(documents.query("things", after=(edge, edge))) == behind
        assert ids(documents.query("things", order_by="v", after=(1, edge))) == behind

    def test_limit_takes_the_first_of_the_order(self, documents: Documents) -> None:
        documents.commit([Create("things", id, {"v": id}) for id in "abcd"])
        assert ids(documents.query("things", limit=2)) == ["a", "b"]
        assert ids(documents.query("things", order_by="v", descending=True, limit=2)) == ["d", "c"]
        assert ids(documents.query("things", limit=9)) == ["a", "b", "c", "d"]

    @pytest.mark.parametrize("descending", [False, True])
    @pytest.mark.parametrize("order_by", ["v", "id"])
    def test_pages_show_every_document_once(self, mixed: Documents, order_by: str, descending: bool) -> None:
        mixed.commit([Create("things", f"tie{i}", {"v": 0.5, "w": 1}) for i in range(5)])
        mixed.commit([Create("things", f"time{i}", {"v": 1759300000.1 + i / 1e6}) for i in range(5)])
        whole = mixed.query("things", order_by=order_by, descending=descending)
        seen: list[Any] = []
        after = None
        while page := mixed.query("things", order_by=order_by, descending=descending, limit=2, after=after):
            seen += page
            after = (page[-1].id if order_by == "id" else page[-1].data["v"], page[-1].id)
            # What comes between two pages, before the cursor, disturbs neither.
            mixed.commit([Create("things", f"{'~' if descending else '!'}{len(seen)}", {"w": 2})])
        assert ids(seen) == [id for id in ids(whole) if id[0] not in "~!"]

    def test_a_cursor_goes_on_behind_a_document_that_is_gone(self, documents: Documents) -> None:
        documents.commit([Create("things", id, {"v": 1}) for id in "abcd"])
        documents.commit([Delete("things", "b")])
        assert ids(documents.query("things", order_by="v", after=(1, "b"))) == ["c", "d"]

    def test_it_behaves_like_a_dictionary(self, documents: Documents) -> None:
        run_state_machine_as_test(
            lambda: DocumentsMachine(documents),
            settings=settings(
                max_examples=self.NUM_EXAMPLES,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )

    @pytest.mark.parametrize("order_by", ["v", "id"])
    def test_a_long_result_comes_whole(self, documents: Documents, order_by: str) -> None:
        names = [f"{i:04}" for i in range(750)]
        for start in (0, 375):
            documents.commit([Create("things", id, {"v": int(id) // 3}) for id in names[start : start + 375]])
        assert ids(documents.query("things", order_by=order_by)) == names
        assert ids(documents.query("things", order_by=order_by, descending=True, limit=700)) == names[:49:-1]
