"""The proxy does to a connection what it says, seen over plain sockets."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.parts.proxy import Proxy, proxy
from tests.parts.servers import HOST


class Echo:
    """A server that answers with what it got, and remembers it."""

    def __init__(self) -> None:
        self.listener = socket.create_server((HOST, 0))
        self.got = b""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while data := connection.recv(1 << 16):
                self.got += data
                connection.sendall(data)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def between(echo: Echo) -> Iterator[Proxy]:
    with proxy(echo.listener.getsockname()[1]) as made:
        yield made


def connect(between: Proxy, timeout_s: float = 10.0) -> socket.socket:
    return socket.create_connection((HOST, between.port), timeout=timeout_s)


def ask(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    return connection.recv(1 << 16)


def test_bytes_pass_and_connections_are_counted(between: Proxy) -> None:
    with connect(between) as one, connect(between) as two:
        assert (ask(one, b"a"), ask(two, b"b"), ask(one, b"c")) == (b"a", b"b", b"c")
    assert between.num_connections == 2


def test_replies_may_come_later(between: Proxy) -> None:
    with connect(between) as connection:
        between.set("delay", 0.3)
        started = time.monotonic()
        assert ask(connection, b"a") == b"a"
        assert time.monotonic() - started >= 0.3


def test_replies_may_be_lost_while_requests_arrive(between: Proxy, echo: Echo) -> None:
    with connect(between, timeout_s=0.3) as connection:
        between.set("drop")
        with pytest.raises(TimeoutError):
            ask(connection, b"a")
        assert echo.got == b"a"
        between.set("forward")
        with pytest.raises(ConnectionError):
            assert connection.recv(1) == b"never"
    with connect(between) as connection:
        assert ask(connection, b"b") == b"b"


def test_bytes_may_wait_until_the_mode_changes(between: Proxy, echo: Echo) -> None:
    between.set("hang")
    with connect(between, timeout_s=0.3) as connection:
        with pytest.raises(TimeoutError):
            ask(connection, b"a")
        assert echo.got == b""
        between.set("forward")
        connection.settimeout(10)
        assert connection.recv(1) == b"a"


def test_connections_may_be_refused_and_taken_again(between: Proxy) -> None:
    with connect(between) as connection:
        assert ask(connection, b"a") == b"a"
        between.set("refuse")
        with pytest.raises(ConnectionError):
            assert connection.recv(1) == b"never"
    with pytest.raises(ConnectionRefusedError):
        connect(between)
    between.set("forward")
    with connect(between) as connection:
        assert ask(connection, b"b") == b"b"


def test_a_cut_ends_old_connections_only(between: Proxy) -> None:
    with connect(between) as connection:
        assert ask(connection, b"a") == b"a"
        between.cut()
        with pytest.raises(ConnectionError):
            assert connection.recv(1) == b"never"
    with connect(between) as connection:
        assert ask(connection, b"b") == b"b"


def test_a_server_that_is_gone_ends_the_connection(between: Proxy, echo: Echo) -> None:
    echo.close()
    # It may end while it is still being made.
    with contextlib.suppress(ConnectionResetError, BrokenPipeError), connect(between) as connection:
        assert ask(connection, b"a") == b""
