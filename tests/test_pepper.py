import stat
from pathlib import Path

import pytest

from tuneloom.config import Pepper, Settings, read_pepper, rotate_pepper
from tuneloom.config import pepper as module
from tuneloom.config.locks import alone
from tuneloom.config.pepper import pepper_id
from tuneloom.domain import hash_secret
from tuneloom.errors import InvalidRequest, Overloaded

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def write(path: Path, *values: bytes) -> None:
    path.write_text("".join(value.hex() + "\n" for value in values))


def test_a_pepper_is_made_once_and_only_its_user_may_read_it(settings):
    first, second = read_pepper(settings), read_pepper(settings)
    assert first.hash("sk-1") == second.hash("sk-1")
    assert stat.S_IMODE((settings.home / "pepper").stat().st_mode) == 0o600


def test_a_file_of_32_bytes_is_one_pepper(settings):
    (settings.home / "pepper").write_bytes(A)
    assert read_pepper(settings).hash("sk-1").hash == hash_secret(A, "sk-1")


def test_the_settings_name_a_file_that_every_machine_has(tmp_path):
    write(tmp_path / "mounted", A)
    settings = Settings(home=tmp_path / "home", pepper=tmp_path / "mounted")
    assert read_pepper(settings).id == pepper_id(A)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 40, b"ab" * 31 + b"\n"])
def test_a_file_that_holds_something_else_is_refused(settings, content):
    (settings.home / "pepper").write_bytes(content)
    with pytest.raises(InvalidRequest, match="64 hexadecimal digits"):
        read_pepper(settings)


def test_a_file_that_is_named_and_missing_is_told(tmp_path):
    with pytest.raises(InvalidRequest, match="`pepper`"):
        read_pepper(Settings(home=tmp_path, pepper=tmp_path / "none"))


def test_a_secret_is_hashed_with_the_first_and_recognised_with_all():
    pepper = Pepper((A, B))
    assert [hashed.hash for hashed in pepper.hashes("sk-1")] == [hash_secret(A, "sk-1"), hash_secret(B, "sk-1")]
    assert pepper.hash("sk-1") == pepper.hashes("sk-1")[0]
    assert {hashed.pepper for hashed in pepper.hashes("sk-1")} == {pepper_id(A), pepper_id(B)}


def test_a_rotation_keeps_the_last_and_what_is_needed(settings):
    write(settings.home / "pepper", A, B, C)
    ids = [hashed.pepper for hashed in rotate_pepper(settings, lambda: {pepper_id(C)}).hashes("sk-1")]
    assert ids[1:] == [pepper_id(A), pepper_id(C)]
    assert ids[0] not in {pepper_id(value) for value in (A, B, C)}
    assert stat.S_IMODE((settings.home / "pepper").stat().st_mode) == 0o600


def test_a_rotation_keeps_all_while_a_key_does_not_tell_its_pepper(settings):
    write(settings.home / "pepper", A, B, C)
    ids = [hashed.pepper for hashed in rotate_pepper(settings, lambda: {""}).hashes("sk-1")]
    assert ids[1:] == [pepper_id(value) for value in (A, B, C)]


def test_a_process_follows_its_file(settings, monkeypatch):
    monkeypatch.setattr(module, "REREAD_S", 0)
    pepper = read_pepper(settings)
    rotated = rotate_pepper(settings, set)
    assert pepper.id == rotated.id
    (settings.home / "pepper").unlink()
    assert pepper.id == rotated.id
    write(settings.home / "pepper", B)
    assert pepper.id == pepper_id(B)


def test_a_file_that_cannot_be_written_says_how_to_rotate_elsewhere(settings):
    read_pepper(settings)
    (settings.home / "pepper.lock").mkdir()
    with pytest.raises(InvalidRequest, match="every machine"):
        rotate_pepper(settings, set)


def test_a_rotation_does_not_wait_for_ever_for_another(settings, monkeypatch):
    read_pepper(settings)
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.1)
    with alone(settings.home / "pepper.lock", 0, Overloaded("taken")), pytest.raises(Overloaded, match="locked"):
        rotate_pepper(settings, set)
    assert rotate_pepper(settings, set)
