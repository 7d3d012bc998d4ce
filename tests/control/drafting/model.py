"""A language model for the tests: what it answers is a function of what it is asked. Two servers speak for it."""

import itertools
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self

WORDS = [a + b + c for a in "bdfgklm" for b in ("ra", "lo", "mi", "su") for c in ("nt", "x", "p", "rk", "st")]


@dataclass(frozen=True)
class Ask:
    """One call: `data` is the object of the prompt, `body` what came by HTTP, `number` counts calls from 1."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    data: dict[str, Any]
    temperature: float
    max_tokens: int
    has_schema: bool

    @property
    def count(self) -> int:
        return self.data["count"]


@dataclass(frozen=True)
class Reply:
    text: str = ""
    status: int = 200
    message: str = "no"
    param: str | None = None
    finish: str = "stop"
    delay_s: float = 0.0
    tokens: tuple[int, int] | None = (100, 200)
    headers: dict[str, str] = field(default_factory=dict)
    details: list[dict[str, Any]] = field(default_factory=list)
    # Of its bytes so many come, as if these were all (`broken`), or before the connection breaks (`cut`).
    broken: int | None = None
    cut: int | None = None


Model = Callable[[Ask], Reply]


class Rows:
    """A model that writes as many rows as it is asked for, no two alike."""

    def __init__(self, format: str = "instruction") -> None:
        self._format = format
        self._numbers = itertools.count()

    def __call__(self, ask: Ask) -> Reply:
        return reply([self.row() for _ in range(ask.count)])

    def row(self) -> dict[str, Any]:
        return row(self._format, next(self._numbers))


def row(format: str, number: int) -> dict[str, Any]:
    rng = random.Random(number)
    question, answer, other = (" ".join(rng.choices(WORDS, k=12)) for _ in range(3))
    if format == "chat":
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    if format == "instruction":
        return {"instruction": question, "input": "", "output": answer}
    if format == "text":
        return {"text": question + " " + answer}
    return {"prompt": question, "chosen": answer, "rejected": other}


def reply(rows: list[Any], **more: Any) -> Reply:
    return Reply(json.dumps({"rows": rows}), **more)


class Hold:
    """A model that answers nothing until `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, ask: Ask) -> Reply:
        self.go.wait(60)
        return Reply(status=400, message="held")


def in_turn(*models: Model | Reply) -> Model:
    """The first answers the first call, and so on; the last all others."""
    left, lock = list(models), threading.Lock()

    def answer(ask: Ask) -> Reply:
        with lock:
            model = left.pop(0) if len(left) > 1 else left[0]
        return model if isinstance(model, Reply) else model(ask)

    return answer


class ModelServer:
    """A server on 127.0.0.1 for the time of a `with`. `asks` are the calls that came."""

    kind: ClassVar[str]
    path: ClassVar[str] = ""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.asks: list[Ask] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}{self.path}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def read(self, number: int, path: str, headers: dict[str, str], body: dict[str, Any]) -> Ask:
        raise NotImplementedError

    def write(self, ask: Ask, reply: Reply) -> dict[str, Any]:
        raise NotImplementedError

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers.get("content-length") or 0)) or b"{}")
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            ask = self.read(len(self.asks) + 1, handler.path, headers, body)
            self.asks.append(ask)
        reply = self.model(ask)
        if reply.delay_s:
            time.sleep(reply.delay_s)
        answer = json.dumps(self.write(ask, reply)).encode()[: reply.broken]
        handler.send_response(reply.status)
        for name, value in {
            "content-type": "application/json",
            "content-length": str(len(answer)),
            **reply.headers,
        }.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(answer[: reply.cut])
        handler.close_connection |= reply.cut is not None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: ClassVar[ModelServer]

    def do_POST(self) -> None:
        try:
            self.owner.handle(self)
        except (BrokenPipeError, ConnectionResetError):
            # The client did not wait.
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass
