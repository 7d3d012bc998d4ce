"""Documents in one SQLite file, shared by any number of threads and processes of one machine.

A committed write survives a power cut: WAL with a sync at each commit. Knows no record types.
"""

import json
import os
import secrets
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuneloom.errors import InvalidRequest, Overloaded, TuneloomError
from tuneloom.store.base import (
    Create,
    Delete,
    Document,
    Increment,
    Range,
    Replace,
    Scalar,
    StoreConflict,
    Write,
)
from tuneloom.store.forks import ForkGate
from tuneloom.store.limits import check_collection, check_size, check_writes, encode, is_document_id
from tuneloom.store.sqlite_query import INDEXES, holds, select

SCHEMA_VERSION = 2
BUSY_TIMEOUT_S = 15.0
SYNCHRONOUS = "FULL"

_TABLE = """
CREATE TABLE IF NOT EXISTS documents (
    collection TEXT NOT NULL, id TEXT NOT NULL, rev TEXT NOT NULL, data TEXT NOT NULL, PRIMARY KEY (collection, id)
) STRICT
"""


class SqliteDocuments:
    """`Documents` over `path`, which is made if it is missing.

    Each thread has a connection of its own. A commit that other writers keep out for `timeout_s` raises Overloaded.
    """

    def __init__(self, path: Path | str, *, timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self._path = Path(path).absolute()
        self._timeout_s = timeout_s
        self._is_closed = False
        self._connections: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._local = threading.local()
        self._write_turn = threading.Lock()
        self._create_file()
        with self._use() as connection:
            self._create_schema(connection)
        _STORES.add(self)

    def find(self, collection: str, id: str) -> Document | None:
        check_collection(collection)
        if not is_document_id(id):
            return None
        with self._use() as connection:
            statement = "SELECT rev, data FROM documents WHERE collection = ? AND id = ?"
            row = connection.execute(statement, (collection, id)).fetchone()
        return Document(collection, id, row[0], json.loads(row[1])) if row else None

    def query(
        self,
        collection: str,
        where: Mapping[str, Scalar] | None = None,
        *,
        order_by: str = "id",
        descending: bool = False,
        bounds: Range | None = None,
        limit: int | None = None,
        after: tuple[Scalar, str] | None = None,
    ) -> list[Document]:
        statement, values = select(collection, where or {}, order_by, descending, bounds or Range(), limit, after)
        with self._use() as connection:
            rows = connection.execute(statement, values).fetchall()
        return [Document(collection, id, rev, json.loads(data)) for id, rev, data in rows]

    def commit(self, writes: Sequence[Write]) -> dict[tuple[str, str], str]:
        check_writes(writes)
        # Random, so that a revision never comes back: not after a delete, nor after an old copy of the file.
        rev = secrets.token_hex(8)
        steps = [(write, encode(write.data) if isinstance(write, Create | Replace) else "") for write in writes]
        check_size([text for _, text in steps])
        if steps:
            with self._use() as connection, self._transaction(connection):
                for write, text in steps:
                    _apply(connection, write, text, rev)
        return {(write.collection, write.id): rev for write in writes if not isinstance(write, Delete)}

    def close(self) -> None:
        with _GATE.alone():
            self._is_closed = True
            self._drop_connections()

    def _begin_child(self, *, is_quiet: bool) -> None:
        if not is_quiet:
            # A call was half done in one of them: closing it would wait for a thread that is not in this process.
            _ABANDONED.extend(self._connections)
            self._connections.clear()
        self._drop_connections()
        self._write_turn = threading.Lock()

    def _drop_connections(self) -> None:
        for connection in list(self._connections):
            connection.close()
        self._connections.clear()
        self._local = threading.local()

    @contextmanager
    def _use(self) -> Iterator["_Connection"]:
        """This thread's connection; SQLite's errors become ours."""
        with _GATE.working():
            try:
                yield self._connection()
            except sqlite3.Error as error:
                raise self._translated(error) from error

    def _connection(self) -> "_Connection":
        if self._is_closed:
            raise TuneloomError("The document store is closed.")
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                self._path,
                timeout=self._timeout_s,
                isolation_level=None,
                check_same_thread=False,
                factory=_Connection,
            )
            self._connections.add(connection)
            # journal_mode does not wait for a busy file as other statements do.
            _retry_while_locked(lambda: connection.execute("PRAGMA journal_mode = WAL"), self._timeout_s)
            connection.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
            connection.create_function("holds", 3, holds, deterministic=True)
            self._local.connection = connection
        return connection

    @contextmanager
    def _transaction(self, connection: "_Connection") -> Iterator[None]:
        # Threads of one process take turns here, where waiting is fair; SQLite's own wait is by polling.
        if not self._write_turn.acquire(timeout=self._timeout_s):
            raise self._busy()
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        finally:
            self._write_turn.release()

    def _create_file(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            # Hashes of keys are in it: only its user may read it.
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))

    def _create_schema(self, connection: "_Connection") -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == SCHEMA_VERSION:
            return
        if version > SCHEMA_VERSION:
            raise InvalidRequest(f"`{self._path}` was made by a newer tuneloom. Use that one, or another file.")
        with self._transaction(connection):
            connection.execute(_TABLE)
            for collection, fields in INDEXES.items():
                for field in fields:
                    connection.execute(
                        f"CREATE INDEX IF NOT EXISTS {collection}_by_{field.replace('.', '_')} "
                        f"ON documents (data -> '$.{field}', id) WHERE collection = '{collection}'"
                    )
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _translated(self, error: sqlite3.Error) -> TuneloomError:
        if _is_locked(error):
            return self._busy()
        if _code(error) == sqlite3.SQLITE_NOTADB:
            return InvalidRequest(f"`{self._path}` is not a tuneloom database. Move it away or name another file.")
        return TuneloomError(f"The document store failed: {error}.")

    def _busy(self) -> Overloaded:
        return Overloaded(f"The document store was busy for {self._timeout_s:g} s. Try again.", retry_after_s=1.0)


