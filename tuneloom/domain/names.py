"""Names and ids: how they are made, and what they may be."""

import hashlib
import hmac
import re
import secrets
import string

from tuneloom.domain.training import JobSpec
from tuneloom.domain.values import LOCAL_OWNER
from tuneloom.errors import InvalidRequest

OWNER = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
# Nobody who signs in may be one of these: the embedded mode's owner, and who owns the bases.
RESERVED_OWNERS = frozenset({LOCAL_OWNER, "tuneloom"})
_BASE62 = string.digits + string.ascii_letters


def new_id(prefix: str, length: int = 24) -> str:
    """A fresh random id such as `file-4uXk...`: `prefix` with its separator, then base-62 characters."""
    return prefix + _base62(secrets.randbelow(62**length), length)


def event_id(at_s: float) -> str:
    """An id that sorts by time to the microsecond, unique among writers of the same microsecond."""
    return f"ftevent-{int(at_s * 1_000_000):016x}{secrets.token_hex(4)}"


MODEL_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
RESERVED_NAMES = frozenset({"base", "ft", "tuneloom", "v1", "models", "admin", "active", "latest"})


def check_model_name(name: str, *, param: str = "suffix") -> str:
    """Return `name` if it may name a Model: 1-64 of `a-z 0-9 . _ -`, starting and ending with a letter or digit.

    Raises:
        InvalidRequest: it may not; the message says why.
    """
    if not MODEL_NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"Invalid `{param}`: {name[:80]!r}. Use 1 to 64 lower-case letters, digits, `.`, `_` or `-`, "
            "starting and ending with a letter or digit.",
            param=param,
        )
    if name in RESERVED_NAMES:
        raise InvalidRequest(f"`{name}` is a reserved name. Choose another `{param}`.", param=param)
    return name


def model_name(spec: JobSpec, job_id: str) -> str:
    """The Model that a job publishes to: its suffix, or a name of its own made from the job id."""
    return spec.suffix or f"ft-{short_id(job_id).lower()}"


def model_id(owner: str, name: str) -> str:
    return f"{owner}:{name}"


def version_id(owner: str, name: str, number: int) -> str:
    return f"{owner}:{name}:v{number}"


def short_id(job_id: str) -> str:
    """Eight characters that stand for a job in names."""
    return _base62(int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8]), 8)


def ft_name(base: str, owner: str, suffix: str | None, unique: str) -> str:
    """OpenAI's spelling of a Version: `ft:{base}:{owner}:{suffix}:{unique}`, empty suffix allowed."""
    return f"ft:{base}:{owner}:{suffix or ''}:{unique}"


def checkpoint_name(ft: str, step: int) -> str:
    return f"{ft}:ckpt-step-{step}"


def adapter_sha256(files: dict[str, str]) -> str:
    """The content hash of an adapter from `{file name: sha256 hex}`; independent of order."""
    digest = hashlib.sha256()
    for name, sha256 in sorted(files.items()):
        digest.update(f"{name}\0{sha256}\n".encode())
    return digest.hexdigest()


def hash_secret(pepper: bytes, secret: str) -> str:
    """The keyed hash under which a key's secret is stored: HMAC-SHA256, hex."""
    return hmac.new(pepper, secret.encode(), hashlib.sha256).hexdigest()


def _base62(number: int, length: int) -> str:
    """The `length` lowest digits of a number, the lowest first."""
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(digits)
