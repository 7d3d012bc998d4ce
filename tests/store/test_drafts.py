import subprocess
import sys
from pathlib import Path

import pytest

from tuneloom.errors import Conflict
from tuneloom.store.drafts import draft_folder


def test_a_folder_appears_under_its_name_when_it_is_whole(tmp_path: Path):
    target = tmp_path / "deep" / "out"
    with draft_folder(target) as draft:
        (draft / "file").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "file").read_text() == "x"


def test_nothing_stays_of_one_that_fails(tmp_path: Path):
    with pytest.raises(ValueError, match="no"), draft_folder(tmp_path / "out") as draft:
        (draft / "file").write_text("x")
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_replaced(tmp_path: Path):
    script = (
        "import os, sys; from pathlib import Path; from tuneloom.store.drafts import draft_folder\n"
        "with draft_folder(Path(sys.argv[1])) as draft:\n"
        "    (draft / 'sub').mkdir(); (draft / 'old').write_text('x'); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], timeout=60, check=False)
    assert [path.name for path in tmp_path.iterdir()] == [".out.draft"]
    with draft_folder(tmp_path / "out") as draft:
        assert list(draft.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_there_stays_and_two_do_not_write_at_once(tmp_path: Path):
    (tmp_path / "there").mkdir()
    with pytest.raises(Conflict, match="is there already"), draft_folder(tmp_path / "there"):
        pass
    with draft_folder(tmp_path / "out") as draft:
        (draft / "file").write_text("x")
        with pytest.raises(Conflict, match="Another process"), draft_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "file").exists()