class _Connection(sqlite3.Connection):
    """A connection that can be weakly referenced: it is collected after the thread that used it."""


# SQLite counts its file locks in memory, per process: a child that inherits an open connection would believe that it
# holds the locks of its parent. So it closes what it inherited, and no call may be half done in it.
_STORES: "weakref.WeakSet[SqliteDocuments]" = weakref.WeakSet()


_ABANDONED: list[sqlite3.Connection] = []


def _restart(is_quiet: bool) -> None:
    for store in list(_STORES):
        store._begin_child(is_quiet=is_quiet)


_GATE = ForkGate(_restart)


def _apply(connection: sqlite3.Connection, write: Write, text: str, rev: str) -> None:
    """Do one write of a commit, or raise StoreConflict."""
    key = (write.collection, write.id)
    match write:
        case Create():
            statement = "INSERT INTO documents (collection, id, rev, data) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
            count = connection.execute(statement, (*key, rev, text)).rowcount
        case Replace():
            statement = "UPDATE documents SET rev = ?, data = ? WHERE collection = ? AND id = ? AND rev = ?"
            count = connection.execute(statement, (rev, text, *key, write.rev)).rowcount
        case Delete():
            statement = "DELETE FROM documents WHERE collection = ? AND id = ? AND rev = coalesce(?, rev)"
            count = connection.execute(statement, (*key, write.rev)).rowcount
        case Increment():
            row = connection.execute("SELECT data FROM documents WHERE collection = ? AND id = ?", key).fetchone()
            count = 1 if row else 0
            if row:
                statement = "UPDATE documents SET rev = ?, data = ? WHERE collection = ? AND id = ?"
                connection.execute(statement, (rev, _incremented(row[0], write), *key))
    if count != 1:
        is_create = isinstance(write, Create)
        raise StoreConflict(f"`{write.collection}/{write.id}` {'exists' if is_create else 'changed or is gone'}.")


def _incremented(text: str, write: Increment) -> str:
    data: dict[str, Any] = json.loads(text)
    value = data.get(write.field, 0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"`{write.collection}/{write.id}` has no number in `{write.field}` to add to.")
    return encode({**data, write.field: value + write.by})


def _is_locked(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _code(error: sqlite3.Error) -> int:
    # Errors that Python's module raises by itself carry no code. The low byte is the kind, the rest its detail.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _retry_while_locked(call: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            call()
            return
        except sqlite3.OperationalError as error:
            if not _is_locked(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
