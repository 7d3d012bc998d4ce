"""Bad input gets one clear error that names what is wrong, and leaves nothing behind."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import BASE, Home, all_events, rows_jsonl, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


def row(*messages: tuple[str, str]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in messages]}).encode()


GOOD = row(("user", "a"), ("assistant", "b"))
BAD_ROWS = {
    "not JSON": (b'{"messages": [', "line 7", "json"),
    "not UTF-8": (b'{"text": "\xff\xfe"}', "line 7", "utf-8"),
    "unknown role": (row(("alien", "a"), ("assistant", "b")), "line 7", "alien"),
    "no assistant turn": (row(("user", "a")), "line 7", "assistant"),
    "longer than the context": (row(("user", "word " * 9000), ("assistant", "b")), "line 7", "8,192"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_fails_the_job_before_it_is_launched_with_its_line(client: openai.OpenAI, name: str) -> None:
    bad, *words = BAD_ROWS[name]
    lines = [GOOD] * 20
    lines[6] = bad
    file = client.files.create(file=("rows.jsonl", b"\n".join(lines)), purpose="fine-tune")

    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    failed = wait_for(
        "the job to fail", lambda: (j := client.fine_tuning.jobs.retrieve(job.id)).status == "failed" and j, 120
    )

    assert failed.error.code == "invalid_training_file" and failed.error.param == "training_file"
    for word in words:
        assert word in failed.error.message.lower()
    events = all_events(client, job.id)
    assert any(event.level == "error" and "line 7" in event.message.lower() for event in events)
    assert not any("started" in event.message for event in events)


def test_an_empty_file_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.files.create(file=("rows.jsonl", b""), purpose="fine-tune")


def test_a_file_of_513_mb_is_refused_without_being_kept(home: Home, client: openai.OpenAI) -> None:
    size = 513 << 20
    head = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x\r\n'
    head += b'Content-Disposition: form-data; name="file"; filename="big.jsonl"\r\n\r\n'

    def body() -> Iterator[bytes]:
        yield head
        for _ in range(size >> 20):
            yield b"x" * (1 << 20)

    headers = {"Authorization": f"Bearer {home.admin_key}", "Content-Type": "multipart/form-data; boundary=x"}
    answer = httpx.post(f"{home.url}/files", content=body(), headers=headers, timeout=120)

    assert answer.status_code == 413
    assert "512" in answer.json()["error"]["message"]
    assert "big.jsonl" not in [file.filename for file in client.files.list()]


BAD_CHATS: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "unknown model": ({"model": "nobody"}, 404, "model"),
    "max_tokens -1": ({"max_tokens": -1}, 400, "max_tokens"),
    "two stop types": ({"stop": ["a", 3]}, 400, "stop[1]"),
    "prompt over the context": ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "messages"),
    "unknown field": ({"nonsense": 1}, 400, "nonsense"),
    "path tricks in the model": ({"model": "../../etc/passwd"}, 404, "model"),
    "a null byte in the model": ({"model": "a\0b"}, 404, "model"),
    "no messages": ({"messages": []}, 400, "messages"),
    "unknown role": ({"messages": [{"role": "alien", "content": "x"}]}, 400, "messages[0].role"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_chat_request_is_refused_by_name(home: Home, name: str, stream: bool) -> None:
    change, status, param = BAD_CHATS[name]
    answer = post(home, "/chat/completions", {"model": BASE, "messages": MESSAGES, "stream": stream, **change})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["message"] and error["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"]


BAD_JOBS: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown base": ({"model": "gpt-99"}, 404, "model"),
    "n_epochs 0": ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
    "unknown file": ({"training_file": "file-nope"}, 400, "training_file"),
    "path tricks in the file": ({"training_file": "../../../etc/passwd"}, 400, "training_file"),
    "path tricks in the suffix": ({"suffix": "../../x"}, 400, "suffix"),
    "a reserved suffix": ({"suffix": "base"}, 400, "suffix"),
    "an integration": ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, 400, "integrations"),
    "an unknown option": ({"tuneloom": {"speed": "fast"}}, 400, "tuneloom.speed"),
}


@pytest.mark.parametrize("name", BAD_JOBS)
def test_a_bad_job_is_refused_by_name(home: Home, client: openai.OpenAI, name: str) -> None:
    change, status, param = BAD_JOBS[name]
    file = client.files.create(file=("rows.jsonl", rows_jsonl(10)), purpose="fine-tune")
    before = len(list(client.fine_tuning.jobs.list()))
    answer = post(home, "/fine_tuning/jobs", {"model": BASE, "training_file": file.id, **change})
    assert answer.status_code in (status, 404 if status == 400 else status), answer.text
    assert answer.json()["error"]["param"] == param
    assert len(list(client.fine_tuning.jobs.list())) == before


def test_a_body_of_100_mb_is_refused(home: Home) -> None:
    big = {"model": BASE, "messages": [{"role": "user", "content": "x" * (100 << 20)}]}
    answer = post(home, "/chat/completions", big)
    assert answer.status_code == 413
    assert "32" in answer.json()["error"]["message"]


@pytest.mark.parametrize("key", ["sk-wrong", "sk-\u00e9", "sk-a b", "Bearer", "sk-" + "a" * 5000])
def test_a_key_that_is_wrong_in_any_way_gets_401(home: Home, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}".encode()}
    answer = httpx.get(f"{home.url}/models", headers=headers, timeout=30)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("filename", ["../../evil.jsonl", "/etc/passwd.jsonl", "a\\..\\b.jsonl", "x" * 300 + ".jsonl"])
def test_a_file_name_never_becomes_a_path(home: Home, client: openai.OpenAI, filename: str) -> None:
    before = {path for path in home.path.rglob("*evil*")} | {path for path in home.path.parent.glob("*")}
    try:
        file = client.files.create(file=(filename, rows_jsonl(10)), purpose="fine-tune")
        assert client.files.content(file.id).read() == rows_jsonl(10)
    except openai.BadRequestError as error:
        assert error.param == "file"
    assert {path for path in home.path.rglob("*evil*")} | {path for path in home.path.parent.glob("*")} == before


def test_a_body_that_is_not_json_is_refused(home: Home) -> None:
    for body in (b"{", b"[]", b"\xff", b"nonsense", b""):
        headers = {"Authorization": f"Bearer {home.admin_key}", "Content-Type": "application/json"}
        answer = httpx.post(f"{home.url}/chat/completions", content=body, headers=headers, timeout=30)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["type"] == "invalid_request_error"


def post(home: Home, path: str, body: dict[str, Any]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {home.admin_key}"}
    return httpx.post(f"{home.url}{path}", json=body, headers=headers, timeout=60)
