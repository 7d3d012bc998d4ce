"""How Cloud Storage is spoken to: a client for each process, waits with an end, its errors in our words."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import requests
import urllib3
from google.api_core import exceptions
from google.auth import default, environment_vars
from google.auth import exceptions as auth
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.transport.requests import AuthorizedSession
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.adapters import HTTPAdapter

from tuneloom.errors import Overloaded
from tuneloom.store.base import StoreRefused

logger = logging.getLogger(__name__)

EMULATOR = "STORAGE_EMULATOR_HOST"
ROLE = "roles/storage.objectUser"
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
CONNECTIONS = 32
UNDERSTOOD = frozenset({404, 412})
RETRY_AFTER_S = 5.0
# How long one try waits for a connection, and then for each next byte.
CONNECT_S = 3.05
CALL_TRY_S = 5.0
PIECE_TRY_S = 60.0

_BUSY = (
    exceptions.RetryError,
    exceptions.TooManyRequests,
    exceptions.ServerError,
    auth.TransportError,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    ConnectionError,
)


@dataclass(frozen=True)
class Waits:
    """How long is tried what fails in passing, in s; the last try may take its own time more.

    `call_s` is for what asks or says little, `piece_s` for each piece of a large blob, either way.
    """

    call_s: float = 10.0
    piece_s: float = 120.0

    @property
    def call(self) -> dict[str, Any]:
        return _tries(self.call_s, CALL_TRY_S)

    @property
    def piece(self) -> dict[str, Any]:
        return _tries(self.piece_s, PIECE_TRY_S)


def _tries(total_s: float, try_s: float) -> dict[str, Any]:
    retry = DEFAULT_RETRY.with_delay(initial=0.2, maximum=2.0, multiplier=2.0).with_timeout(total_s)
    return {"timeout": (min(CONNECT_S, total_s), min(try_s, total_s)), "retry": retry}


class Bucket:
    """One bucket for all threads and forks of a process. Nothing is asked before the first call.

    `call` and `piece` are the arguments of a call of the library that bound it.
    """

    def __init__(self, name: str, waits: Waits) -> None:
        self.name = name
        self.call = waits.call
        self.piece = waits.piece
        # By process: a fork must not write to the sockets of the one that it came from.
        self._clients: dict[int, storage.Client] = {}
        self._is_there = False

    @property
    def client(self) -> storage.Client:
        client = self._clients.get(os.getpid())
        # Two threads may both make one; only one of them stays.
        return client or self._clients.setdefault(os.getpid(), _connect(self.name))

    def blob(self, name: str, *, generation: int | None = None, chunk_size: int | None = None) -> storage.Blob:
        return self.client.bucket(self.name).blob(name, generation=generation, chunk_size=chunk_size)

    def check(self) -> None:
        """Raise unless the bucket is there: an object is not found in an absent bucket too."""
        if not self._is_there:
            # Listing is what the role allows; asking for the bucket itself would need another.
            with asking(self.name):
                try:
                    found = self.client.list_blobs(self.name, max_results=1, fields="items(name)", **self.call)
                    next(iter(found), None)
                except exceptions.NotFound as error:
                    raise no_bucket(self.name) from error
            self._is_there = True


def no_bucket(bucket: str) -> StoreRefused:
    return StoreRefused(f"There is no bucket `{bucket}`. Make it, or name another one in `blobs_url`.")


@contextlib.contextmanager
def asking(bucket: str, understood: frozenset[int] = UNDERSTOOD) -> Iterator[None]:
    """Answers of Cloud Storage as our errors, but for the statuses that the caller understands."""
    try:
        yield
    except (exceptions.Unauthorized, exceptions.Forbidden, auth.RefreshError, auth.InvalidOperation) as error:
        logger.warning("Cloud Storage refused: %s", error)
        raise StoreRefused(
            f"Cloud Storage refuses the bucket `{bucket}` to this process's account. Grant the account `{ROLE}` on it."
        ) from error
    except _BUSY as error:
        logger.warning("Cloud Storage does not answer: %s", error)
        raise Overloaded(
            f"Cloud Storage does not answer for the bucket `{bucket}`. Try again.", retry_after_s=RETRY_AFTER_S
        ) from error
    except exceptions.GoogleAPICallError as error:
        if error.code in understood:
            raise
        raise StoreRefused(f"Cloud Storage answered {error.code} for the bucket `{bucket}`: {error.message}") from error


def _connect(bucket: str) -> storage.Client:
    # For traces, google-cloud-storage 3.17 asks in a thread for the bucket itself, which the role does not allow.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    credentials = _credentials(bucket)
    session = AuthorizedSession(credentials)
    # Calls to an emulator of this machine do not go through the proxy of its shell.
    session.trust_env = not os.environ.get(EMULATOR)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_connections=4, pool_maxsize=CONNECTIONS))
    # The project only matters to who makes buckets.
    return storage.Client(project="none", credentials=credentials, _http=session)


def _credentials(bucket: str) -> Credentials:
    if os.environ.get(EMULATOR):
        return AnonymousCredentials()
    try:
        found, _ = default(scopes=[SCOPE])
    except auth.DefaultCredentialsError as error:
        raise StoreRefused(
            f"There are no Google credentials to open the bucket `{bucket}` with. Give this machine a service account, "
            f"name a key file in `{environment_vars.CREDENTIALS}`, or run `gcloud auth application-default login`."
        ) from error
    return found
