import gc
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.store import durability
from tests.store.contract import DocumentsContract
from tests.store.contract.processes import in_processes
from tests.store.contract.writers import FORKS
from tuneloom.errors import InvalidRequest, Overloaded, TuneloomError
from tuneloom.store import sqlite
from tuneloom.store.base import Create, Increment, Range
from tuneloom.store.sqlite import SqliteDocuments
from tuneloom.store.sqlite_query import select


class TestSqliteDocuments(DocumentsContract):
    @pytest.fixture
    def documents_url(self, tmp_path: Path) -> str:
        return f"sqlite:{tmp_path / 'home' / 'documents.db'}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "documents.db"


def test_documents_are_there_after_reopening(path: Path) -> None:
    first = SqliteDocuments(path)
    rev = first.commit([Create("things", "a", {"v": 1})])["things", "a"]
    first.close()
    found = SqliteDocuments(path).find("things", "a")
    assert found is not None and (found.data, found.rev) == ({"v": 1}, rev)


def test_each_commit_is_on_disk_when_it_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "SYNCHRONOUS", durability.AS_SHIPPED)
    documents = SqliteDocuments(path)
    with documents._use() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,), "2 is FULL: a sync at each commit"


def test_the_files_are_readable_by_their_user_only(path: Path) -> None:
    documents = SqliteDocuments(path)
    documents.commit([Create("things", "a", {})])
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.glob("documents.db*")}
    assert set(modes.values()) == {0o600}, modes


def test_a_commit_that_waits_too_long_is_told_to_come_back(path: Path) -> None:
    documents = SqliteDocuments(path, timeout_s=0.2)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Overloaded) as error:
        documents.commit([Create("things", "a", {})])
    assert error.value.retry_after_s
    assert documents.find("things", "a") is None, "readers do not wait"
    other.execute("ROLLBACK")
    documents.commit([Create("things", "a", {})])


def test_a_full_disk_is_reported_and_leaves_whole_commits(path: Path) -> None:
    documents = SqliteDocuments(path)
    documents.commit([Create("things", "a", {"v": 0})])
    with documents._use() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(TuneloomError, match="full"):
        documents.commit([Increment("things", "a", "v", 1), Create("things", "b", {"v": "x" * 50_000})])
    assert [document.data for document in documents.query("things")] == [{"v": 0}]
    documents.commit([Increment("things", "a", "v", 1)])


def test_a_file_of_a_newer_version_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(InvalidRequest, match="newer"):
        SqliteDocuments(path)


def test_a_file_that_is_no_database_is_left_alone(path: Path) -> None:
    path.write_bytes(b"precious notes, " * 100)
    with pytest.raises(InvalidRequest, match="not a tuneloom database"):
        SqliteDocuments(path)
    assert path.read_bytes() == b"precious notes, " * 100


def test_many_processes_may_make_the_file_at_once(path: Path) -> None:
    in_processes(3, open_and_write, path)
    assert len(SqliteDocuments(path).query("things")) == 3


def open_and_write(path: Path) -> None:
    SqliteDocuments(path).commit([Create("things", str(os.getpid()), {})])


def test_a_finished_thread_leaves_no_connection_behind(path: Path) -> None:
    documents = SqliteDocuments(path)
    for _ in range(5):
        thread = threading.Thread(target=documents.find, args=("things", "a"))
        thread.start()
        thread.join(timeout=10)
    gc.collect()
    assert len(documents._connections) == 1


def test_a_file_is_whole_after_forks_while_threads_wrote(path: Path) -> None:
    command = [sys.executable, "-c", FORKS, f"sqlite:{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    with SqliteDocuments(path)._use() as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize(
    ("collection", "where", "index"),
    [
        ("keys", {"hash": "x"}, "keys_by_hash"),
        ("versions", {"owner": "x", "ft_name": "x"}, "versions_by_ft_name"),
        ("versions", {"owner": "x", "model": "x"}, "versions_by_model"),
        ("checkpoints", {"owner": "x", "name": "x"}, "checkpoints_by_name"),
        ("checkpoints", {"owner": "x", "job_id": "x"}, "checkpoints_by_job_id"),
        ("events", {"job_id": "x", "type": "metrics"}, "events_by_job_id"),
        ("upload_parts", {"upload_id": "x"}, "upload_parts_by_upload_id"),
        ("jobs", {"owner": "x"}, "jobs_by_owner"),
        ("jobs", {"owner": "x", "state": "queued"}, "jobs_by_state"),
        ("jobs", {"attempt_open": True}, "jobs_by_attempt_open"),
        ("files", {"owner": "x", "purpose": "fine-tune"}, "files_by_owner"),
        ("models", {"owner": "x"}, "models_by_owner"),
        ("things", {}, "sqlite_autoindex_documents_1"),
    ],
)
def test_what_is_asked_often_is_found_by_an_index(
    path: Path, collection: str, where: dict[str, str], index: str
) -> None:
    documents = SqliteDocuments(path)
    statement, values = select(
        collection, where, order_by="id", descending=True, bounds=Range(), limit=20, after=("x", "x")
    )
    with documents._use() as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()
    assert len(plan) == 1, "no sorting: the index has the order"
    assert f"USING INDEX {index} (" in plan[0][3]


def test_an_older_file_gets_the_indexes_of_today(path: Path) -> None:
    SqliteDocuments(path).close()
    with sqlite3.connect(path) as older:
        older.execute("DROP INDEX usage_rows_by_owner")
        older.execute("PRAGMA user_version = 1")
    SqliteDocuments(path).close()
    with sqlite3.connect(path) as today:
        assert today.execute("SELECT 1 FROM sqlite_master WHERE name = 'usage_rows_by_owner'").fetchone()
