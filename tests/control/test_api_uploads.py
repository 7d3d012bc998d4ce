import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.control.conftest import assert_error
from tuneloom.control import files
from tuneloom.control.sweep import sweep


def start_upload(api, size: int, **options) -> str:
    body = {"filename": "rows.jsonl", "purpose": "fine-tune", "bytes": size, "mime_type": "text/jsonl"}
    return api.post("/v1/uploads", json={**body, **options}).json()["id"]


def add_part(api, upload: str, data: bytes, **options) -> str:
    return api.post(f"/v1/uploads/{upload}/parts", files={"data": ("part", data)}, **options).json()["id"]


def test_an_upload_is_joined_from_its_parts_in_the_order_asked_for(api):
    upload = start_upload(api, 6)
    second, first = add_part(api, upload, b"def"), add_part(api, upload, b"abc")
    body = {"part_ids": [first, second], "md5": hashlib.md5(b"abcdef").hexdigest()}
    done = api.post(f"/v1/uploads/{upload}/complete", json=body).json()
    assert done["status"] == "completed"
    assert api.get(f"/v1/files/{done['file']['id']}/content").content == b"abcdef"
    assert api.store.blobs.list(f"uploads/{upload}") == []
    again = api.post(f"/v1/uploads/{upload}/complete", json=body, headers={"x-stainless-retry-count": "1"})
    assert again.json() == done
    assert_error(api.post(f"/v1/uploads/{upload}/complete", json=body), 409, None, "completed")
    made, read = [stored.value for stored in api.store.records.audit_entries.query(order_by="created_at")]
    assert (made.action, made.target.id, made.data["upload"]) == ("file.created", done["file"]["id"], upload)
    assert (read.action, read.data["bytes"]) == ("file.downloaded", 6)


def test_an_upload_in_parts_of_rows_becomes_json_lines_too(api):
    data = 'prompt,completion\na,"b\nż"\n'.encode()
    upload = start_upload(api, len(data), filename="rows.csv")
    # Cut within a cell and within a character.
    parts = [add_part(api, upload, piece) for piece in (data[:21], data[21:24], data[24:])]
    body = {"part_ids": parts, "md5": hashlib.md5(data).hexdigest()}
    done = api.post(f"/v1/uploads/{upload}/complete", json=body).json()
    content = api.get(f"/v1/files/{done['file']['id']}/content").content
    assert content.decode() == '{"prompt": "a", "completion": "b\\nż"}\n'
    assert (done["bytes"], done["file"]["bytes"]) == (len(data), len(content))


def test_an_upload_in_parts_of_wrong_rows_is_not_completed(api):
    data = b"prompt,completion\na,\n"
    upload = start_upload(api, len(data), filename="rows.csv")
    part = add_part(api, upload, data)
    refused = api.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [part]})
    assert_error(refused, 400, "file", "Row 1 (line 2): `completion` is empty.")
    assert api.store.records.files.query() == []
    assert api.store.blobs.list("files") == []
    assert api.post(f"/v1/uploads/{upload}/cancel").json()["status"] == "cancelled"


def test_a_retried_part_is_one_part_and_alike_parts_are_two(api):
    upload = start_upload(api, 4)
    one = add_part(api, upload, b"aa")
    assert add_part(api, upload, b"aa", headers={"x-stainless-retry-count": "1"}) == one
    two = add_part(api, upload, b"aa")
    assert two != one
    done = api.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [one, two]}).json()
    assert done["file"]["bytes"] == 4


@pytest.mark.parametrize(
    "body, param, text",
    [
        ({"part_ids": ["PART"]}, "part_ids", "announced with 6"),
        ({"part_ids": ["part_unknown"]}, "part_ids", "no part"),
        ({"part_ids": []}, "part_ids", ""),
        ({}, "part_ids", "Missing"),
        ({"part_ids": ["PART", "PART"], "md5": "0" * 32}, "md5", "md5"),
    ],
)
def test_an_upload_that_is_not_whole_is_not_completed(api, body, param, text):
    upload = start_upload(api, 6)
    part = add_part(api, upload, b"abc")
    if "part_ids" in body:
        body = {**body, "part_ids": [part if id == "PART" else id for id in body["part_ids"]]}
    assert_error(api.post(f"/v1/uploads/{upload}/complete", json=body), 400, param, text)
    assert api.store.records.files.query() == []
    assert api.store.blobs.list("files") == []


