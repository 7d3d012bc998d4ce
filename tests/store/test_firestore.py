import pytest

from tests.store.contract import DocumentsContract


class TestFirestoreDocuments(DocumentsContract):
    NUM_EXAMPLES = 25

    @pytest.fixture
    def documents_url(self, firestore_url: str) -> str:
        return firestore_url
