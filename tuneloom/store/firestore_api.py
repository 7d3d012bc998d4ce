"""Firestore's API over HTTPS: one call, with an end, for all threads and forks of a process. Knows no records.

Spoken over plain HTTP and not by Google's gRPC client: it tells a request that was never sent from one whose answer
was lost, nothing repeats a commit behind our back, and a process may fork while its threads call (gRPC's threads and
locks do not outlive a fork). The calls are those of https://firebase.google.com/docs/firestore/reference/rest.
"""

import json
import logging
import os
import random
import threading
import time
from typing import Any
from urllib.parse import quote

import google.auth
import httpx
from google.auth import exceptions as auth
from google.auth.transport.requests import Request

from tuneloom.errors import Overloaded, TuneloomError
from tuneloom.store.base import StoreRefused

logger = logging.getLogger(__name__)

EMULATOR = "FIRESTORE_EMULATOR_HOST"
HOST = "https://firestore.googleapis.com"
ROLE = "roles/datastore.user"
SCOPE = "https://www.googleapis.com/auth/datastore"
CONNECTIONS = 64
# One try; a store that takes 2 s for an answer still works.
CONNECT_S = 3.0
TRY_S = 5.0
# What is large may take longer.
BYTES_PER_S = 100_000
# All tries of a call together; the last one may take its own time more.
TOTAL_S = 12.0
FIRST_PAUSE_S = 0.02
LAST_PAUSE_S = 1.5
RETRY_AFTER_S = 2.0

# The request never left, or the answer never came: statuses of ours beside Google's (google/rpc/code.proto).
UNREACHED = "UNREACHED"
LOST = "LOST"
NOT_APPLIED = frozenset({UNREACHED, "ABORTED", "RESOURCE_EXHAUSTED"})
PASSING = NOT_APPLIED | {LOST, "UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN", "CANCELLED"}

_BY_CODE = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 408: "DEADLINE_EXCEEDED", 429: "RESOURCE_EXHAUSTED"}


class ApiError(Exception):
    """An answer that is an error, or none. `status` is Google's name of it, or `UNREACHED` or `LOST`."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class Tries:
    """The time and the pauses of one call of the seam."""

    def __init__(self, total_s: float = TOTAL_S) -> None:
        self._ends_at = time.monotonic() + total_s
        self._pause_s = FIRST_PAUSE_S

    def pause(self) -> bool:
        """Wait before the next try, without keeping step with other writers; False if there is no time for one."""
        pause_s = random.uniform(0, self._pause_s)
        self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
        if time.monotonic() + pause_s > self._ends_at:
            return False
        time.sleep(pause_s)
        return True


class FirestoreApi:
    """One database. Nothing is asked before the first call."""

    def __init__(self, project: str, database: str) -> None:
        self.project = project
        self.database = database
        self.root = f"projects/{project}/databases/{database}/documents"
        self._lock = threading.Lock()
        self._is_closed = False
        # By process: a fork must not write to the sockets of the one that it came from, nor wait for its locks.
        self._connections: dict[int, _Connection] = {}

    def read(self, method: str, body: dict[str, Any]) -> Any:
        """`call`, again while what hinders it may pass; errors are the seam's."""
        tries = Tries()
        while True:
            try:
                return self.call(method, body)
            except ApiError as error:
                if error.status not in PASSING or not tries.pause():
                    raise self.translated(error) from error

    def call(self, method: str, body: dict[str, Any]) -> Any:
        """The answer to `documents:{method}`, asked once. Raises ApiError."""
        connection = self._connection()
        url = f"{connection.host}/v1/{quote(self.root, safe='/()')}:{method}"
        content = json.dumps(body, ensure_ascii=False).encode()
        code, answer = connection.post(url, content)
        try:
            parsed = json.loads(answer)
        except ValueError:
            parsed = {}
            if code == httpx.codes.OK:
                raise ApiError(LOST, "the answer is not JSON") from None
        # A stream of answers may end with an error, and an error may come as a stream of one.
        last = parsed[-1] if isinstance(parsed, list) and parsed else parsed
        problem = last.get("error") if isinstance(last, dict) else None
        if code != httpx.codes.OK or problem:
            problem = problem or {}
            status = problem.get("status") or _BY_CODE.get(code, "UNAVAILABLE" if code >= 500 else "UNKNOWN")
            raise ApiError(status, str(problem.get("message", f"HTTP {code}")))
        return parsed

    def translated(self, error: ApiError) -> TuneloomError:
        """The error as callers of the store meet it; what a conflict is, the commit decides."""
        where = f"the database `{self.database}` of the project `{self.project}`"
        if error.status in PASSING:
            logger.warning("Firestore does not answer: %s", error)
            return Overloaded(f"Firestore does not answer for {where}. Try again.", retry_after_s=RETRY_AFTER_S)
        match error.status:
            case "PERMISSION_DENIED" | "UNAUTHENTICATED":
                return StoreRefused(
                    f"Firestore refuses {where} to this process's account: {error.message} Grant the account `{ROLE}`, "
                    "and check that the project is the right one and its Firestore API is on."
                )
            case "NOT_FOUND":
                return StoreRefused(
                    f"Firestore does not know {where}: {error.message} Create it, or name another one in "
                    "`documents_url`."
                )
            case "FAILED_PRECONDITION" if "index" in error.message:
                return StoreRefused(
                    f"Firestore cannot answer a query of {where}: {error.message} Deploy "
                    "`cluster/firestore.indexes.json`."
                )
        return StoreRefused(f"Firestore answered {error.status} for {where}: {error.message}")

    def close(self) -> None:
        self._is_closed = True
        for process, connection in list(self._connections.items()):
            if process == os.getpid():
                connection.client.close()
        self._connections.clear()

    def _connection(self) -> "_Connection":
        if self._is_closed:
            raise TuneloomError("The document store is closed.")
        found = self._connections.get(os.getpid())
        if found is None:
            # Two threads may both make one; only one of them stays.
            found = self._connections.setdefault(os.getpid(), _Connection(self.project))
        return found


