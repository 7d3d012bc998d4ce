import json
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from google.api_core.datetime_helpers import DatetimeWithNanoseconds
from google.cloud import firestore
from hypothesis import given
from hypothesis import strategies as st

from tests.parts import servers
from tests.store import test_sqlite
from tests.store.contract import DocumentsContract
from tuneloom.store import firestore_api, limits, open_documents
from tuneloom.store.base import MAX_WRITES, Create, Increment, Replace
from tuneloom.store.firestore import FirestoreDocuments
from tuneloom.store.firestore_api import FirestoreApi
from tuneloom.store.firestore_values import MAX_FIRESTORE_BYTES, _size, escape, from_fields, to_fields, unescape

ROOT = Path(__file__).parent.parent.parent


class TestFirestoreDocuments(DocumentsContract):
    NUM_EXAMPLES = 25
    # The emulator does so now and then on a busy machine; the service, by its documentation, never.
    HALF_S = 30.0

    @pytest.fixture
    def documents_url(self, firestore_url: str) -> str:
        return firestore_url


def test_both_stores_pass_the_same_tests() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", __file__]
    command += [str(Path(__file__).with_name("test_sqlite.py")), "-k", "TestFirestoreDocuments or TestSqliteDocuments"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    found = re.findall(r"::(Test\w+Documents)::(.+)", done.stdout)
    firestore, sqlite = (
        {test for name, test in found if name == store} for store in ("TestFirestoreDocuments", "TestSqliteDocuments")
    )
    assert firestore == sqlite
    assert len(firestore) > 170
    # None is replaced or left out by either.
    for store in (TestFirestoreDocuments, test_sqlite.TestSqliteDocuments):
        assert [name for name in vars(store) if name.startswith("test")] == []


def test_the_page_tells_the_limits_that_hold() -> None:
    page = (ROOT / "docs" / "cloud.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"takes up to {firestore_api.TRY_S:g} s, all tries about {firestore_api.TOTAL_S:g} s" in page
    assert f"up to {limits.MAX_DOCUMENT_BYTES:,} bytes and {limits.MAX_FIELDS} fields" in page
    assert f"up to {MAX_WRITES} records and {limits.MAX_COMMIT_BYTES:,} bytes" in page
    assert f"--role={firestore_api.ROLE}" in page


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of Firestore that are called."""
    methods: list[str] = []
    call = FirestoreApi.call

    def counting(self: FirestoreApi, method: str, body: dict[str, Any]) -> Any:
        methods.append(method)
        return call(self, method, body)

    monkeypatch.setattr(FirestoreApi, "call", counting)
    return methods


def test_an_increment_reads_once_and_then_only_writes(firestore_url: str, asked: list[str]) -> None:
    documents = open_documents(firestore_url)
    rev = documents.commit([Create("things", "a", {"v": 1, "w": 1}), Create("things", "b", {})])["things", "a"]
    asked.clear()  # the emulator's first call may take longer than one try
    for _ in range(3):
        documents.commit([Increment("things", "a", "v", 1), Increment("things", "b", "v", 1)])
    assert asked == ["batchGet", "commit", "commit", "commit"]
    asked.clear()
    documents.commit([Increment("things", "a", "w", 1)])
    found = documents.find("things", "a")
    assert found is not None and found.rev != rev
    documents.commit([Replace("things", "a", {"v": 5}, found.rev)])
    documents.commit([Increment("things", "a", "v", 1)])
    assert asked == ["batchGet", "commit", "batchGet", "commit", "batchGet", "commit"]
    documents.close()


def test_googles_own_client_reads_what_is_written(firestore_url: str, firestore_server: servers.Server) -> None:
    documents = open_documents(firestore_url)
    data = {"owner": "me", "n": 1, "f": 1.0, "on": True, "none": None, "spec": {"metadata": {"a.b": "x"}, "l": [[1]]}}
    rev = documents.commit([Create("jobs", "job-1", data)])["jobs", "job-1"]
    documents.commit([Increment("jobs", "job-1", "n", 2)])
    client = firestore.Client(project=firestore_url.removeprefix("firestore:").partition("/")[0])
    found = client.document("jobs/job-1").get()
    stored = found.to_dict()
    scalars = {key: value for key, value in data.items() if key != "spec"} | {"n": 3}
    assert stored["data"] == {**scalars, "spec": {"metadata": {"a.b": "x"}}}
    assert (type(stored["data"]["n"]), type(stored["data"]["f"])) == (int, float)
    assert json.loads(stored["text"]) == {"spec": data["spec"]}
    assert stored["id"] == "job-1" and len(stored["commit"]) == 16
    whole = documents.find("jobs", "job-1")
    assert whole is not None and whole.data == {**data, "n": 3}
    # Google's client leaves zeros out at the end.
    assert found.update_time == DatetimeWithNanoseconds.from_rfc3339(whole.rev)
    assert whole.rev != rev
    client.close()
    documents.close()


def test_databases_of_a_project_are_apart(firestore_server: servers.Server) -> None:
    project = f"demo-{uuid.uuid4().hex[:12]}"
    default, same, other = (open_documents(f"firestore:{project}{end}") for end in ("", "/(default)", "/other"))
    default.commit([Create("things", "a", {})])
    other.commit([Create("things", "b", {})])
    assert [[found.id for found in each.query("things")] for each in (default, same, other)] == [["a"], ["a"], ["b"]]


def test_the_store_loads_no_client_unless_it_is_asked() -> None:
    code = "import sys, tuneloom.store; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded = set(done.stdout.split())
    assert not {name for name in loaded if name.startswith(("google.", "grpc", "httpx", "tuneloom.store.firestore"))}
    assert FirestoreDocuments.__module__ not in loaded


@given(st.text(alphabet=st.sampled_from("_-%x0a\n\\")))
def test_names_come_back_from_their_escape(name: str) -> None:
    stored = escape(name)
    assert stored and not re.fullmatch("__.*__", stored, re.DOTALL) and "\n" not in stored
    if not re.search("[\x00-\x1f%]", name):
        assert unescape(stored) == name


@given(st.lists(st.text(alphabet=st.sampled_from("_-%x0a\n\\")), unique=True))
def test_no_two_names_have_one_escape(names: list[str]) -> None:
    assert len({escape(name) for name in names}) == len(names)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(st.dictionaries(st.from_regex("[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True), JSON, max_size=8))
def test_any_record_comes_back_from_its_fields(data: dict[str, Any]) -> None:
    fields = json.loads(json.dumps(to_fields("x", data, "c")))
    assert json.dumps(from_fields(fields), sort_keys=True) == json.dumps(data, sort_keys=True)


def test_what_is_added_for_queries_fits_beside_a_record_of_a_megabyte() -> None:
    data = {"v": {f"{i:06}": {"k": i} for i in range(46_000)}}
    fields = to_fields("x" * 1500, data, "c")

    def size(value: dict[str, Any]) -> int:
        ((kind, content),) = value.items()
        if kind == "mapValue":
            return 32 + sum(len(name) + 1 + size(inner) for name, inner in content["fields"].items())
        return _size("", content) if kind == "stringValue" else 8

    text = len(fields["text"]["stringValue"].encode())
    assert 900_000 < text < 1_000_000
    nested = fields["data"]["mapValue"]["fields"]["v"]["mapValue"]["fields"]
    assert 100 < len(nested) < 46_000
    assert text + sum(size(value) for name, value in fields.items() if name != "text") < MAX_FIRESTORE_BYTES
