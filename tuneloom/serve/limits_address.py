"""Where a request comes from: the address of the connection, or of the last hop before proxies that are trusted."""

import functools
import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import Scope

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

UNKNOWN = "unknown"
# Who has one address of IPv6 has all those of its network.
_PREFIX_BITS = 64


class Addresses:
    """`trusted`: networks whose hosts say the truth in `X-Forwarded-For`."""

    def __init__(self, trusted: Sequence[str]) -> None:
        self._trusted: list[Network] = [ipaddress.ip_network(text) for text in trusted]

    def of(self, scope: Scope) -> str:
        """What stands for the client: an IPv4 address, the network of an IPv6 one, or `unknown`."""
        address = self.client(scope)
        if address is None:
            return UNKNOWN
        if isinstance(address, ipaddress.IPv6Address):
            return str(ipaddress.ip_network((address, _PREFIX_BITS), strict=False))
        return str(address)

    def client(self, scope: Scope) -> Address | None:
        """The address of the client, if it is known.

        Each proxy appends whom it was called by. So the list is read from its end, and only as long as whoever wrote
        the entry is trusted: what stands before is the client's own invention.
        """
        peer = scope.get("client")
        address = _parse(peer[0]) if peer else None
        if address is not None and self._is_trusted(address):
            hops = ",".join(Headers(scope=scope).getlist("x-forwarded-for")).split(",")
            for text in reversed(hops):
                hop = _parse(text)
                if hop is None:
                    break
                address = hop
                if not self._is_trusted(hop):
                    break
        return address

    def _is_trusted(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Address | None:
    """An address as proxies write it, with or without port, as a plain one."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address
