"""Rows of files by the API: pages with problems, edits into new files, exports that can be uploaded again."""

import io
import json
from typing import Any

import pytest

from tests.control.conftest import Api, assert_error
from tuneloom.domain import Allowance, OwnerLimits
from tuneloom.rows import read_page

ROWS = [{"input": f"q{number}", "output": f"a{number}"} for number in range(1, 6)]


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def edit(api: Api, id: str, *operations: dict[str, Any], **options: Any) -> Any:
    return api.post(f"/v1/tuneloom/files/{id}/edit", json={"operations": list(operations), **options})


def content(api: Api, id: str) -> list[Any]:
    return [json.loads(line) for line in api.get(f"/v1/files/{id}/content").content.splitlines()]


def test_a_page_shows_rows_with_their_numbers_and_problems(api: Api):
    id = api.upload(lines(ROWS[0], b"", b"oops", {"text": "x"}, {"input": "", "output": "a"}, ROWS[1]))
    page = api.get(f"/v1/tuneloom/files/{id}/rows").json()
    assert page["format"] == "`input`/`output`"
    assert [(row["row"], row["line"]) for row in page["data"]] == [(1, 1), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert [row["data"] for row in page["data"]] == [
        ROWS[0],
        None,
        {"text": "x"},
        {"input": "", "output": "a"},
        ROWS[1],
    ]
    problems = [[problem["message"] for problem in row["problems"]] for row in page["data"]]
    assert problems[0] == problems[4] == []
    assert "Not JSON" in problems[1][0] and "the first row `input`/`output`" in problems[2][0]
    assert page["data"][3]["problems"] == [{"field": "input", "message": "`input` is empty."}]
    assert (page["last_row"], page["has_more"]) == (5, False)


def test_numbers_are_shown_as_they_are_stored(api: Api):
    row = '{"messages": [], "x": [1e400, 1.0, 12345678901234567890123, 1e5], "y": "\u2028"}'
    id = api.upload(row.encode() + b"\n")
    answer = api.get(f"/v1/tuneloom/files/{id}/rows")
    assert answer.status_code == 200 and f'"data": {row}}}' in answer.text
    assert answer.json()["data"][0]["problems"] != []


def test_pages_follow_one_another(api: Api):
    id = api.upload(lines(*ROWS))
    found, after = [], 0
    while True:
        page = api.get(f"/v1/tuneloom/files/{id}/rows", params={"after": after, "limit": 2}).json()
        found += [row["data"] for row in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_row"]
    assert found == ROWS
    behind = api.get(f"/v1/tuneloom/files/{id}/rows?after=5").json()
    assert (behind["data"], behind["last_row"], behind["has_more"]) == ([], None, False)


def test_a_page_ends_before_it_is_too_large():
    file = io.BytesIO(lines(*({"text": str(number) * 1000} for number in range(5))))
    pages = []
    for after in (0, 2, 4):
        file.seek(0)
        page = read_page(file, after=after, limit=10, max_bytes=2500)
        pages.append(([row.number for row in page.rows], page.has_more))
    assert pages == [([1, 2], True), ([3, 4], True), ([5], False)]
    file.seek(0)
    assert [row.number for row in read_page(file, after=0, limit=10, max_bytes=10).rows] == [1]


def test_edits_make_a_new_file_and_leave_the_old_one(api: Api):
    id = api.upload(lines(*ROWS), name="rows.csv.jsonl")
    new, first, last = ({"input": name, "output": "x"} for name in ("new", "first", "last"))
    answer = edit(
        api,
        id,
        {"op": "replace", "row": 2, "data": new},
        {"op": "delete", "rows": [1, 4]},
        {"op": "insert", "before": 1, "rows": [first]},
        {"op": "append", "rows": [last]},
    )
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert made["id"] != id and made["purpose"] == "fine-tune" and made["rows"] == 5 and made["problem_count"] == 0
    assert content(api, made["id"]) == [first, new, ROWS[2], ROWS[4], last]
    assert content(api, id) == ROWS
    shown = api.get(f"/v1/tuneloom/files/{made['id']}").json()
    assert shown["provenance"] == made["provenance"]
    assert shown["provenance"]["file"] == id
    assert shown["provenance"]["rows"] == {"kept": 2, "replaced": 1, "deleted": 2, "added": 2}
    assert api.get(f"/v1/tuneloom/files/{id}").json()["provenance"] is None


def test_kept_rows_keep_their_bytes_and_what_is_wrong_with_them_is_told(api: Api):
    odd = b'{"input" : "\\u0041", "output":"b"}'
    id = api.upload(lines(ROWS[0], odd, b"oops", ROWS[1]))
    made = edit(api, id, {"op": "delete", "rows": [1]}).json()
    assert api.get(f"/v1/files/{made['id']}/content").content == lines(odd, b"oops", ROWS[1])
    assert made["problem_count"] == 1 and made["problems"][0]["row"] == 2


def test_another_file_is_appended(api: Api):
    id, other = api.upload(lines(*ROWS[:2])), api.upload(lines(*ROWS[2:]))
    made = edit(api, id, {"op": "append", "file": other}).json()
    assert content(api, made["id"]) == ROWS
    assert made["provenance"]["appended_files"] == [other]


def test_an_edit_that_is_sent_again_makes_one_file(api: Api):
    id = api.upload(lines(*ROWS))
    body = {"operations": [{"op": "delete", "rows": [1]}]}
    first, again = (
        api.post(f"/v1/tuneloom/files/{id}/edit", json=body, headers={"idempotency-key": "k"}).json() for _ in range(2)
    )
    assert first == again
    assert len(api.get("/v1/files").json()["data"]) == 2
    assert len(list(api.store.blobs.list("files"))) == 2


@pytest.mark.parametrize(
    ("operations", "param", "said"),
    [
        ([{"op": "replace", "row": 6, "data": ROWS[0]}], "operations.0.data", "the file has no row 6; it has 5"),
        ([{"op": "delete", "rows": [1, 9]}], "operations.0.rows", "no row 9"),
        ([{"op": "insert", "before": 7, "rows": [ROWS[0]]}], "operations.0.rows.0", "no row 7"),
        ([{"op": "delete", "rows": [1]}, {"op": "delete", "rows": [1]}], "operations.1.rows", "two operations"),
        ([{"op": "append", "rows": [ROWS[0], {"text": "x"}]}], "operations.0.rows.1", "the format `text`"),
        ([{"op": "append", "rows": [{"input": "a", "output": ""}]}], "operations.0.rows.0", "`output` is empty"),
        ([{"op": "append"}], "operations.0", "either `rows` or `file`"),
        ([{"op": "append", "file": "file-none"}], "operations.0.file", "No such File"),
        ([{"op": "delete", "rows": [1, 2, 3, 4, 5]}], "operations", "No row is left"),
        ([], "operations", ""),
        ([{"op": "sort"}], "operations.0", ""),
        ([{"op": "replace", "row": 0, "data": ROWS[0]}], "operations.0.row", "Invalid `operations.0.row`: "),
        ([{"op": "delete", "rows": [1, "2"]}], "operations.0.rows.1", "a valid integer"),
        ([{"op": "replace", "data": ROWS[0]}], "operations.0.row", "Missing required parameter: `operations.0.row`"),
    ],
)
def test_a_wrong_edit_is_refused_and_leaves_nothing(api: Api, operations: list[Any], param: str, said: str):
    id = api.upload(lines(*ROWS))
    answer = edit(api, id, *operations)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
    assert said in answer.json()["error"]["message"]
    assert [blob.key for blob in api.store.blobs.list("files")] == [f"files/{id}"]


def test_an_edit_stays_within_what_an_owner_may_store(api: Api):
    id = api.upload(lines(*ROWS))
    allowance = Allowance(files_bytes=len(lines(*ROWS)) * 2 - 10)
    limits = OwnerLimits(id="ada", owner="ada", allowance=allowance, updated_at=1.0)
    api.store.records.commit(api.store.records.owner_limits.create(limits))
    answer = edit(api, id, {"op": "append", "rows": [ROWS[0]]})
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "insufficient_quota"
    assert [blob.key for blob in api.store.blobs.list("files")] == [f"files/{id}"]
    assert edit(api, id, {"op": "delete", "rows": [1]}).status_code == 200


def test_a_wrong_row_of_an_appended_file_is_named(api: Api):
    id, other = api.upload(lines(*ROWS)), api.upload(lines(ROWS[0], {"text": "x"}))
    answer = edit(api, id, {"op": "append", "file": other})
    assert_error(answer, 400, "operations.0.file", "row 2 of that file")


def test_the_origin_outlives_the_files_between(api: Api):
    id = api.upload(lines(*ROWS))
    first = edit(api, id, {"op": "delete", "rows": [1]}).json()
    second = edit(api, first["id"], {"op": "delete", "rows": [1]}).json()
    third = edit(api, second["id"], {"op": "delete", "rows": [1]}).json()
    assert third["provenance"]["file"] == second["id"]
    assert third["provenance"]["origin"] == first["provenance"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_an_export_uploaded_again_is_the_same_rows(api: Api, kind: str):
    rows = [
        {"messages": [{"role": "user", "content": f'a\n,"{n}\u2028'}, {"role": "assistant", "content": "b"}]}
        for n in range(3)
    ]
    id = api.upload(lines(*rows))
    answer = api.get(f"/v1/tuneloom/files/{id}/export", params={"format": kind})
    assert answer.status_code == 200
    assert answer.headers["content-disposition"] == f'attachment; filename="{id}.{kind}"'
    assert content(api, api.upload(answer.content, name=f"again.{kind}")) == rows
    if kind == "jsonl":
        assert answer.content == lines(*rows)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_an_export_keeps_the_order_of_keys(api: Api, kind: str):
    rows = [{"output": f"=1+{n}", "instruction": "\ufeff007", "input": "" if n else "'1\r\n"} for n in range(3)]
    id = api.upload(lines(*rows))
    answer = api.get(f"/v1/tuneloom/files/{id}/export", params={"format": kind})
    again = content(api, api.upload(answer.content, name=f"again.{kind}"))
    assert again == rows and [list(row) for row in again] == [list(row) for row in rows]


def test_an_export_that_would_lose_something_is_refused(api: Api):
    id = api.upload(lines({"instruction": "a", "output": "b"}, {"instruction": "a", "input": "", "output": "b"}))
    assert_error(api.get(f"/v1/tuneloom/files/{id}/export?format=csv"), 400, "format", "Row 2")
    assert api.get(f"/v1/tuneloom/files/{id}/export?format=json").status_code == 200
    assert_error(api.get(f"/v1/tuneloom/files/{id}/export?format=xml"), 400, "format")


def test_files_of_other_purposes_hold_no_rows(api: Api):
    id = api.upload(b"x", name="a.txt", purpose="user_data")
    assert_error(api.get(f"/v1/tuneloom/files/{id}/rows"), 400, "id", "`user_data`")
    assert_error(api.get(f"/v1/tuneloom/files/{id}/export"), 400, "id", "`user_data`")


def test_a_key_without_training_reads_no_rows(api: Api):
    id = api.upload(lines(*ROWS))
    for path in ("", "/rows", "/export"):
        assert api.get(f"/v1/tuneloom/files/{id}{path}", key="ada:inference").status_code == 403
