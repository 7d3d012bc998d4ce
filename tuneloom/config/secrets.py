"""Keys of the installation itself, each in a file that only its user may read."""

import base64
import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from tuneloom.config.settings import Settings
from tuneloom.errors import InvalidRequest

SIGNING_KEY_FILE = "signing-key.pem"


def read_signing_key(settings: Settings) -> bytes:
    """The installation's Ed25519 key for signing lineages, as PEM. See `Settings.signing_key`.

    Raises:
        InvalidRequest: the file that the settings name cannot be read.
    """
    if settings.signing_key is None:
        return read_or_make(settings.home / SIGNING_KEY_FILE, _make_signing_key)
    try:
        return settings.signing_key.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"`signing_key`: {settings.signing_key} cannot be read: {error.strerror}.") from error


def read_webhook_keys(settings: Settings) -> list[bytes]:
    """The keys that signing secrets of webhooks are encrypted with, in Fernet's form, the newest first.

    Raises:
        InvalidRequest: the file that the settings name cannot be read, or is empty.
    """
    path = settings.webhooks.key_file
    if path is None:
        return read_or_make(settings.home / "webhook-key", _make_webhook_key).split()
    try:
        keys = path.read_bytes().split()
    except OSError as error:
        raise InvalidRequest(f"`webhooks.key_file`: {path} cannot be read: {error.strerror}.") from error
    if not keys:
        raise InvalidRequest(f"`webhooks.key_file`: {path} is empty. It holds one key a line.")
    return keys


def _make_webhook_key() -> bytes:
    return base64.urlsafe_b64encode(secrets.token_bytes(32))


def _make_signing_key() -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_or_make(path: Path, make: Callable[[], bytes]) -> bytes:
    """What is in a file that only its user may read; made on first use, by one of several processes."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(make())
            file.flush()
            os.fsync(file.fileno())
        # A link fails if another process was first, and never shows half a file.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    return path.read_bytes()
