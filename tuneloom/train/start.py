"""The adapter that a run trains on, where it does not begin with a fresh one. No torch."""

from dataclasses import dataclass
from pathlib import Path

from tuneloom.domain import JobSpec
from tuneloom.errors import InvalidRequest
from tuneloom.store.artifacts import fetch_adapter
from tuneloom.store.base import BlobNotFound, Blobs
from tuneloom.store.peft_folder import CONFIG_FILE, WEIGHTS_FILE, read_config, read_header


@dataclass(frozen=True)
class Start:
    """A stored adapter on this machine, and what it fixes of the run. `rank` is the largest of its modules."""

    folder: Path
    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]


def fetch_start(blobs: Blobs, spec: JobSpec, cache: Path) -> Start | None:
    """The adapter of `warm_start`, kept below `cache`; None without that option.

    Raises:
        InvalidRequest: it is not stored any more.
    """
    if spec.warm_start is None:
        return None
    try:
        return read_start(fetch_adapter(blobs, spec.warm_start, cache))
    except BlobNotFound as error:
        raise InvalidRequest(
            f"The adapter of `warm_start`, `{spec.options.warm_start}`, is gone. Start from another one.",
            param="tuneloom.warm_start",
        ) from error


def read_start(folder: Path) -> Start:
    """Raises AdapterRejected if the files are not those of a plain LoRA adapter."""
    config, tensors = read_config(folder / CONFIG_FILE), read_header(folder / WEIGHTS_FILE)
    ranks = {name.rpartition(".lora_A.")[0]: tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    targets = tuple(sorted({name.rpartition(".")[2] for name in ranks}))
    return Start(folder, max(ranks.values()), float(config.lora_alpha), config.use_rslora, targets)
