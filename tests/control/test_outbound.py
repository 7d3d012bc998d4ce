"""Nothing is sent inward, whatever a URL says and a name resolves to; TLS is for the name that was given."""

import ipaddress
import socket
import ssl

import pytest

from tests.control.receivers import Authority, receiver
from tuneloom.control import outbound
from tuneloom.control.outbound import NotAllowed, check_url, is_public, pick_addresses, post

INWARD = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",  # metadata of a cloud
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",  # the host below a virtual machine of a cloud
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:8.8.8.8",
    "64:ff9b::7f00:1",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "3fff::1",
    "fc00::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::1",
    "fe80::1%1",
    "fec0::1",
    "ff02::1",
]
OUTWARD = ["1.1.1.1", "8.8.8.8", "93.184.216.34", "172.32.0.1", "100.128.0.1", "192.0.1.1", "2606:4700:4700::1111"]


@pytest.mark.parametrize("address", INWARD)
def test_what_leads_inward_is_refused_however_it_is_reached(address):
    assert not is_public(ipaddress.ip_address(address))
    parts = check_url("https://hooks.example.com/x", allow_private=False)
    for found in ([address], ["93.184.216.34", address], [address, "93.184.216.34"]):
        with pytest.raises(NotAllowed):
            pick_addresses(parts, allow_private=False, resolve=lambda *_, found=found: found)
    host = f"[{address.replace('%', '%25')}]" if ":" in address else address
    with pytest.raises(NotAllowed) as caught:
        check_url(f"https://{host}/", allow_private=False)
        pick_addresses(outbound.urlsplit(f"https://{host}/"), allow_private=False)
    assert caught.value.status == 400


@pytest.mark.parametrize("address", OUTWARD)
def test_what_is_public_is_not(address):
    assert is_public(ipaddress.ip_address(address))
    parts = check_url(f"https://{f'[{address}]' if ':' in address else address}/", allow_private=False)
    assert pick_addresses(parts, allow_private=False, resolve=lambda host, _: [host]) == [address]


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "017700000001", "localhost", "0", "127.0.0.1."])
def test_other_spellings_of_loopback_are_seen_through(host):
    """At once, and by the resolver of the system, which is asked as it is asked when something is sent."""
    with pytest.raises(NotAllowed, match="its host is not a public address"):
        check_url(f"https://{host}/", allow_private=False)
    with pytest.raises(NotAllowed, match="does not resolve to a public address"):
        pick_addresses(outbound.urlsplit(f"https://{host}/"), allow_private=False)


@pytest.mark.parametrize("host", ["metadata", "metadata.google.internal", "LocalHost.", "a.localhost", "printer.local"])
def test_names_that_are_inside_by_their_form_are_refused_at_once(host):
    with pytest.raises(NotAllowed, match="its host is not a public address"):
        check_url(f"https://{host}/", allow_private=False)
    assert check_url(f"https://{host}/", allow_private=True).hostname == host.lower()


def test_an_unknown_name_is_answered_like_one_inside():
    parts = check_url("https://no-such-name.invalid/", allow_private=False)

    def fail(*_: object) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(NotAllowed) as absent:
        pick_addresses(parts, allow_private=False, resolve=fail)
    with pytest.raises(NotAllowed) as inside:
        pick_addresses(parts, allow_private=False, resolve=lambda *_: ["10.0.0.1"])
    assert absent.value.body() == inside.value.body()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.com/", "use an `https://` URL"),
        ("ftp://example.com/", "use an `https://` URL"),
        ("file:///etc/passwd", "use an `https://` URL"),
        ("example.com/hook", "use an `https://` URL"),
        ("https:///hook", "no host"),
        ("https://ada:secret@example.com/", "user name or password"),
        ("https://example.com@127.0.0.1/", "user name or password"),
        ("https://example.com/#part", "fragment"),
        ("https://example.com:22/", "port 22"),
        ("https://example.com:80/", "port 80"),
        ("https://example.com:0/", "no port that can be"),
        ("https://example.com:99999/", "not a URL"),
        ("https://[::1/", "not a URL"),
        ("https://exämple.com/", "xn--"),
        ("https://example.com/a b", "without spaces"),
        ("https://example.com/\r\nx-evil: 1", "without spaces"),
        ("https://example.com\\@127.0.0.1/", "without spaces"),
        ("https://example.com/" + "a" * 2048, "at most 2048"),
        ("https://10.0.0.1/", "not a public address"),
        ("https://[2606:4700::1%25eth0]/", "not a public address"),
        ("https://kubernetes.default.svc/", "not a public address"),
        ("https://256.256.256.256/", "neither a name nor an address"),
        ("https://1.2.3.4.5/", "neither a name nor an address"),
        ("https://example..com/", "neither a name nor an address"),
        ("https://-example.com/", "neither a name nor an address"),
        ("https://exa%6dple.com/", "neither a name nor an address"),
        ("https://" + "a" * 64 + ".com/", "neither a name nor an address"),
        ("https://" + "a.b" * 90 + ".com/", "neither a name nor an address"),
        ("", "use an `https://` URL"),
    ],
)
def test_a_url_that_may_not_be_says_why(url, said):
    with pytest.raises(NotAllowed) as caught:
        check_url(url, allow_private=False)
    assert caught.value.param == "url" and said in caught.value.message


