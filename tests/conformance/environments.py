"""The clients under test: the newest `openai` of each major version, each alone in an environment of its own."""

import subprocess
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile, which

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
INSTALL_TIMEOUT_S = 600
# What the newest client for Node asks for; where the system has an older one, npm brings it along.
NODE_MAJOR = 22


class CannotInstall(Exception):
    """An environment could not be made; the message says why."""


@dataclass(frozen=True)
class Client:
    """A client package and how to drive it. `language` is that of cases.json."""

    name: str
    language: str
    install: Callable[[Path], list[str]]

    def command(self, cache: Path) -> list[str]:
        """Install the newest version below `cache` and return the command that runs its driver (in `ROOT`)."""
        folder = cache / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return self.install(folder)


def _python(major: int) -> Callable[[Path], list[str]]:
    def install(folder: Path) -> list[str]:
        python = folder / "bin" / "python"
        if not python.exists():
            venv.create(folder, with_pip=True, symlinks=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--upgrade"]
        _install([*pip, f"openai>={major},<{major + 1}"], folder)
        return [str(python), "-m", "tests.conformance.driver"]

    return install


def _node(folder: Path) -> list[str]:
    node, npm = which("node"), which("npm")
    if node is None or npm is None:
        raise CannotInstall(f"there is no `node` or no `npm` on the PATH; install Node {NODE_MAJOR} or newer")
    (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
    packages = ["openai@latest"]
    if _major(node) < NODE_MAJOR:
        packages.append(f"node@{NODE_MAJOR}")
        node = str(folder / "node_modules" / ".bin" / "node")
    _install([npm, "install", "--silent", "--no-audit", "--no-fund", *packages], folder)
    # A module finds the packages of the folder that it lies in.
    for source in (HERE / "cases.json", *sorted((HERE / "node").glob("*.mjs"))):
        copyfile(source, folder / source.name)
    return [node, str(folder / "driver.mjs")]


def _major(node: str) -> int:
    shown = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    return int(shown.removeprefix("v").partition(".")[0])


def _install(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise CannotInstall(f"`{' '.join(command[-2:])}` was not installed within {INSTALL_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise CannotInstall(
            f"`{' '.join(command[-2:])}` cannot be installed: {(done.stderr or done.stdout)[-1500:].strip()}"
        )


CLIENTS = (
    Client("python-1", "python", _python(1)),
    Client("python-2", "python", _python(2)),
    Client("python-3", "python", _python(3)),
    Client("node", "node", _node),
)


def ignore(cache: Path) -> None:
    """Make the cache folder one that git passes over."""
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
