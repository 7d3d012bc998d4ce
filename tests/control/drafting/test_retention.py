"""Drafts that ended long ago."""

import time
from types import SimpleNamespace

import ray

from tests.control.drafting.conftest import DRAFTS, Open
from tests.control.drafting.model import Hold, Rows, in_turn
from tests.control.drafting.test_api import new_draft
from tuneloom.config import DraftingSettings, Settings
from tuneloom.control.deployment import Control
from tuneloom.control.sweep import sweep


def test_drafts_go_after_the_days_that_are_set_and_their_files_stay(open_desk: Open) -> None:
    desk = open_desk(in_turn(Rows(), Hold()))
    ended = desk.made(rows=10)
    running = desk.create(rows=10)["id"]
    desk.until(lambda: desk.get(running)["status"] == "running")
    # Of a drafter that was killed in the middle of its last write.
    desk.store.blobs.write(f"drafts/{ended['id']}/d0-b9-a1", b"{}")
    at = desk.store.records.drafts.get(ended["id"]).value.finished_at
    assert at is not None

    sweep(desk.store, lambda: at + 7 * 86400 - 1, draft_days=7)
    assert desk.get(ended["id"])["rows"] == 10
    sweep(desk.store, lambda: at + 7 * 86400 + 1, draft_days=7)
    assert desk.api.get(f"{DRAFTS}/{ended['id']}").status_code == 404
    assert desk.store.blobs.list(f"drafts/{ended['id']}") == []
    assert len(desk.rows(ended["file_id"])) == 10
    assert desk.get(running)["status"] == "running"


def test_control_keeps_drafts_as_long_as_is_set(store, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    old, new = new_draft(store), new_draft(store)
    for draft, days in ((old, 3.1), (new, 2.9)):
        ended = {"state": "failed", "is_open": False, "finished_at": time.time() - days * 86400}
        stored = store.records.drafts.get(draft.id)
        store.records.commit(store.records.drafts.replace(stored, draft.model_copy(update=ended)))
    tree = Settings(home=tmp_path, drafting=DraftingSettings(keep_days=3))
    control = Control(tree.model_dump(mode="json"))
    try:
        deadline = time.monotonic() + 30
        while store.records.drafts.find(old.id) is not None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        control.__del__()
    assert store.records.drafts.find(new.id) is not None
