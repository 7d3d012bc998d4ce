"""A draft on the real cloud pair: records in Firestore, bytes in Cloud Storage."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.control.drafting.conftest import DRAFTS, Open
from tests.control.drafting.test_faults import check_whole
from tuneloom.config import Settings
from tuneloom.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path, firestore_url: str, gcs_url: str) -> Iterator[Store]:
    store = open_store(Settings(home=tmp_path, documents_url=firestore_url, blobs_url=gcs_url))
    yield store
    store.close()


def test_a_draft_is_made_and_another_cancelled(open_desk: Open):
    desk = open_desk()
    made = desk.made(rows=40, drafters=3, seed_rows=[{"instruction": "a", "output": "b"}])
    check_whole(desk, made, 40)
    assert desk.api.get(f"{DRAFTS}/{made['id']}/rows?after=35").json()["last_row"] == 40
    assert desk.api.get(DRAFTS).json()["data"][0]["id"] == made["id"]
    id = desk.create(rows=10)["id"]
    desk.api.post(f"{DRAFTS}/{id}/cancel")
    assert desk.run(id)["status"] == "cancelled"
