import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from xdist.scheduler import LoadScopeScheduling

# One thread each: tests share two cores with each other, and OpenMP threads spin on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
# As workers have it: importing PEFT takes four seconds less.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from tests.parts import servers
from tests.store import durability as durability
from tests.store import firestore_indexes
from tests.tiny import make_adapter, make_base
from tuneloom.store.sqlite import SqliteDocuments

PARTS = {"firestore_server", "gcs_server", "redis_server", "auth_server"}
E2E = "tests/e2e/"
CLUSTER = re.compile(rf"{E2E}|tests/.+/test_(cluster|replicas)\.py")
# Of tests/e2e, in this order: the first ends the cluster that most share, the others have clusters of their own.
LAST = ("test_power_cuts", "test_cloud", "test_modes")
# What stands on the parts, or beside them where several owners share a service.
CLOUD = re.compile(
    r"firestore|gcs|copy|cloud|firebase|key|audit|limit|usage|webhook|outbound|draft|tenants|control/test_isolation"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m cloud` selects what needs a part, and what goes with it; `-m cluster` what has a Ray cluster.

    tests/e2e comes first: it takes longest.
    """
    for item in items:
        if PARTS & set(getattr(item, "fixturenames", ())) or CLOUD.search(f"{item.path.parent.name}/{item.path.stem}"):
            item.add_marker("cloud")
        if CLUSTER.match(item.nodeid):
            item.add_marker("cluster")
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    if not item.nodeid.startswith(E2E):
        return len(LAST) + 1
    return LAST.index(item.path.stem) + 1 if item.path.stem in LAST else 0


class _Lanes(LoadScopeScheduling):
    """For several workers: a file stays with one of them, for the sake of its fixtures, and so does tests/e2e, whose
    files share a cluster. What else has a cluster comes in its turn.
    """

    def _split_scope(self, nodeid: str) -> str:
        return E2E if nodeid.startswith(E2E) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Lanes:
    return _Lanes(config, log)


@pytest.fixture(autouse=True)
def queries_without_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[firestore_indexes.Shape]]:
    """What the code asks of records in this process during the test is what Firestore has an index for."""
    file = json.loads(firestore_indexes.FILE.read_text(encoding="utf-8"))
    query, found = SqliteDocuments.query, []

    def recording(self: SqliteDocuments, collection: str, where: Any = None, **options: Any) -> Any:
        answer = query(self, collection, where, **options)
        if collection in firestore_indexes.TABLES.values() and firestore_indexes.is_asked_by_tuneloom():
            order = options.get("order_by", "id"), options.get("descending", False)
            asked = firestore_indexes.recorded(collection, where, *order)
            if asked not in found and firestore_indexes.missing(asked, file):
                found.append(asked)
        return answer

    monkeypatch.setattr(SqliteDocuments, "query", recording)
    yield found
    lacking = {str(asked): firestore_indexes.missing(asked, file) for asked in found}
    assert not found, f"Add to cluster/firestore.indexes.json: {lacking}. See tests/store/firestore_indexes.py."


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama; treat as read-only."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> list[Path]:
    """Four adapters of ranks 4, 8, 4, 16 for `tiny_base`; treat as read-only."""
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(root / f"a{i}", tiny_base, seed=10 + i, rank=rank) for i, rank in enumerate((4, 8, 4, 16))]


@pytest.fixture(scope="session")
def firestore_server() -> Iterator[servers.Server]:
    """Google's emulator; clients of this process and of its children find it by the environment."""
    with servers.firestore() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRESTORE_EMULATOR_HOST", server.address)
        yield server


@pytest.fixture
def firestore_url(firestore_server: servers.Server) -> str:
    """The documents URL of an empty database."""
    return f"firestore:demo-{uuid.uuid4().hex[:12]}/(default)"


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[servers.Server]:
    """A Cloud Storage server; clients of this process and of its children find it by the environment."""
    with servers.gcs() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://{server.address}")
        yield server


@pytest.fixture
def gcs_url(gcs_server: servers.Server) -> str:
    """The blobs URL of an empty bucket."""
    bucket = f"tuneloom-{uuid.uuid4().hex[:12]}"
    answer = httpx.post(f"http://{gcs_server.address}/storage/v1/b", json={"name": bucket}, timeout=10, trust_env=False)
    answer.raise_for_status()
    return f"gs://{bucket}/home"


@pytest.fixture(scope="session")
def redis_server() -> Iterator[servers.Server]:
    with servers.redis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: servers.Server) -> str:
    """An empty database. Tests run one after another, so they may share it."""
    with redis.Redis.from_url(f"redis://{redis_server.address}/0") as client:
        client.flushall()
    return f"redis://{redis_server.address}/0"


@pytest.fixture(scope="session")
def auth_server() -> Iterator[servers.Server]:
    """Firebase Auth's emulator for the project `servers.AUTH_PROJECT`."""
    with servers.firebase_auth() as server:
        yield server
