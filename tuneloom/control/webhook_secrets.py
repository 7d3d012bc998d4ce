"""Signing secrets of webhooks: made, kept encrypted, and used to sign as Standard Webhooks 1.0.0 says."""

import base64
import hashlib
import hmac
import logging
import secrets
from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from tuneloom.config import Settings, read_webhook_keys
from tuneloom.domain import WebhookEndpoint
from tuneloom.errors import InvalidRequest, TuneloomError

logger = logging.getLogger(__name__)

_PREFIX = "whsec_"


class Vault:
    """Encrypts with the first of the installation's keys and decrypts with any, so that a new one can be put first."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        try:
            self._fernet = MultiFernet([Fernet(key) for key in keys])
        except ValueError as error:
            raise InvalidRequest(
                "The keys for webhook secrets are wrong: each is 32 bytes in URL-safe base 64, one a line."
            ) from error

    def seal(self, secret: str) -> str:
        return self._fernet.encrypt(secret.encode()).decode()

    def open(self, sealed: str) -> str:
        """Raises TuneloomError if no key fits: the key file is another one than that which encrypted it."""
        try:
            return self._fernet.decrypt(sealed).decode()
        except InvalidToken as error:
            raise TuneloomError(
                "A webhook's signing secret cannot be decrypted with the keys at hand. Put back the key that was used "
                "(`webhooks.key_file`, else `webhook-key` in the home folder), or rotate the endpoint's secret."
            ) from error

    def secrets_of(self, endpoint: WebhookEndpoint, now: float) -> list[str]:
        """Those that sign at this moment, the newest first."""
        old = [each.secret for each in endpoint.old_secrets if now < each.until]
        return [self.open(sealed) for sealed in (endpoint.secret, *old)]


def open_vault(settings: Settings) -> Vault:
    """The vault of an installation. Its keys are read anew, so that one can be added while it runs."""
    try:
        return Vault(read_webhook_keys(settings))
    except InvalidRequest as error:
        # A caller of the API can do nothing about it, and learns no paths.
        logger.error("%s", error.message)
        raise TuneloomError("The keys for webhook secrets cannot be read. See the log of the service.") from error


def new_secret() -> str:
    """`whsec_` and 32 random bytes in base 64."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def hint(secret: str) -> str:
    return f"{_PREFIX}...{secret[-4:]}"


def signature(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """`v1,` and the HMAC-SHA256 over `{id}.{timestamp}.{body}` in base 64."""
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    signed = f"{id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