class _Connection:
    """A pool of connections and the account's token, of one process."""

    def __init__(self, project: str) -> None:
        emulator = os.environ.get(EMULATOR)
        self.host = f"http://{emulator}" if emulator else HOST
        self._credentials = None if emulator else _credentials(project)
        self._refresh = threading.Lock()
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS, keepalive_expiry=30)
        # Calls to an emulator of this machine do not go through the proxy of its shell.
        self.client = httpx.Client(limits=limits, trust_env=emulator is None)

    def post(self, url: str, content: bytes) -> tuple[int, bytes]:
        """(HTTP status, body). Raises ApiError: UNREACHED if nothing was sent, LOST if the answer did not come."""
        try_s = TRY_S + len(content) / BYTES_PER_S
        started = time.monotonic()
        timeout = httpx.Timeout(try_s, connect=CONNECT_S)
        try:
            headers = self._headers(url, try_s)
            with self.client.stream("POST", url, content=content, headers=headers, timeout=timeout) as response:
                answer = bytearray()
                for piece in response.iter_bytes():
                    answer += piece
                    took_s = time.monotonic() - started
                    if took_s > try_s + len(answer) / BYTES_PER_S:
                        raise ApiError(LOST, f"the answer is not here after {took_s:.1f} s")
                return response.status_code, bytes(answer)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise ApiError(UNREACHED, str(error) or type(error).__name__) from error
        except httpx.TransportError as error:
            raise ApiError(LOST, str(error) or type(error).__name__) from error

    def _headers(self, url: str, try_s: float) -> dict[str, str]:
        # A server that gives up when we do does not apply a commit later.
        headers = {"Content-Type": "application/json", "X-Server-Timeout": f"{try_s:.1f}"}
        if self._credentials is None:
            return headers | {"Authorization": "Bearer owner"}
        try:
            with self._refresh:
                self._credentials.before_request(Request(), "POST", url, headers)
        except auth.TransportError as error:
            raise ApiError(UNREACHED, f"no token: {error}") from error
        except auth.GoogleAuthError as error:
            raise ApiError(UNREACHED if error.retryable else "UNAUTHENTICATED", f"no token: {error}.") from error
        return headers


def _credentials(project: str) -> Any:
    try:
        found, _ = google.auth.default(scopes=[SCOPE])
    except auth.DefaultCredentialsError as error:
        raise StoreRefused(
            f"There are no credentials for Firestore in the project `{project}`. Run under a service account, set "
            "GOOGLE_APPLICATION_CREDENTIALS to a file with one, or run `gcloud auth application-default login`."
        ) from error
    return found
