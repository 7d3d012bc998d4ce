import os
from pathlib import Path

import pytest

# One thread each: tests share two cores with each other, and OpenMP threads spin on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

from tests.tiny import make_adapter, make_base


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
