from pathlib import Path

import pytest

from tuneloom.train import meter
from tuneloom.train.deaths import Deaths


def test_the_first_process_has_nothing_to_fear(tmp_path: Path) -> None:
    assert Deaths(tmp_path / "job", 1).too_large is None


def test_a_process_that_ends_in_order_leaves_nothing(tmp_path: Path) -> None:
    for _ in range(4):
        deaths = Deaths(tmp_path, 1)
        assert deaths.too_large is None
        deaths.end()
    assert list(tmp_path.iterdir()) == []


def test_two_deaths_in_a_row_speak_against_the_size(tmp_path: Path) -> None:
    Deaths(tmp_path, 1)
    assert Deaths(tmp_path, 1).too_large is None
    assert "died 2 times in a row" in (Deaths(tmp_path, 1).too_large or "")


def test_a_saved_state_between_two_deaths_and_a_new_attempt_count_anew(tmp_path: Path) -> None:
    Deaths(tmp_path, 1)
    Deaths(tmp_path, 1).saved()
    assert Deaths(tmp_path, 1).too_large is None
    assert Deaths(tmp_path, 2).too_large is None
    assert Deaths(tmp_path, 2).too_large is None


def test_one_death_while_memory_was_short_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "SHORT_SHARE", 1.1)
    Deaths(tmp_path, 1).look()
    assert "memory was short" in (Deaths(tmp_path, 2).too_large or "")


def test_a_kill_by_the_kernel_is_seen_in_its_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Deaths(tmp_path, 1)
    monkeypatch.setattr(meter, "oom_kills", lambda: 1)
    assert "memory was short" in (Deaths(tmp_path, 1).too_large or "")


def test_a_cut_is_remembered(tmp_path: Path) -> None:
    Deaths(tmp_path, 1).cut(2)
    again = Deaths(tmp_path, 2)
    assert (again.micro_size, again.too_large) == (2, None)


def test_a_broken_note_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "process.json").write_text("{")
    assert Deaths(tmp_path, 1).too_large is None
