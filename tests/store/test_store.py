from pathlib import Path

import pytest

from tuneloom.config import Settings
from tuneloom.domain import Registration
from tuneloom.errors import InvalidRequest, TuneloomError
from tuneloom.store import open_blobs, open_documents, open_store


def test_a_store_lives_under_home_by_default(tmp_path: Path) -> None:
    store = open_store(Settings(home=tmp_path / "home"))
    store.records.commit(store.records.registrations.create(Registration(id="job", owner="ada", version_id="v")))
    store.blobs.write("a", b"x")
    store.close()
    with pytest.raises(TuneloomError, match="closed"):
        store.records.registrations.find("job")
    again = open_store(Settings(home=tmp_path / "home"))
    assert again.records.registrations.get("job").value.owner == "ada"
    assert again.blobs.read("a") == b"x"


def test_urls_choose_the_place(tmp_path: Path) -> None:
    settings = Settings(
        home=tmp_path, documents_url=f"sqlite:{tmp_path / 'x/d.db'}", blobs_url=f"file:{tmp_path / 'y'}"
    )
    open_store(settings).close()
    assert (tmp_path / "x/d.db").exists() and (tmp_path / "y/data").exists()


@pytest.mark.parametrize("url", ["", "sqlite", "sqlite:", "mysql:x", "file:x", "/plain/path"])
def test_an_unknown_documents_url_names_the_accepted_forms(url: str) -> None:
    with pytest.raises(InvalidRequest, match="sqlite:PATH"):
        open_documents(url)


@pytest.mark.parametrize("url", ["", "file", "file:", "s3://x", "sqlite:x"])
def test_an_unknown_blobs_url_names_the_accepted_forms(url: str) -> None:
    with pytest.raises(InvalidRequest, match="file:FOLDER"):
        open_blobs(url)
