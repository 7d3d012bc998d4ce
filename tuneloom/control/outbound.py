"""One POST to a URL that a user gave, so that it can only reach the public internet.

The name is resolved once and the connection goes to the address that was checked, with TLS for the name. No redirect is
followed, no proxy of the environment is used, and from the connection to the end of the answer there is one deadline.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from tuneloom.errors import InvalidRequest

MAX_URL = 2048
MAX_ANSWER_BYTES = 1000
# Ports below belong to other protocols than ours.
FIRST_FREE_PORT = 1024
# What one address may take of the time, so that another can be tried.
CONNECT_S = 5.0
_PORTS = {"https": 443, "http": 80}
# The last parts of names that are nobody's on the internet (RFC 6761, 6762, 8375; ICANN's choices; Kubernetes).
_INSIDE = frozenset({"localhost", "local", "internal", "localdomain", "svc", "arpa", "home", "corp", "lan", "onion"})
MAX_NAME = 253
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[str]]

# IANA's special-purpose registry, multicast and reserved; 100.64/10 holds metadata servers too, and so do single
# addresses of clouds that look public.
_REFUSED_V4 = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# All that is public lies in 2000::/3; what is mapped, translated (NAT64), local or metadata (fd00:ec2::254) does not.
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_V6 = tuple(
    ipaddress.IPv6Network(network)
    # Protocol assignments with Teredo and ORCHID, documentation, 6to4, AS112.
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)


class NotAllowed(InvalidRequest):
    """The URL leads to where nothing may be sent."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str


def check_url(url: str, *, allow_private: bool, param: str = "url") -> SplitResult:
    """The parts of `url` if requests may be sent to such a one, as far as it can be told without asking DNS.

    Raises:
        NotAllowed: it is not https (or http where private addresses are allowed), it holds a user name or a fragment,
            or its host or port is refused; the message says which.
    """

    def refuse(why: str) -> NotAllowed:
        return NotAllowed(f"Invalid `{param}`: {why}.", param=param)

    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url or len(url) > MAX_URL:
        raise refuse(f"use at most {MAX_URL} ASCII characters without spaces; a foreign host name in its `xn--` form")
    try:
        parts = urlsplit(url)
        host, given_port = parts.hostname, parts.port
    except ValueError as error:
        raise refuse(f"it is not a URL ({error})") from error
    if parts.scheme not in (("https", "http") if allow_private else ("https",)):
        raise refuse("use an `https://` URL")
    port = port_of(parts)
    if not host or given_port == 0:
        raise refuse("it has no host, or no port that can be")
    address = _literal(host)
    if address is None and not _is_name(host):
        raise refuse("its host is neither a name nor an address")
    if parts.username is not None or parts.password is not None:
        raise refuse("it holds a user name or password; what is sent is proved by its signature")
    if parts.fragment:
        raise refuse("it has a fragment (`#`)")
    if not allow_private:
        if port != 443 and port < FIRST_FREE_PORT:
            raise refuse(f"port {port} is not allowed; use 443 or one from {FIRST_FREE_PORT} up")
        if (address is not None and not is_public(address)) or (address is None and _is_inside(host)):
            raise refuse("its host is not a public address")
    return parts


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet and to no protocol that leads elsewhere."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _REFUSED_V4)
    # One with a zone (`%eth0`) is of a link, whatever its number.
    if address.scope_id is not None:
        return False
    return address in _PUBLIC_V6 and not any(address in network for network in _REFUSED_V6)


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name, as the system's resolver gives them. It bounds its own time."""
    return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


def pick_addresses(parts: SplitResult, *, allow_private: bool, resolve: Resolve = resolve) -> list[str]:
    """The addresses to connect to, of which none leads inward: one that does is reason to refuse them all.

    Raises:
        NotAllowed: the name does not resolve, or not to public addresses. It does not say which, so that names inside
            cannot be probed.
    """
    host = parts.hostname or ""
    try:
        found = resolve(host, port_of(parts))
        addresses = [ipaddress.ip_address(text) for text in found]
    except (OSError, ValueError):  # a name that cannot be one is a UnicodeError
        addresses = []
    if not addresses or not (allow_private or all(map(is_public, addresses))):
        raise NotAllowed("The host of the URL does not resolve to a public address.")
    return [str(address) for address in addresses]


def post(
    parts: SplitResult,
    addresses: Sequence[str],
    body: bytes,
    headers: Mapping[str, str],
    *,
    timeout_s: float,
    tls: ssl.SSLContext,
) -> Answer:
    """Send `body` to the first of `addresses` that takes the connection. Of the answer's text only the start is read.

    Raises:
        TimeoutError: no status and headers came within `timeout_s`.
        OSError, http.client.HTTPException: the connection, its TLS or the answer went wrong.
    """
    host, port, until = parts.hostname or "", port_of(parts), time.monotonic() + timeout_s
    connection = _connect(addresses, port, until)
    try:
        if parts.scheme == "https":
            # No handshake yet: it needs the deadline too.
            connection = tls.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)
        with _deadline(connection, until) as expired:
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            client = http.client.HTTPConnection(host, port)
            client.default_port = _PORTS[parts.scheme]
            client.sock = connection
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            client.request("POST", target, body, {**headers, "connection": "close"})
            with client.getresponse() as response:
                # Headers that were cut off look like whole ones.
                if expired.is_set():
                    raise TimeoutError("timed out")
                return _read(response)
    finally:
        connection.close()


def port_of(parts: SplitResult) -> int:
    return parts.port or _PORTS[parts.scheme]


def _connect(addresses: Sequence[str], port: int, until: float) -> socket.socket:
    failure: OSError = TimeoutError("timed out")
    for address in addresses:
        left_s = until - time.monotonic()
        if left_s <= 0:
            break
        try:
            connection = socket.create_connection((address, port), timeout=min(left_s, CONNECT_S))
            connection.settimeout(left_s)
            return connection
        except OSError as error:
            failure = error
    raise failure


@contextmanager
def _deadline(connection: socket.socket, until: float) -> Iterator[threading.Event]:
    """Shut the connection down at `until`: a socket's own timeout is for each read, and a peer may drip for ever.

    The event is set once it has been.
    """
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        with suppress(OSError):
            # That of the plain socket: TLS has a shutdown of its own, which talks.
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, until - time.monotonic()), expire)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    except (OSError, http.client.HTTPException) as error:
        if expired.is_set():
            raise TimeoutError("timed out") from error
        raise
    finally:
        timer.cancel()
        # It must not meet a descriptor that is somebody else's by then.
        timer.join()


def _read(response: http.client.HTTPResponse) -> Answer:
    text = b""
    with suppress(OSError, ValueError, http.client.HTTPException):
        text = response.read1(MAX_ANSWER_BYTES)
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, text.decode("utf-8", "replace"))


def _literal(host: str) -> Address | None:
    """The address that a host is, in any spelling that resolvers take for one: `127.1`, `0x7f000001`, `2130706433`."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host.rstrip(".")))
    except OSError:
        return None


def _is_name(host: str) -> bool:
    """Whether a name can be one in DNS. What ends in a number is an address to others, and a wrong one."""
    labels = host.removesuffix(".").split(".")
    return len(host) <= MAX_NAME and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()


def _is_inside(host: str) -> bool:
    """Whether a name is one that no public resolver knows. Others tell when they are resolved."""
    *rest, last = host.rstrip(".").split(".")
    return not rest or last in _INSIDE
