"""Who may import what: the table of the layers, held against the source, and what light processes must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tuneloom"

# A module of one layer imports those of the layers below, and its own part. `part` is the first name below tuneloom.
LAYERS = {
    "errors": 0,
    "domain": 1,
    "generation": 1,
    "config": 2,
    "rows": 2,
    "store": 2,
    "engine": 2,
    "bases": 2,
    "train": 3,
    "control": 3,
    "serve": 4,
    "ports": 5,
    "cluster": 5,
    "up": 5,
    "cli": 5,
}
# Imports that the layers alone would forbid: importing module -> imported part.
ALSO = {
    ("tuneloom.generation", "domain"),  # a request names an adapter
    ("tuneloom.store", "config"),  # `open_store` takes the settings
    ("tuneloom.bases.intake", "config"),  # the id of the default base
    ("tuneloom.cluster", "ports"),
    ("tuneloom.up", "cluster"),
    ("tuneloom.cli", "cluster"),
    ("tuneloom.cli", "up"),
}
# Parts that may not be imported although they lie below, but for the modules named.
ONLY_BY = {
    ("train", "engine"): {
        "tuneloom.train.agreement",
        "tuneloom.train.fidelity",
        "tuneloom.train.memory",
        "tuneloom.train.models",
        "tuneloom.train.render",
    },
    ("control", "engine"): set(),
    ("control", "train"): set(),
    ("train", "control"): set(),
}
# Of these parts, layers above see the named modules only.
FACES = {("serve", "control"): {"tuneloom.control.api", "tuneloom.control.deployment"}}

# Packages with a price or a meaning: who may import them. Everything else is free.
THIRD_PARTY = {
    "ray": {"train", "control", "serve"},
    "torch": {"engine", "train"},
    "transformers": {"engine", "train"},
    "tokenizers": {"engine"},
    "peft": {"train"},
    "trl": {"train"},
    "bitsandbytes": {"engine", "train"},
    "datasets": {"train"},
    "accelerate": {"train"},
    "llguidance": {"engine"},
    "vllm": {"engine"},
    "gguf": {"bases"},
    "sqlite3": {"store"},
    "starlette": {"control", "serve"},
    "fastapi": set(),
    "uvicorn": set(),
    "openai": {"control"},
    "redis": {"serve"},
    "limits": {"serve"},
    "typer": {"cli"},
    "rich": {"cli"},
    "psutil": {"ports", "cluster", "cli"},
}
# The client of one's users is for a provider that speaks their protocol, and loaded where drafts are written.
OPENAI = "tuneloom.control.drafting.openai"
# Google's packages are only imported where one of its services is spoken to.
GOOGLE = ("tuneloom.store.firestore", "tuneloom.store.gcs", "tuneloom.control.drafting", "tuneloom.serve.firebase")


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


MODULES = modules()


def imports(tree: ast.AST, module: str) -> list[tuple[str, int]]:
    """Every imported name, also those inside functions, as (dotted name, line)."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: write imports in full"
            # `from tuneloom.control import api` imports tuneloom.control.api.
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.append((name if name in MODULES else node.module or "", node.lineno))
    return found


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def cases() -> list[str]:
    return [module for module in MODULES if part_of(module)]


def test_every_part_has_a_layer():
    assert {part_of(module) for module in cases()} <= LAYERS.keys()


@pytest.mark.parametrize("module", cases())
def test_imports_go_down_the_layers(module: str):
    part = part_of(module)
    for name, line in imports(MODULES[module], module):
        target = part_of(name) if name.split(".")[0] == "tuneloom" else ""
        if not target or target == part:
            continue
        where = f"{module}:{line} imports {name}"
        is_named = any(module.startswith(importer) and target == imported for importer, imported in ALSO)
        assert LAYERS[target] < LAYERS[part] or is_named, where
        assert module in ONLY_BY.get((part, target), {module}), where
        assert name in FACES.get((part, target), {name}), where


@pytest.mark.parametrize("module", cases())
def test_third_party_packages_stay_where_they_belong(module: str):
    for name, line in imports(MODULES[module], module):
        where = f"{module}:{line} imports {name}"
        package = name.split(".")[0]
        assert part_of(module) in THIRD_PARTY.get(package, {part_of(module)}), where
        if name.startswith("google."):
            assert module.startswith(GOOGLE), where
        if package == "openai":
            assert module == OPENAI, where


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("tuneloom.cli", {"torch", "transformers", "ray", "httpx", "starlette", "numpy"}),
        ("tuneloom.control.api", {"torch", "transformers", "ray", "openai"}),
        ("tuneloom.control.deployment", {"torch", "transformers", "openai"}),
        ("tuneloom.serve.ingress", {"torch", "transformers"}),
        ("tuneloom.serve.app", {"torch", "transformers", "ray"}),
        ("tuneloom.serve.gateway", {"torch", "transformers"}),
        ("tuneloom.serve.firebase", {"torch", "transformers", "ray", "google.auth"}),
        ("tuneloom.bases", {"torch", "transformers", "numpy"}),
        ("tuneloom.store", {"torch", "transformers", "ray"}),
        ("tuneloom.engine.text", {"torch", "ray"}),
        ("tuneloom.rows", {"torch", "transformers", "ray"}),
    ],
)
def test_light_processes_load_nothing_heavy(module: str, unwanted: set[str]):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not unwanted & set(done.stdout.split())
