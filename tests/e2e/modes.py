"""What a client sees of the gateway in any of its modes: what it sees in the default one."""

import json

import httpx
import openai
import pytest

from tests.e2e.conftest import BASE, Home, wait_for
from tuneloom.serve.flow import WINDOW_BYTES

BOT = "clerk"
HI = [{"role": "user", "content": "hello"}]
LONG = {"model": BASE, "messages": HI, "n": 16, "max_tokens": 4000, "logit_bias": {"2": -100}}


def running_sequences(home: Home) -> int:
    answer = httpx.get(
        f"{home.url}/tuneloom/bases", headers={"Authorization": f"Bearer {home.admin_key}"}, timeout=30
    ).json()
    return sum(replica["running"] for base in answer["data"] for replica in base["replicas"])


class Modes:
    """Of `served`: a home with two gateways and an imported model `BOT`."""

    def test_a_client_sees_no_difference(self, served: Home) -> None:
        client = served.client()
        answers = {}
        for model in (BASE, BOT, f"{BOT}@v1"):
            whole = client.chat.completions.create(model=model, messages=HI, temperature=0, max_tokens=12)
            pieces = client.chat.completions.create(model=model, messages=HI, temperature=0, max_tokens=12, stream=True)
            answers[model] = whole.choices[0].message.content
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answers[model]
        assert answers[BOT] == answers[f"{BOT}@v1"] != answers[BASE]
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model=BASE, messages=HI, max_tokens=50_000)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="absent", messages=HI)

        large = [{"role": "user", "content": "dog " * 1_500_000}]
        with pytest.raises(openai.BadRequestError) as larger:
            client.chat.completions.create(model=BASE, messages=large, max_tokens=5)
        assert larger.value.code == "context_length_exceeded", "6 MB reach the replica"

    def test_a_large_file_goes_up_and_comes_down_whole(self, served: Home) -> None:
        row = json.dumps({"messages": [*HI, {"role": "assistant", "content": "x" * 10_000}]}).encode() + b"\n"
        client = served.client()
        file = client.files.create(file=("rows.jsonl", row * 1200), purpose="fine-tune")
        assert file.bytes == 1200 * len(row) > 2 * WINDOW_BYTES
        assert client.files.content(file.id).read() == row * 1200
        client.files.delete(file.id)

    def test_keys_and_serves_own_headers_are_checked_as_ever(self, served: Home) -> None:
        def get(path: str, **headers: str) -> httpx.Response:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return httpx.get(f"{served.url}{path}", headers=named, timeout=30)

        key = f"Bearer {served.admin_key}"
        assert get("/models").status_code == 401
        assert get("/models", authorization="Bearer sk-wrong").status_code == 401
        found = get("/models", authorization=key, x_request_id="trace-1", x_session_id="a")
        assert (found.status_code, found.headers.get_list("x-request-id")) == (200, ["trace-1"])
        assert get("/models", authorization=key, x_request_timeout_seconds="0").status_code == 400

    def test_a_client_that_leaves_frees_its_slots(self, served: Home) -> None:
        stream = served.client().chat.completions.create(**LONG, stream=True)
        next(piece for piece in stream if piece.choices[0].delta.content)
        wait_for("all to run", lambda: running_sequences(served) == 16, 20)
        stream.close()
        wait_for("none to run", lambda: running_sequences(served) == 0, 20)

    def test_what_a_killed_base_was_streaming_ends_in_an_error(self, served: Home) -> None:
        stream = served.client(max_retries=0).chat.completions.create(**LONG, stream=True)
        next(piece for piece in stream if piece.choices[0].delta.content)
        served.kill("ServeReplica:base", "Base")
        with pytest.raises(openai.APIError):
            for _ in stream:
                pass
        client = served.client(max_retries=0)
        wait_for(
            "the base to be back", lambda: client.chat.completions.create(model=BASE, messages=HI, max_tokens=2), 90
        )
