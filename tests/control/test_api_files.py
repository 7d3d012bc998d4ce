import hashlib
import time

import pytest

from tests.control.conftest import assert_error
from tuneloom.control.files import put_bytes
from tuneloom.control.sweep import sweep
from tuneloom.domain import File
from tuneloom.errors import InvalidFile


def test_a_file_comes_back_as_it_went_in(api):
    data = b'{"prompt": "a", "completion": "b"}\n' * 1000
    created = api.post("/v1/files", files={"file": ("rows.jsonl", data)}, data={"purpose": "fine-tune"}).json()
    assert created["object"] == "file"
    assert (created["bytes"], created["filename"], created["status"]) == (len(data), "rows.jsonl", "processed")
    assert api.get(f"/v1/files/{created['id']}").json() == created
    content = api.get(f"/v1/files/{created['id']}/content")
    assert content.content == data
    assert int(content.headers["content-length"]) == len(data)
    assert api.delete(f"/v1/files/{created['id']}").json() == {"id": created["id"], "object": "file", "deleted": True}
    assert_error(api.get(f"/v1/files/{created['id']}"), 404, "id", "No such File object")
    assert api.store.blobs.list("files") == []


def test_files_are_listed_by_purpose_and_page(api):
    ids = [api.upload() for _ in range(3)]
    other = api.upload(name="x.png", purpose="vision")
    assert [file["id"] for file in api.get("/v1/files").json()["data"]] == [other, *reversed(ids)]
    first = api.get("/v1/files", params={"purpose": "fine-tune", "limit": 2, "order": "asc"}).json()
    assert [file["id"] for file in first["data"]] == ids[:2]
    assert first["has_more"] is True
    rest = api.get("/v1/files", params={"purpose": "fine-tune", "order": "asc", "after": ids[1]}).json()
    assert [file["id"] for file in rest["data"]] == ids[2:]
    assert rest["has_more"] is False


@pytest.mark.parametrize(
    "name, kept",
    [
        ("../../etc/passwd.jsonl", "passwd.jsonl"),
        ("C:\\data\\rows.jsonl", "rows.jsonl"),
        ("/abs/rows.jsonl", "rows.jsonl"),
        ("a\x00b\r\n.jsonl", "ab.jsonl"),
        ("zażółć 🙂.jsonl", "zażółć 🙂.jsonl"),
    ],
)
def test_paths_in_file_names_lead_nowhere(api, name, kept):
    body = {"filename": name, "purpose": "fine-tune", "bytes": 1, "mime_type": "text/jsonl"}
    assert api.post("/v1/uploads", json=body).json()["filename"] == kept


@pytest.mark.parametrize("name", ["..", "/", "a/..", "\x00"])
def test_a_name_that_is_only_a_path_is_refused(api, name):
    body = {"filename": name, "purpose": "vision", "bytes": 1, "mime_type": "x"}
    assert_error(api.post("/v1/uploads", json=body), 400, "file", "plain file name")


@pytest.mark.parametrize(
    "form, files, param, text",
    [
        ({"purpose": "fine-tune"}, {"file": ("rows.txt", b"x")}, "file", "does not end in `.jsonl`, `.json`, `.csv`"),
        ({"purpose": "batch"}, {"file": ("rows.json", b"[]")}, "file", "`.jsonl`"),
        ({"purpose": "fine-tune"}, {"file": ("rows.jsonl", b"")}, "file", "empty"),
        ({"purpose": "fine-tune"}, {"other": ("rows.jsonl", b"x")}, "other", "Unknown parameter"),
        ({"purpose": "steal"}, {"file": ("rows.jsonl", b"x")}, "purpose", "`fine-tune`"),
        ({}, {"file": ("rows.jsonl", b"x")}, "purpose", "Missing"),
        ({"purpose": "fine-tune", "x": "1"}, {"file": ("rows.jsonl", b"x")}, "x", "Unknown parameter"),
        ({"purpose": "vision", "expires_after[anchor]": "created_at"}, {"file": ("x", b"x")}, "expires_after", "both"),
        (
            {"purpose": "vision", "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"},
            {"file": ("x", b"x")},
            "expires_after.seconds",
            "3600",
        ),
    ],
)
def test_what_a_file_may_not_be_is_named(api, form, files, param, text):
    assert_error(api.post("/v1/files", data=form, files=files), 400, param, text)


ROWS = b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.csv", b"prompt,completion\r\na,b\r\nc,d\r\n"),
        ("ROWS.JSON", b'[{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]'),
        ("rows.json", ROWS),
    ],
)
def test_training_rows_of_other_kinds_are_stored_as_json_lines_under_their_name(api, name, data):
    created = api.post("/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune"}).json()
    assert (created["filename"], created["bytes"]) == (name, len(ROWS))
    assert api.get(f"/v1/files/{created['id']}/content").content == ROWS
    assert api.store.records.files.get(created["id"]).value.sha256 == hashlib.sha256(ROWS).hexdigest()


@pytest.mark.parametrize(
    ("name", "purpose", "data"),
    [("rows.csv", "user_data", b"a;b\n"), ("rows.json", "evals", b"[1]"), ("rows.jsonl", "fine-tune", b"[{}]")],
)
def test_other_files_are_stored_as_they_come(api, name, purpose, data):
    id = api.upload(data, name=name, purpose=purpose)
    assert api.get(f"/v1/files/{id}/content").content == data


