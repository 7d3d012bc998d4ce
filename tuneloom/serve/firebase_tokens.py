"""Google's JSON Web Tokens: read, their signature and claims checked. RS256 alone, whatever a token's header says.

What must hold of an ID token: https://firebase.google.com/docs/auth/admin/verify-id-tokens, of App Check's:
https://firebase.google.com/docs/app-check/custom-resource-backend. Messages never repeat anything of a token.
"""

import json
import re
from typing import Any

import jwt

from tuneloom.errors import Unauthenticated
from tuneloom.serve.firebase_clock import GoogleClock
from tuneloom.serve.firebase_keys import KeySet

ALGORITHM = "RS256"
# Google's have 1 to 2 KB.
MAX_TOKEN_CHARS = 8192
_JWT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")

Claims = dict[str, Any]


class Tokens:
    """Tokens of one issuer for one audience. `keys` None: the emulator's, which are not signed.

    `what` names the token to people; `code` is the error's; `times` are the claims that must lie in the past. With
    `is_listed` a token may be for others too, as App Check's are.
    """

    def __init__(
        self,
        keys: KeySet | None,
        clock: GoogleClock,
        *,
        issuer: str,
        audience: str,
        leeway_s: float,
        is_listed: bool = False,
        times: tuple[str, ...] = ("iat",),
        what: str = "ID token",
        code: str = "invalid_id_token",
    ) -> None:
        self._keys, self._clock, self._leeway_s = keys, clock, leeway_s
        self.warning = clock.warning
        self._issuer, self._audience, self._times = issuer, audience, times
        self._is_listed = is_listed
        self._what, self._code = what, code

    async def verify(self, token: str) -> Claims:
        """The claims.

        Raises:
            Unauthenticated: it is not one of these tokens, or over.
            Overloaded: the keys to tell cannot be had now.
        """
        claims = await self._read(token)
        if claims.get("iss") != self._issuer or not self._is_for_us(claims.get("aud")):
            raise self._refused("it is for another project")
        subject = claims.get("sub")
        if not isinstance(subject, str) or not 0 < len(subject) <= 128:
            raise self._refused("it does not say whose it is")
        if any(type(claims.get(name)) is not int for name in (*self._times, "exp")):
            raise self._refused("it does not say when it holds")
        if self._from_future(claims) and self._keys is not None:
            # Rather is our clock wrong, and it was not when Google was asked last.
            await self._keys.refresh()
        if self._from_future(claims):
            raise self._refused(f"it is not valid yet{self._clock_notice()}")
        if claims["exp"] + self._leeway_s <= self._clock():
            message = f"Your {self._what} has expired{self._clock_notice()}. Sign in again, or refresh it."
            raise Unauthenticated(message, code=self._code.replace("invalid", "expired"))
        return claims

    async def _read(self, token: str) -> Claims:
        if len(token) > MAX_TOKEN_CHARS or not _JWT.fullmatch(token):
            raise self._refused("it is not a JSON Web Token")
        try:
            if self._keys is None:
                return _payload(jwt.PyJWS().decode(token, options={"verify_signature": False}))
            header = jwt.get_unverified_header(token)
            if header.get("alg") != ALGORITHM or not isinstance(header.get("kid"), str):
                raise self._refused(f"it is not signed with {ALGORITHM}")
            key = await self._keys.find(header["kid"])
            if key is None:
                raise self._refused("it is signed with a key that Google does not have, or no longer has")
            return _payload(jwt.PyJWS().decode(token, key, algorithms=[ALGORITHM]))
        except jwt.InvalidSignatureError:
            raise self._refused("its signature is wrong") from None
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise self._refused("it cannot be read") from None

    def _is_for_us(self, claim: Any) -> bool:
        return claim == self._audience or (self._is_listed and isinstance(claim, list) and self._audience in claim)

    def _from_future(self, claims: Claims) -> bool:
        return any(claims[name] > self._clock() + self._leeway_s for name in self._times)

    def _refused(self, reason: str) -> Unauthenticated:
        return Unauthenticated(f"Incorrect {self._what}: {reason}. Sign in again.", code=self._code)

    def _clock_notice(self) -> str:
        return "" if self._clock.is_usable else f" ({self._clock.describe()}, its operator must set it)"


def _payload(raw: bytes) -> Claims:
    claims = json.loads(raw)
    if not isinstance(claims, dict):
        raise ValueError("not an object")
    return claims
