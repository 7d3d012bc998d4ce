import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store import test_sqlite
from tests.store.contract import DocumentsContract

ROOT = Path(__file__).parent.parent.parent


class TestFirestoreDocuments(DocumentsContract):
    NUM_EXAMPLES = 25

    @pytest.fixture
    def documents_url(self, firestore_url: str) -> str:
        return firestore_url


def test_both_stores_pass_the_same_tests() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", __file__]
    command += [str(Path(__file__).with_name("test_sqlite.py")), "-k", "TestFirestoreDocuments or TestSqliteDocuments"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    found = re.findall(r"::(Test\w+Documents)::(.+)", done.stdout)
    firestore, sqlite = (
        {test for name, test in found if name == store} for store in ("TestFirestoreDocuments", "TestSqliteDocuments")
    )
    assert firestore == sqlite
    assert len(firestore) > 170
    # None is replaced or left out by either.
    for store in (TestFirestoreDocuments, test_sqlite.TestSqliteDocuments):
        assert [name for name in vars(store) if name.startswith("test")] == []