def send_rows(api, name: str, data: bytes):
    return api.post("/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune"})


def test_wrong_rows_are_refused_at_the_upload_and_nothing_is_kept(api):
    refused = send_rows(api, "rows.csv", b"prompt,completion\n" + b"a,b\n" * 2 + b"c,\n")
    assert_error(refused, 400, "file", "Row 3 (line 4): `completion` is empty.")
    error = refused.json()["error"]
    problem = {"row": 3, "line": 4, "field": "completion", "message": "`completion` is empty."}
    assert (error["code"], error["problem_count"], error["problems"]) == ("invalid_file", 1, [problem])
    many = send_rows(api, "rows.csv", b"prompt,completion\n" + b"c,\n" * 150).json()["error"]
    assert (many["problem_count"], len(many["problems"])) == (150, 100) and many["message"].endswith("And 145 more.")
    assert_error(send_rows(api, "rows.json", b'[{"text": "a"}, 1]'), 400, "file", "Row 2 (line 1)")
    # The first megabytes are written before the wrong row is met.
    assert_error(send_rows(api, "rows.csv", b"text\n" + b"x" * 2_500_000 + b"\n,\n"), 400, "file", "Row 2 (line 3)")
    assert api.store.records.files.query() == []
    assert api.store.blobs.list("files") == []


def test_rows_that_are_too_large_as_json_lines_are_refused(api):
    data = b"instruction,output\n" + b"a,b\n" * 100_000
    assert_error(send_rows(api, "rows.csv", data), 413, "file", "As JSON Lines the file is larger than 3,145,728 bytes")
    assert api.store.blobs.list("files") == []


def test_rows_that_take_too_long_to_read_are_refused(api):
    file = File(
        id="file-1",
        owner="ada",
        filename="rows.csv",
        purpose="fine-tune",
        size_bytes=0,
        sha256="",
        blob="files/file-1",
        created_at=0,
    )
    with pytest.raises(InvalidFile, match="longer than 0 s") as caught:
        put_bytes(api.store, file, [b"text\n", b"a\n"], max_bytes=1000, timeout_s=0)
    assert caught.value.code == "invalid_file"
    assert api.store.blobs.list("files") == []


def test_a_retried_upload_of_rows_is_one_file(api):
    headers = {"x-stainless-retry-count": "1"}
    data = b"text\na\n"
    assert api.upload(data, name="rows.csv") == api.upload(data, name="rows.csv", headers=headers)
    assert len(api.store.blobs.list("files")) == 1


def test_a_body_that_is_no_form_is_refused(api):
    assert_error(api.post("/v1/files", content=b"x"), 400, None, "multipart/form-data")
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert_error(api.post("/v1/files", content=b"--y\r\n", headers=broken), 400, None, "cannot be read")


def test_a_file_that_is_too_large_is_refused_by_its_announcement_or_on_the_way(api):
    large = b"x" * (api.settings.gateway.max_file_bytes + 1)
    refused = api.post("/v1/files", files={"file": ("rows.jsonl", large)}, data={"purpose": "fine-tune"})
    assert_error(refused, 413, None, "larger than 3 MB")
    taken = 0

    def endless():
        nonlocal taken
        yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        while taken < 64 << 20:
            taken += 1 << 20
            yield b"x" * (1 << 20)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert_error(api.post("/v1/files", content=endless(), headers=headers), 413, None, "larger than")
    assert api.store.blobs.list("files") == []


def test_an_expired_file_is_gone_at_once_and_swept_later(api):
    form = {"purpose": "vision", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    id = api.post("/v1/files", data=form, files={"file": ("x.png", b"x")}).json()["id"]
    stored = api.store.records.files.get(id)
    assert stored.value.expires_at == pytest.approx(time.time() + 3600, abs=5)
    past = stored.value.model_copy(update={"expires_at": time.time() - 1})
    api.store.records.commit(api.store.records.files.replace(stored, past))
    assert api.get(f"/v1/files/{id}").status_code == 404
    assert api.get("/v1/files").json()["data"] == []
    sweep(api.store)
    assert api.store.records.files.find(id) is None
    assert api.store.blobs.list("files") == []
    *_, gone = [stored.value for stored in api.store.records.audit_entries.query(order_by="created_at")]
    assert (gone.action, gone.actor.kind, gone.data["expired"]) == ("file.deleted", "system", True)


def test_a_file_that_an_unfinished_job_needs_stays(api):
    job = api.create_job()
    refused = api.delete(f"/v1/files/{job['training_file']}")
    assert_error(refused, 409, None, job["id"])
    assert refused.headers["x-should-retry"] == "false"
    api.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert api.delete(f"/v1/files/{job['training_file']}").status_code == 200


def test_a_retried_upload_is_one_file_and_a_new_one_is_another(api):
    def send(retry: int) -> str:
        return api.upload(b"same\n", headers={"x-stainless-retry-count": str(retry)})

    first = send(0)
    assert send(1) == first
    assert send(0) != first
    assert len(api.store.blobs.list("files")) == 2
