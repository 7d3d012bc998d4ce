import pytest

from tests.store.contract import BlobsContract


class TestGcsBlobs(BlobsContract):
    @pytest.fixture
    def blobs_url(self, gcs_url: str) -> str:
        return gcs_url
