"""The pepper: what secrets of keys are hashed with, kept outside of the store, so that the store alone opens nothing.

Its file has one pepper a line, 64 hexadecimal digits each. Secrets are hashed with the first; the others are those that
it was before, with which secrets are still recognised. A file of 32 bytes is one pepper.
"""

import contextlib
import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from tuneloom.config.locks import alone
from tuneloom.config.secrets import read_or_make
from tuneloom.config.settings import Settings
from tuneloom.domain import hash_secret
from tuneloom.errors import InvalidRequest, Overloaded

logger = logging.getLogger(__name__)

SIZE_BYTES = 32
# A pepper that was rotated elsewhere is known here after this.
REREAD_S = 1.0
LOCK_TIMEOUT_S = 30.0
_LINE = re.compile(rb"[0-9a-f]{64}")


@dataclass(frozen=True)
class HashedSecret:
    """The keyed hash of a secret, and the id of the pepper that it was made with."""

    hash: str
    pepper: str


class Pepper:
    """The peppers of an installation, the current one first. With `reread` they follow their file. Thread-safe."""

    def __init__(
        self,
        values: tuple[bytes, ...],
        reread: Callable[[], tuple[bytes, ...]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._values = values
        self._ids = tuple(pepper_id(value) for value in values)
        self._reread = reread
        self._clock = clock
        self._read_at = clock()
        self._lock = threading.Lock()

    @property
    def id(self) -> str:
        """That of the current one."""
        return self._look()[0][0]

    def hash(self, secret: str) -> HashedSecret:
        """As secrets are stored from here on."""
        return self.hashes(secret)[0]

    def hashes(self, secret: str) -> list[HashedSecret]:
        """Every form in which a secret may be stored, the current one first."""
        return [HashedSecret(hash_secret(value, secret), id) for id, value in self._look()]

    def _look(self) -> list[tuple[str, bytes]]:
        with self._lock:
            if self._reread is not None and self._clock() - self._read_at >= REREAD_S:
                self._read_at = self._clock()
                try:
                    self._values = self._reread()
                    self._ids = tuple(pepper_id(value) for value in self._values)
                except (OSError, InvalidRequest) as error:
                    # A file that is being replaced comes back; what was read before still holds.
                    logger.warning("the pepper cannot be read again: %s", error)
            return list(zip(self._ids, self._values, strict=True))


def pepper_id(value: bytes) -> str:
    """A short name of a pepper that tells nothing of it."""
    return hashlib.sha256(b"tuneloom pepper id\0" + value).hexdigest()[:8]


def pepper_path(settings: Settings) -> Path:
    return settings.pepper or settings.home / "pepper"


def read_pepper(settings: Settings) -> Pepper:
    """The installation's peppers. The file in `home` is made on first use, readable by its user only.

    Raises:
        InvalidRequest: the file that the settings name cannot be read, or holds something else.
    """
    path = pepper_path(settings)
    if settings.pepper is None:
        read_or_make(path, lambda: _lines((secrets.token_bytes(SIZE_BYTES),)))
    try:
        return Pepper(_read(path), lambda: _read(path))
    except OSError as error:
        raise InvalidRequest(f"`pepper`: {path} cannot be read: {error.strerror}.") from error


def rotate_pepper(settings: Settings, needed: Callable[[], Collection[str]]) -> Pepper:
    """Put a new pepper first. Of the ones before, the last stays, and those whose ids are in `needed()`; all of them if
    it has an empty id, which may be any.

    Raises:
        InvalidRequest: the file cannot be written, as where it is mounted into a container.
    """
    path = pepper_path(settings)
    read_pepper(settings)
    try:
        with _alone(path):
            last, *older = _read(path)
            wanted = set(needed())
            kept = [value for value in older if "" in wanted or pepper_id(value) in wanted]
            _replace(path, _lines((secrets.token_bytes(SIZE_BYTES), last, *kept)))
    except OSError as error:
        raise InvalidRequest(
            f"{path} cannot be written: {error.strerror}. Where it comes from elsewhere, such as a Kubernetes secret, "
            "add a line of 64 hexadecimal digits at its end; once every machine has it, move that line to the front."
        ) from error
    return read_pepper(settings)


def _read(path: Path) -> tuple[bytes, ...]:
    data = path.read_bytes()
    lines = data.split()
    if lines and all(_LINE.fullmatch(line) for line in lines):
        return tuple(bytes.fromhex(line.decode()) for line in lines)
    if len(data) == SIZE_BYTES:
        return (data,)
    raise InvalidRequest(f"{path} is not a pepper: write lines of 64 hexadecimal digits (`openssl rand -hex 32`).")


def _lines(values: tuple[bytes, ...]) -> bytes:
    return b"".join(value.hex().encode() + b"\n" for value in values)


def _alone(path: Path) -> contextlib.AbstractContextManager[None]:
    """One process at a time: of two new peppers, both must stay in the file."""
    refusal = Overloaded(f"Another process keeps {path} locked. Try again when it has ended.")
    return alone(path.with_name(path.name + ".lock"), LOCK_TIMEOUT_S, refusal)


def _replace(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
