"""Gathers the facts of a run for the lineage of its adapters: files, order, settings, packages, code, machine."""

import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

import tuneloom
from tuneloom.bases import Base
from tuneloom.bases.catalogue import read_manifest
from tuneloom.config import Settings, read_signing_key
from tuneloom.domain import AdapterRef, Fidelity, Job
from tuneloom.store import Store
from tuneloom.store.artifacts import ADAPTER_FILES
from tuneloom.store.lineage import (
    AdapterFacts,
    BaseFacts,
    CodeFacts,
    FileFacts,
    HardwareFacts,
    Lineage,
    OrderFacts,
    file_sha256,
    sign,
)
from tuneloom.train.plan import Plan

# What computes: another version of one of these may give other weights.
PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
    "tuneloom",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


class Witness:
    """Knows what makes the adapters of one run, and signs it. `batches` gives the order of rows, epoch by epoch.

    `plan` may be replaced by one that the trainer had to change.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        job: Job,
        base: Base,
        plan: Plan,
        batches: Any,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        spec = job.spec
        validation = spec.validation_file
        self.plan = plan
        self._pem = read_signing_key(settings)
        self._clock = clock
        self._facts: dict[str, Any] = {
            "job_id": job.id,
            "method": spec.method,
            "seed": spec.seed,
            "spec": spec,
            "base": base_facts(base),
            "training_file": _file_facts(store, spec.training_file),
            "validation_file": _file_facts(store, validation) if validation else None,
            "order": _order_facts(plan, batches),
            "parent_sha256": spec.warm_start.sha256 if spec.warm_start else None,
            "packages": package_versions(),
            "code": code_facts(),
            "hardware": hardware_facts(settings.train.workers),
        }

    def testify(
        self,
        folder: Path,
        adapter: AdapterRef,
        kind: Literal["version", "checkpoint"],
        *,
        steps: int,
        metrics: dict[str, float],
        fidelity: Fidelity | None = None,
    ) -> bytes:
        """The signed lineage of the adapter in `folder`, which is stored as `adapter`."""
        files = {name: file_sha256(folder / name) for name in ADAPTER_FILES}
        facts = AdapterFacts(sha256=adapter.sha256, files=files, rank=adapter.rank, size_bytes=adapter.size_bytes)
        resolved = {"resolved": self.plan.hyperparameters, "settings": self.plan.settings}
        more = {**resolved, "kind": kind, "steps": steps, "metrics": metrics, "fidelity": fidelity, "adapter": facts}
        return sign(Lineage(created_at=self._clock(), **self._facts, **more), self._pem)


def base_facts(base: Base) -> BaseFacts:
    """What its intake has found of a base's files; their bytes are not read again."""
    manifest = read_manifest(base.path)
    assert manifest is not None, "a base in the catalogue has a manifest"
    return BaseFacts(
        id=base.id,
        sha256=base.sha256,
        files=manifest.files,
        tokenizer_sha256=_hash_of(manifest.files, TOKENIZER_FILES),
        template_sha256=_hash_of(manifest.files, TEMPLATE_FILES),
    )


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def code_facts() -> CodeFacts:
    """Which sources of ours run, by the files that they are in."""
    package = Path(tuneloom.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".c")):
        digest.update(f"{path.relative_to(package).as_posix()}\0{file_sha256(path)}\n".encode())
    return CodeFacts(commit=_commit(package.parent), sources_sha256=digest.hexdigest())


def hardware_facts(workers: int) -> HardwareFacts:
    import torch

    model, flags = _cpu()
    return HardwareFacts(
        machine=platform.machine(),
        cpu=model,
        cpu_class=torch.backends.cpu.get_cpu_capability(),
        cpu_flags_sha256=hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest(),
        threads=torch.get_num_threads(),
        workers=workers,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cuda=torch.version.cuda if torch.cuda.is_available() else None,
    )


def _cpu() -> tuple[str, list[str]]:
    """The model of the processor and what it can do, as Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown", []
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or fields.get("CPU part") or "unknown", flags.split()


def _file_facts(store: Store, file_id: str) -> FileFacts:
    file = store.records.files.get(file_id).value
    return FileFacts(id=file.id, filename=file.filename, sha256=file.sha256, size_bytes=file.size_bytes)


def _order_facts(plan: Plan, batches: Any) -> OrderFacts:
    digest, rows = hashlib.sha256(), 0
    for epoch in range(plan.n_epochs):
        for batch in batches.epoch(epoch):
            digest.update(np.asarray(batch, dtype="<i8").tobytes())
            rows += len(batch) if not epoch else 0
    return OrderFacts(rows=rows, epochs=plan.n_epochs, seed=plan.seed, sha256=digest.hexdigest())


def _hash_of(files: dict[str, str], names: tuple[str, ...]) -> str:
    """One hash of some files of a base: those that it has."""
    text = "".join(f"{name}\0{files[name]}\n" for name in sorted(names) if name in files)
    return hashlib.sha256(text.encode()).hexdigest()


def _commit(checkout: Path) -> str | None:
    """The commit that is checked out in a git repository, without git."""
    git = checkout / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).exists():
            return (git / name).read_text().strip()
        packed = (line.split() for line in (git / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [name]), None)
    except OSError:
        return None
