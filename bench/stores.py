"""An installation's store in one process, as a replica and the gateway see it: adapters in blobs, names in records."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.inputs import Setup, adapter_maker
from tuneloom.bases import Base
from tuneloom.config import DEFAULT_BASE
from tuneloom.domain import AdapterRef
from tuneloom.store import open_blobs
from tuneloom.store.artifacts import put_adapter
from tuneloom.store.base import Blobs


@dataclass(frozen=True)
class Registered:
    blobs: Blobs
    refs: list[AdapterRef]


def register(setup: Setup, count: int) -> Registered:
    """`count` adapters in a blob store under the data folder, made once and kept: 20 MB each for the default base."""
    root = setup.data / f"registered-{setup.base.name}"
    root.mkdir(parents=True, exist_ok=True)
    blobs = open_blobs(f"file:{root / 'blobs'}")
    index = root / "refs.jsonl"
    lines = index.read_text().splitlines() if index.exists() else []
    if len(lines) < count:
        with adapter_maker(setup.base) as make, index.open("a") as file:
            for i in range(len(lines), count):
                with tempfile.TemporaryDirectory(dir=root) as folder:
                    make(Path(folder), 10_000 + i)
                    ref = put_adapter(blobs, f"bench/{i:05d}", Path(folder))
                file.write(ref.model_dump_json() + "\n")
                file.flush()
        lines = index.read_text().splitlines()
    return Registered(blobs, [AdapterRef.model_validate_json(line) for line in lines[:count]])


def as_base(folder: Path) -> Base:
    """The base in a folder as the catalogue would give it."""
    config = json.loads((folder / "config.json").read_text())
    return Base(
        id=DEFAULT_BASE,
        path=folder,
        sha256="0" * 64,
        context_length=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        size_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    )
