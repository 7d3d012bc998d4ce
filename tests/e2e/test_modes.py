"""The gateway's mode for throughput, on a cluster of its own. HAProxy's is the one of the cloud pair: test_cloud.py."""

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Home, running
from tests.e2e.modes import BOT, Modes
from tests.tiny import make_adapter

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with running(gateway={"port": 0, "mode": "throughput", "replicas": 2}) as home:
        adapter = make_adapter(tmp_path_factory.mktemp("modes") / "bot", home.path / "source", seed=3, rank=4)
        home.run("models", "import", str(adapter), "--name", BOT)
        yield home


class TestThroughput(Modes):
    """As many requests as possible through Serve's own proxy."""
