"""An HTTP server in front of a part that spoils single requests and remembers all. Knows nothing of what they mean."""

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from tests.parts.servers import HOST

TIMEOUT_S = 60.0
_PIECE = 1 << 16

Fault = Literal["pass", "less", "flip", "cut_request", "cut_answer", "lose_answer", "stall"]


@dataclass
class Front:
    """Listens on `address`. Requests are `METHOD /path?query`, in the order in which they came.

    Each fault strikes the next requests whose line holds its text, as often as was said:
    - a status: it is the answer, and the part sees nothing;
    - `pass`: none, for the one after it to strike later;
    - `less`: the answer is 308 with the first bytes alone, and the part sees nothing;
    - `flip`: the part gets the body with one bit of its middle turned round;
    - `cut_request`: the connection ends in the middle of the body, and the part sees nothing;
    - `lose_answer`: the part has done it, and the connection ends without an answer;
    - `cut_answer`: the connection ends in the middle of the answer's body;
    - `stall`: nothing happens until the front ends.
    """

    target_port: int
    address: str = ""
    requests: list[str] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    # Of what the part does not see too, each up to `_PIECE` bytes.
    bodies: list[bytes] = field(default_factory=list)
    _faults: list[tuple[str, int | Fault]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)

    def spoil(self, text: str, fault: int | Fault, times: int = 1) -> None:
        with self._lock:
            self._faults += [(text, fault)] * times

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def take(self, line: str) -> int | Fault | None:
        with self._lock:
            self.requests.append(line)
            for each in self._faults:
                if each[0] in line:
                    self._faults.remove(each)
                    self.struck.append(line)
                    return each[1]
        return None

    def wait(self) -> None:
        self._over.wait(TIMEOUT_S)

    def end(self) -> None:
        self._over.set()


@contextlib.contextmanager
def front(target_port: int) -> Iterator[Front]:
    made = Front(target_port)
    server = _Server((HOST, 0), _handler(made))
    made.address = f"{HOST}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.end()
        server.shutdown()
        server.server_close()
        thread.join(TIMEOUT_S)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what the tests are about."""


def flipped(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def _handler(front: Front) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            fault = front.take(f"{self.command} {self.path}")
            length = int(self.headers.get("content-length") or 0)
            if fault == "stall":
                self.rfile.read(length // 2)
                front.wait()
            if fault in ("stall", "cut_request"):
                self.close_connection = True
                return
            body = self._body(length)
            front.bodies.append(body[:_PIECE])
            if fault == "flip":
                body = flipped(body)
            if isinstance(fault, int):
                self._answer(fault, {"content-type": "application/json"}, b'{"error": {"message": "spoiled"}}')
                return
            if fault == "less":
                self._answer(308, {"range": "bytes=0-99999"}, b"")
                return
            status, headers, content = self._ask(body)
            if fault == "lose_answer":
                self.close_connection = True
            else:
                self._answer(status, headers, content, len(content) // 2 if fault == "cut_answer" else None)

        def _body(self, length: int) -> bytes:
            if self.headers.get("transfer-encoding", "") != "chunked":
                return self.rfile.read(length)
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            with contextlib.closing(http.client.HTTPConnection(HOST, front.target_port, timeout=TIMEOUT_S)) as part:
                own = {"transfer-encoding", "content-length"}
                kept = {name: value for name, value in self.headers.items() if name.lower() not in own}
                part.request(self.command, self.path, body, kept | {"content-length": str(len(body))})
                answer = part.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()

        def _answer(self, status: int, headers: dict[str, str], content: bytes, upto: int | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            for start in range(0, len(content) if upto is None else upto, _PIECE):
                self.wfile.write(content[start : start + _PIECE])
            if upto is not None:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    handle: Callable[[Handler], None] = Handler.handle_any
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        setattr(Handler, f"do_{method}", handle)
    return Handler
