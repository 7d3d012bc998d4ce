"""People: a bearer token that Firebase Auth has issued becomes a Principal. Its uid is the owner.

The parts: `firebase_tokens` checks a token, `firebase_keys` has the keys for that, `firebase_users` sees that the user
is still welcome, `firebase_clock` what time it is at Google. No rights of routes, no models.
"""

from collections.abc import Mapping

import httpx

from tuneloom.config import AUTH_EMULATOR, IdentitySettings, Settings, check_production
from tuneloom.domain import OWNER, RESERVED_OWNERS, Principal, Scope
from tuneloom.errors import InvalidRequest, PermissionDenied, Unauthenticated
from tuneloom.serve.firebase_clock import GoogleClock
from tuneloom.serve.firebase_keys import KeySet, parse_certificates, parse_jwks
from tuneloom.serve.firebase_tokens import Claims, Tokens
from tuneloom.serve.firebase_users import GoogleCredentials, Users, emulator_headers

APP_CHECK_HEADER = "x-firebase-appcheck"
APP_CHECK_CODE = "invalid_app_check_token"
APP_CHECK_ISSUER = "https://firebaseappcheck.googleapis.com/"
ID_TOKEN_ISSUER = "https://securetoken.google.com/"
TOOLKIT = "identitytoolkit.googleapis.com/v1"
PERSON_SCOPES: tuple[Scope, ...] = ("inference", "training", "account")
HTTP_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 50


class People:
    """Finds the person of an ID token. `users` None: whoever has a sound token is welcome until it is over."""

    def __init__(self, settings: IdentitySettings, tokens: Tokens, users: Users | None, apps: Tokens | None) -> None:
        self._settings, self._tokens, self._users, self._apps = settings, tokens, users, apps
        self.warning = tokens.warning
        self._admins = frozenset(name.casefold() if "@" in name else name for name in settings.admins)
        self._domains = frozenset(domain.casefold().removeprefix("@") for domain in settings.allowed_domains)

    async def authenticate(self, token: str, headers: Mapping[str, str]) -> Principal:
        """The caller by their ID token; `headers` (lower case) may hold App Check's.

        Raises:
            Unauthenticated: a token is missing, wrong, over or revoked, or the user is gone.
            PermissionDenied: the person is known, and not let in.
            Overloaded: it cannot be told now.
        """
        claims = await self._tokens.verify(token)
        principal = self._to_principal(claims)
        if self._apps is not None:
            await self._check_app(self._apps, headers.get(APP_CHECK_HEADER))
        if self._users is not None:
            await self._users.check(principal.owner, claims["iat"])
        return principal

    def _to_principal(self, claims: Claims) -> Principal:
        uid, firebase = claims["sub"], claims.get("firebase")
        details = firebase if isinstance(firebase, dict) else {}
        if details.get("tenant"):
            raise PermissionDenied("Accounts of a tenant cannot sign in here. Use an account of the project itself.")
        if not OWNER.fullmatch(uid) or uid.casefold() in RESERVED_OWNERS:
            raise PermissionDenied("An account with this uid cannot sign in here. Ask the operator for another uid.")
        email = claims.get("email") if isinstance(claims.get("email"), str) else None
        if details.get("sign_in_provider") == "anonymous":
            if not self._settings.anonymous or self._domains:
                raise PermissionDenied("Anonymous accounts are not let in. Sign in with an account of yours.")
            scopes: tuple[Scope, ...] = self._settings.anonymous_scopes
            return Principal(owner=uid, key_id="", scopes=scopes, kind="anonymous")
        verified = email.casefold() if email and claims.get("email_verified") is True else None
        if self._domains and (verified is None or verified.rpartition("@")[2] not in self._domains):
            raise PermissionDenied(
                "Only people with a verified e-mail address of certain domains are let in. Verify yours, or sign in "
                "with another account."
            )
        is_admin = uid in self._admins or verified in self._admins
        scopes = (*PERSON_SCOPES, "admin") if is_admin else PERSON_SCOPES
        return Principal(owner=uid, key_id="", scopes=scopes, kind="person", email=email)

    async def _check_app(self, apps: Tokens, token: str | None) -> None:
        if token is None:
            raise Unauthenticated(
                "This request needs an App Check token in the header `X-Firebase-AppCheck`. Programs use an API key.",
                code="missing_app_check_token",
            )
        claims = await apps.verify(token)
        if self._settings.app_check_apps and claims["sub"] not in self._settings.app_check_apps:
            raise Unauthenticated("Incorrect App Check token: that app may not call here.", code=APP_CHECK_CODE)


def open_people(settings: Settings, environment: Mapping[str, str]) -> People | None:
    """As the settings say; None without a project.

    Raises:
        InvalidRequest: the environment points at an emulator, and this is production.
    """
    identity = settings.identity
    check_production(settings, environment)
    if identity.firebase_project is None:
        return None
    emulator = environment.get(AUTH_EMULATOR)
    if emulator and "/" in emulator:
        raise InvalidRequest(f"`{AUTH_EMULATOR}` is a host and a port, such as `127.0.0.1:9099`, not {emulator!r}.")
    clock, http = GoogleClock(), open_http()
    users = None
    if identity.revocation_check_s is not None:
        base = f"http://{emulator}/{TOOLKIT}" if emulator else f"https://{TOOLKIT}"
        users = Users(
            http,
            f"{base}/projects/{identity.firebase_project}/accounts:lookup",
            emulator_headers if emulator else GoogleCredentials(),
            clock,
            check_s=identity.revocation_check_s,
        )
    return People(
        identity, id_tokens(identity, http, clock, is_emulated=bool(emulator)), users, app_tokens(identity, http, clock)
    )


def open_http() -> httpx.AsyncClient:
    # Plain HTTP is for this machine alone, where no proxy has anything to do.
    return httpx.AsyncClient(
        timeout=HTTP_TIMEOUT_S,
        limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
        mounts={"http://": httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=MAX_CONNECTIONS))},
    )


def id_tokens(settings: IdentitySettings, http: httpx.AsyncClient, clock: GoogleClock, *, is_emulated: bool) -> Tokens:
    """ID tokens of the project; the emulator's are not signed, as Google's own libraries take them."""
    keys = KeySet(http, settings.certificates_url, parse_certificates, clock, what="Google's certificates")
    project = settings.firebase_project or ""
    return Tokens(
        None if is_emulated else keys,
        clock,
        issuer=ID_TOKEN_ISSUER + project,
        audience=project,
        leeway_s=settings.clock_leeway_s,
        times=("iat", "auth_time"),
    )


def app_tokens(settings: IdentitySettings, http: httpx.AsyncClient, clock: GoogleClock) -> Tokens | None:
    """App Check's tokens, if they are asked for."""
    if settings.app_check == "off":
        return None
    return Tokens(
        KeySet(http, settings.app_check_keys_url, parse_jwks, clock, what="App Check's keys"),
        clock,
        issuer=f"{APP_CHECK_ISSUER}{settings.app_check_project_number}",
        audience=f"projects/{settings.app_check_project_number}",
        is_listed=True,
        leeway_s=settings.clock_leeway_s,
        what="App Check token",
        code=APP_CHECK_CODE,
    )
