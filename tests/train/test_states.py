from collections.abc import Callable
from pathlib import Path

import pytest

from tuneloom.store import open_blobs
from tuneloom.store.base import Blobs
from tuneloom.train.checkpoints import Checkpoints
from tuneloom.train.states import StoredStates

PREFIX = "jobs/j/states"


@pytest.fixture(params=["file", pytest.param("gcs", marks=pytest.mark.cloud)])
def blobs(tmp_path: Path, request: pytest.FixtureRequest) -> Blobs:
    is_file = request.param == "file"
    return open_blobs(f"file:{tmp_path / 'blobs'}" if is_file else request.getfixturevalue("gcs_url"))


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_text(text)

    return write


def checkpoints(blobs: Blobs, folder: Path) -> Checkpoints:
    return Checkpoints(folder, 3, StoredStates(blobs, PREFIX))


def test_a_machine_without_states_fetches_the_newest(blobs: Blobs, tmp_path: Path) -> None:
    first = checkpoints(blobs, tmp_path / "first")
    for step in (1, 2, 3):
        first.save(step, writer(f"at {step}"), {"step": step})

    state = checkpoints(blobs, tmp_path / "second").latest()

    assert state is not None
    assert (state.step, state.facts) == (3, {"step": 3})
    assert (state.path / "part" / "weights").read_text() == "at 3"
    assert StoredStates(blobs, PREFIX).steps() == [3, 2]


def test_a_machine_that_was_left_and_comes_back_takes_what_is_newer(blobs: Blobs, tmp_path: Path) -> None:
    home = checkpoints(blobs, tmp_path / "first")
    home.save(1, writer("at 1"), {})
    checkpoints(blobs, tmp_path / "second").save(2, writer("at 2"), {})
    state = home.latest()
    assert state is not None and state.step == 2
    home.save(3, writer("at 3"), {})
    state = home.latest()
    assert state is not None and state.path == tmp_path / "first" / "step-00000003"


def test_half_a_state_is_none_and_is_stored_anew(blobs: Blobs, tmp_path: Path) -> None:
    checkpoints(blobs, tmp_path / "first").save(1, writer("at 1"), {})
    blobs.write(f"{PREFIX}/step-00000002/part/weights", b"cut off")
    second = checkpoints(blobs, tmp_path / "second")
    state = second.latest()
    assert state is not None and state.step == 1
    second.save(2, writer("at 2"), {})
    state = checkpoints(blobs, tmp_path / "third").latest()
    assert state is not None and (state.path / "part" / "weights").read_text() == "at 2"


def test_a_damaged_stored_state_is_passed_over(blobs: Blobs, tmp_path: Path) -> None:
    first = checkpoints(blobs, tmp_path / "first")
    first.save(1, writer("at 1"), {})
    first.save(2, writer("at 2"), {})
    blobs.delete(f"{PREFIX}/step-00000002/part/weights")
    blobs.write(f"{PREFIX}/step-00000002/part/weights", b"other")
    state = checkpoints(blobs, tmp_path / "second").latest()
    assert state is not None and state.step == 1
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["step-00000001"]


def test_nothing_is_left_after_the_end(blobs: Blobs, tmp_path: Path) -> None:
    first = checkpoints(blobs, tmp_path / "first")
    first.save(1, writer("at 1"), {})
    first.drop_stored()
    assert blobs.list(PREFIX) == []


def test_a_disk_that_fills_up_leaves_no_half_state(blobs: Blobs, tmp_path: Path) -> None:
    full = checkpoints(blobs, tmp_path / "first")
    full.save(1, writer("at 1"), {})
    with pytest.raises(OSError, match="No space left"):
        full.save(2, lambda folder: Path("/dev/full").write_text("x" * 10) and None, {})
    assert [path.name for path in (tmp_path / "first").iterdir()] == ["step-00000001"]
    assert StoredStates(blobs, PREFIX).steps() == [1]
