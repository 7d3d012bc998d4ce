"""The store that the tests ask: empty, through the seam alone."""

from collections.abc import Iterator
from typing import Any

import pytest

from tuneloom.store import open_documents
from tuneloom.store.base import Create, Documents, Write


def ids(found: list[Any]) -> list[str]:
    return [document.id for document in found]


class Opened:
    @pytest.fixture
    def documents(self, documents_url: str) -> Iterator[Documents]:
        documents = open_documents(documents_url)
        yield documents
        documents.close()

    @pytest.fixture
    def mixed(self, documents: Documents) -> Documents:
        """One document for each kind of value in `v`, and one without it."""
        values = {"null": None, "no": False, "yes": True, "neg": -1, "zero": 0, "half": 0.5, "one": 1, "text": "1"}
        writes: list[Write] = [Create("things", id, {"v": value}) for id, value in values.items()]
        documents.commit([*writes, Create("things", "none", {"w": 1})])
        return documents
