"""Whose address counts: what a client claims is believed only as far as proxies are trusted."""

import pytest

from tuneloom.serve.limits_address import Addresses

LB, NODE = "35.191.0.7", "10.0.3.4"
TRUSTED = ("35.191.0.0/16", "10.0.0.0/8", "fd00::/8")


@pytest.mark.parametrize(
    "peer, forwarded, expected",
    [
        ("203.0.113.9", [], "203.0.113.9"),
        # Nobody trusts the client itself.
        ("203.0.113.9", ["1.2.3.4"], "203.0.113.9"),
        (LB, ["198.51.100.1"], "198.51.100.1"),
        (LB, [], LB),
        # The client invented the first; the load balancer appended the second.
        (LB, ["1.2.3.4, 198.51.100.1"], "198.51.100.1"),
        (LB, ["1.2.3.4", "198.51.100.1"], "198.51.100.1"),
        # Two trusted hops.
        (NODE, ["198.51.100.1, 35.191.0.8"], "198.51.100.1"),
        (NODE, ["9.9.9.9, 198.51.100.1, 35.191.0.8"], "198.51.100.1"),
        (NODE, ["10.1.1.1, 35.191.0.8"], "10.1.1.1"),
        # What is no address ends the list.
        (LB, ["198.51.100.1, unknown"], LB),
        (LB, ["unknown, 35.191.0.9"], "35.191.0.9"),
        (LB, [""], LB),
        (LB, ["198.51.100.1:5312"], "198.51.100.1"),
        (LB, ["[2001:db8:1:2:3::4]:443"], "2001:db8:1:2::/64"),
        ("::ffff:35.191.0.7", ["198.51.100.1"], "198.51.100.1"),
        # All addresses of one network of IPv6 are one client.
        ("2001:db8:1:2:aaaa::1", [], "2001:db8:1:2::/64"),
        ("2001:db8:1:2:bbbb::9", [], "2001:db8:1:2::/64"),
        ("fd00::1", ["2001:db8:9::1"], "2001:db8:9::/64"),
        ("testclient", ["1.2.3.4"], "unknown"),
        (None, ["1.2.3.4"], "unknown"),
    ],
)
def test_the_address_of_a_request(peer: str | None, forwarded: list[str], expected: str) -> None:
    headers = [(b"x-forwarded-for", text.encode()) for text in forwarded]
    scope = {"type": "http", "headers": headers, "client": None if peer is None else (peer, 1)}
    assert Addresses(TRUSTED).of(scope) == expected


def test_without_trusted_proxies_nothing_is_believed() -> None:
    scope = {"type": "http", "headers": [(b"x-forwarded-for", b"1.2.3.4")], "client": ("127.0.0.1", 1)}
    assert Addresses(()).of(scope) == "127.0.0.1"