def test_a_cancelled_upload_takes_nothing_more(api):
    upload = start_upload(api, 3)
    add_part(api, upload, b"abc")
    assert api.post(f"/v1/uploads/{upload}/cancel").json()["status"] == "cancelled"
    assert api.store.blobs.list("uploads") == []
    late = api.post(f"/v1/uploads/{upload}/parts", files={"data": ("part", b"x")})
    assert_error(late, 409, None, "cancelled")


def test_an_upload_expires_after_an_hour(api):
    upload = start_upload(api, 3)
    add_part(api, upload, b"abc")
    stored = api.store.records.uploads.get(upload)
    old = stored.value.model_copy(update={"expires_at": time.time() - 1})
    api.store.records.commit(api.store.records.uploads.replace(stored, old))
    assert_error(api.post(f"/v1/uploads/{upload}/complete", json={"part_ids": ["x"]}), 409, None, "expired")
    sweep(api.store)
    sweep(api.store)
    assert api.store.records.uploads.get(upload).value.status == "expired"
    assert api.store.blobs.list("uploads") == []


def test_a_part_and_an_upload_have_their_limits(api):
    upload = start_upload(api, 3)
    large = b"x" * (api.settings.gateway.max_part_bytes + 1)
    assert api.post(f"/v1/uploads/{upload}/parts", files={"data": ("part", large)}).status_code == 413
    body = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 9 << 30, "mime_type": "x"}
    assert api.post("/v1/uploads", json=body).status_code == 413


def test_parts_that_an_upload_could_never_use_are_refused(api):
    upload = start_upload(api, 3)
    path = f"/v1/uploads/{upload}/parts"
    assert_error(api.post(path, files={"data": ("part", b"abcd")}), 400, "data", "announced with 3")
    parts = [add_part(api, upload, b"abc"), add_part(api, upload, b"abc")]
    assert_error(api.post(path, files={"data": ("part", b"d")}), 400, "data", "The upload has 2 parts")
    assert len(api.store.blobs.list(f"uploads/{upload}")) == 2
    assert api.post(f"/v1/uploads/{upload}/complete", json={"part_ids": parts[:1]}).json()["status"] == "completed"


def test_who_completes_an_upload_that_ends_meanwhile_hears_how_it_ended(api, monkeypatch):
    for end, status in (("complete", 200), ("cancel", 409)):
        upload = start_upload(api, 6)
        body = {"part_ids": [add_part(api, upload, b"abc"), add_part(api, upload, b"def")]}
        parts_in_order = files.parts_in_order

        def ended_first(*arguments, end=end, upload=upload, body=body, parts_in_order=parts_in_order):
            monkeypatch.setattr(files, "parts_in_order", parts_in_order)
            found = parts_in_order(*arguments)
            assert api.post(f"/v1/uploads/{upload}/{end}", json=body).is_success
            return found

        monkeypatch.setattr(files, "parts_in_order", ended_first)
        answer = api.post(f"/v1/uploads/{upload}/complete", json=body)
        assert answer.status_code == status, answer.text
    assert len(api.store.records.files.query()) == len(api.store.blobs.list("files")) == 1


def test_parts_may_come_at_once(api):
    data = [bytes([65 + i]) * 10 for i in range(12)]
    upload = start_upload(api, 120)
    with ThreadPoolExecutor(12) as pool:
        parts = list(pool.map(lambda piece: add_part(api, upload, piece), data))
    done = api.post(f"/v1/uploads/{upload}/complete", json={"part_ids": parts}).json()
    assert api.get(f"/v1/files/{done['file']['id']}/content").content == b"".join(data)