@pytest.mark.parametrize(
    "url", ["https://example.com", "https://ex_a.com:8443/a?b=c", "https://xn--bcher-kva.de:1024/", "https://a.de./"]
)
def test_a_plain_url_may_be(url):
    assert check_url(url, allow_private=False).geturl() == url


def test_private_addresses_and_http_are_for_those_who_allow_them():
    parts = check_url("http://127.0.0.1:80/hook", allow_private=True)
    assert pick_addresses(parts, allow_private=True) == ["127.0.0.1"]
    with pytest.raises(NotAllowed, match="user name"):
        check_url("http://ada@127.0.0.1/", allow_private=True)


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch):
    """A name that resolves to somewhere else the second time: nobody asks a second time."""
    asked, connected = [], []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["93.184.216.34" if len(asked) == 1 else "127.0.0.1"]

    def connect(address, timeout):
        connected.append(address)
        raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:3128")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:3128")
    parts = check_url("https://rebind.example.com/", allow_private=False)
    addresses = pick_addresses(parts, allow_private=False, resolve=resolve)
    with pytest.raises(ConnectionRefusedError):
        post(parts, addresses, b"{}", {}, timeout_s=1, tls=ssl.create_default_context())
    assert (asked, connected) == (["rebind.example.com"], [("93.184.216.34", 443)])


def test_tls_is_checked_for_the_name_and_not_for_the_address():
    authority = Authority()
    with receiver(tls=authority.server("hooks.example.com")) as seen:
        parts = check_url(f"https://hooks.example.com:{seen.port}/a?b=c", allow_private=True)
        answer = post(parts, ["127.0.0.1"], b"{}", {"x-y": "z"}, timeout_s=10, tls=authority.trusting())
    assert (answer.status, answer.text) == (200, "ok")
    (request,) = seen.seen
    assert (request.path, request.body, request.headers["x-y"]) == ("/a?b=c", b"{}", "z")
    assert request.headers["host"] == f"hooks.example.com:{seen.port}"


@pytest.mark.parametrize("name", ["other.example.com", "127.0.0.1"])
def test_a_certificate_of_another_name_is_refused_before_anything_is_sent(name):
    authority = Authority()
    with receiver(tls=authority.server(name)) as seen:
        parts = check_url(f"https://hooks.example.com:{seen.port}/", allow_private=True)
        with pytest.raises(ssl.SSLCertVerificationError):
            post(parts, ["127.0.0.1"], b"{}", {}, timeout_s=10, tls=authority.trusting())
    assert seen.seen == []


def test_a_certificate_of_an_unknown_authority_is_refused():
    with receiver(tls=Authority().server("hooks.example.com")) as seen:
        parts = check_url(f"https://hooks.example.com:{seen.port}/", allow_private=True)
        with pytest.raises(ssl.SSLCertVerificationError):
            post(parts, ["127.0.0.1"], b"{}", {}, timeout_s=10, tls=ssl.create_default_context())
    assert seen.seen == []


def test_the_next_address_is_tried_when_one_refuses():
    with receiver() as seen:  # it listens on IPv4 alone
        parts = check_url(f"http://hooks.example.com:{seen.port}/", allow_private=True)
        answer = post(parts, ["::1", "127.0.0.1"], b"{}", {}, timeout_s=10, tls=ssl.create_default_context())
    assert answer.status == 200 and len(seen.seen) == 1
