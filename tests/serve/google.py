"""Google's part of signing in, on loopback: certificates, App Check's keys, users and access tokens, all our own."""

import base64
import contextlib
import datetime
import http.server
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import cache
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from tuneloom.config import IdentitySettings
from tuneloom.domain import Principal
from tuneloom.serve.firebase import People, app_tokens, id_tokens, open_http
from tuneloom.serve.firebase_clock import GoogleClock
from tuneloom.serve.firebase_users import Users

PROJECT = "tuneloom-prod"
NUMBER = "123456789"


@cache
def private_key(id: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@cache
def certificate(id: str) -> str:
    key, name = private_key(id), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "securetoken")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
    signed = builder.not_valid_after(now + datetime.timedelta(days=9)).sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def claims(**more: Any) -> dict[str, Any]:
    """An ID token's, good ones; None takes one away."""
    now = int(time.time())
    good = {
        "iss": f"https://securetoken.google.com/{PROJECT}",
        "aud": PROJECT,
        "sub": "uid1",
        "iat": now - 5,
        "exp": now + 3595,
        "auth_time": now - 60,
        "email": "ada@example.com",
        "email_verified": True,
        "firebase": {"sign_in_provider": "password"},
    }
    return {name: value for name, value in {**good, **more}.items() if value is not None}


def sign(payload: dict[str, Any], kid: str | None = "k1", key: Any = None, algorithm: str = "RS256") -> str:
    headers = {"kid": kid} if kid is not None else {}
    return jwt.encode(payload, key or private_key("k1"), algorithm, headers)


def id_token(**more: Any) -> str:
    return sign(claims(**more))


def unsigned(payload: dict[str, Any], header: dict[str, Any]) -> str:
    """A token with that header and no signature, as no library would make it."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, payload)]
    return ".".join([*parts, ""])


def app_token(key: str = "a1", **more: Any) -> str:
    now = int(time.time())
    good = {
        "iss": f"https://firebaseappcheck.googleapis.com/{NUMBER}",
        "aud": [f"projects/{NUMBER}", "projects/tuneloom-prod"],
        "sub": "1:1:web:1",
        "iat": now - 5,
        "exp": now + 3595,
    }
    payload = {name: value for name, value in {**good, **more}.items() if value is not None}
    return jwt.encode(payload, private_key(key), "RS256", {"kid": "a1"})


@dataclass
class Google:
    """What the server answers, and how often it was asked, by path. `status` other than 200: an outage."""

    port: int = 0
    certificates: dict[str, str] = field(default_factory=lambda: {"k1": certificate("k1")})
    cache_control: str = "public, max-age=3600, must-revalidate"
    users: dict[str, dict[str, Any]] = field(default_factory=dict)
    status: int = 200
    delay_s: float = 0.0
    age_s: int = 0
    hits: dict[str, int] = field(default_factory=dict)
    authorizations: list[str | None] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/certs":
            return self.certificates
        if path == "/jwks":
            public = jwt.algorithms.RSAAlgorithm.to_jwk(private_key("a1").public_key(), as_dict=True)
            return {"keys": [{**public, "kid": "a1", "alg": "RS256", "use": "sig"}]}
        if path == "/token":
            return {"access_token": f"t{self.hits[path]}", "expires_in": 3600, "token_type": "Bearer"}
        assert path == "/lookup", path
        (uid,) = json.loads(body)["localId"]
        return {"users": [{"localId": uid, **self.users[uid]}]} if uid in self.users else {}


@contextlib.contextmanager
def running() -> Iterator[Google]:
    google = Google()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            google.hits[self.path] = google.hits.get(self.path, 0) + 1
            if self.path == "/lookup":
                google.authorizations.append(self.headers["authorization"])
            if google.delay_s:
                time.sleep(google.delay_s)
            payload = json.dumps(google.answer(self.path, body)).encode() if google.status == 200 else b"{}"
            self.send_response(google.status)
            self.send_header("content-type", "application/json")
            self.send_header("cache-control", google.cache_control)
            self.send_header("age", str(google.age_s))
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_POST = do_GET

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() - google.age_s, usegmt=True)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    google.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield google
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class Clock:
    """Time that moves when told."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def identity(google: Google, **more: Any) -> IdentitySettings:
    """Settings by which our Google is asked; no lookups of users."""
    urls = {"certificates_url": google.url("certs"), "app_check_keys_url": google.url("jwks")}
    return IdentitySettings.model_validate({"firebase_project": PROJECT, "revocation_check_s": None, **urls, **more})


def make_people(google: Google, clock: GoogleClock | None = None, users: Users | None = None, **more: Any) -> People:
    settings, http, clock = identity(google, **more), open_http(), clock or GoogleClock()
    tokens = id_tokens(settings, http, clock, is_emulated=False)
    return People(settings, tokens, users, app_tokens(settings, http, clock))


async def sign_in(people: People, token: str, **headers: str) -> Principal:
    return await people.authenticate(token, {name.replace("_", "-"): value for name, value in headers.items()})
