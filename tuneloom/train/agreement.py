"""After the last step: whether an engine computes with the saved adapter what the trainer did.

The only part of training that runs the engine. A difference ends the job; nothing here can be switched off.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tuneloom.bases import Base
from tuneloom.config import EngineSettings, Settings
from tuneloom.domain import AdapterRef, Fidelity
from tuneloom.engine.text import Codec
from tuneloom.errors import InvalidRequest, TuneloomError
from tuneloom.store.peft_folder import WEIGHTS_FILE, read_header
from tuneloom.train.failure import is_out_of_memory
from tuneloom.train.libraries import release_memory
from tuneloom.train.sample import Scored

if TYPE_CHECKING:
    from torch import Tensor

# How far log-probabilities may be apart, one of them and all on average, by the coarser of the two precisions. More
# than twice what was measured over tiny random bases and SmolLM2-135M-Instruct; see docs/training.md.
TOLERANCE = {"fp32": 0.01, "fp16": 2.0, "bf16": 2.0, "int8": 4.0, "nf4": 12.0}
MEAN_TOLERANCE = {"fp32": 0.001, "fp16": 0.3, "bf16": 0.3, "int8": 0.6, "nf4": 1.5}
PRECISIONS = tuple(TOLERANCE)
# Numbers of an adapter that are scaled by the trainer and by the engine, as shares of the largest: a rounding of fp32.
FACTOR_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Compared:
    """What the comparison found. `note` tells why it is not that with the base as it is served."""

    fidelity: Fidelity | None
    note: str | None = None


class ScoresDiffer(TuneloomError):
    """The engine computes other log-probabilities than the trainer."""

    code = "fidelity_logprobs"


class AdapterDiffers(TuneloomError):
    """The engine reads another adapter from the files than the trainer holds."""

    code = "fidelity_adapter"


def check_scores(
    settings: Settings,
    base: Base,
    adapter: Path,
    rows: Sequence[Scored],
    trained: Sequence[Sequence[float]],
    precision: str,
) -> Compared:
    """Compare log-probabilities of the trainer, `trained`, with those of an engine as it will serve the base.

    The engine takes the adapter's folder as it is stored, and loads the base anew: what held the trainer's must be
    gone, so that no device needs room for two. `precision` is the trainer's, and the engine's where there is no room
    for the base as it is served.

    Raises:
        ScoresDiffer: the first token whose log-probabilities differ too much.
        InvalidRequest: the engine cannot serve the base here, or the adapter on it.
    """
    lacks: list[str] = []
    for options in _engines(settings, base, precision):
        try:
            served, served_precision = _serve(options, base, adapter, rows)
        except Exception as error:
            if not (is_out_of_memory(error) or (isinstance(error, InvalidRequest) and error.code == "out_of_memory")):
                raise
            lacks.append(str(error))
            continue
        note = f"With an engine in {served_precision}, for want of room as it is served: {lacks[0]}" if lacks else None
        return Compared(
            _judge(base, rows, trained, served, max(precision, served_precision, key=PRECISIONS.index)), note
        )
    return Compared(None, f"Not compared with an engine, for want of room even in {precision}: {lacks[-1]}")


def _judge(
    base: Base,
    rows: Sequence[Scored],
    trained: Sequence[Sequence[float]],
    served: Sequence[Sequence[float]],
    coarser: str,
) -> Fidelity:
    differences = [np.abs(np.subtract(ours, theirs)) for ours, theirs in zip(trained, served, strict=True)]
    every = np.concatenate(differences)
    fidelity = Fidelity(
        rows=len(rows),
        tokens=len(every),
        mean_difference=float(every.mean()),
        max_difference=float(every.max()),
        tolerance=TOLERANCE[coarser],
        precision=coarser,
    )
    # Written so that a number that is none fails.
    if not (every.max() <= fidelity.tolerance and every.mean() <= MEAN_TOLERANCE[coarser]):
        raise ScoresDiffer(_first_difference(base, rows, trained, served, fidelity))
    return fidelity


def check_factors(adapter: Path, trained: Mapping[str, tuple["Tensor", "Tensor"]]) -> None:
    """Compare what the engine reads from an adapter's folder with `trained`, as `trainer_factors` gives it.

    Coarse precisions hide small faults from `check_scores`; none can hide from this.

    Raises:
        AdapterDiffers: some layer is another, or scaled otherwise.
        AdapterRejected: the engine cannot read the folder for these layers.
    """
    import torch

    from tuneloom.engine.adapter_files import read_adapter

    shapes = {name: (b.shape[1], a.shape[1]) for name, (a, b) in trained.items()}
    rank = max(a.shape[0] for a, _ in trained.values())
    read = read_adapter(adapter, shapes, max_rank=rank, dtype=torch.float32).factors
    if missing := sorted(trained.keys() - read.keys()):
        raise AdapterDiffers(f"The files of the adapter lack the trained layer `{missing[0]}`. {_AGAIN}")
    for name, pair in trained.items():
        for side, ours, theirs in zip("AB", pair, read[name], strict=True):
            difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
            if not difference <= FACTOR_TOLERANCE * largest:
                raise AdapterDiffers(
                    f"`lora_{side}` of `{name}`, scaled, is read from the adapter's files with a difference of "
                    f"{difference:.3g}, where the largest number is {largest:.3g}. {_AGAIN}"
                )


def sentence(fidelity: Fidelity) -> str:
    return (
        f"The engine agrees with the trainer: {fidelity.tokens} learned tokens of {fidelity.rows} rows, "
        f"log-probabilities apart by {fidelity.mean_difference:.2g} on average and {fidelity.max_difference:.2g} at "
        f"most, within {fidelity.tolerance:g} ({fidelity.precision})"
    )


def _engines(settings: Settings, base: Base, precision: str) -> Iterator[EngineSettings]:
    """The base's engine as it is served, then one in the trainer's own `precision`, which had room until now."""
    served = _engine_options(settings, base)
    yield served
    yield served.model_copy(
        update={
            "dtype": {"bf16": "bf16", "fp16": "bf16", "fp32": "fp32"}.get(precision, served.dtype),
            "quantization": precision if precision in ("nf4", "int8") else "none",
        }
    )


def _engine_options(settings: Settings, base: Base) -> EngineSettings:
    """How the base is served, with room for one row and one adapter only."""
    return next((served.engine for served in settings.bases if served.id == base.id), EngineSettings())


def _serve(options: EngineSettings, base: Base, adapter: Path, rows: Sequence[Scored]) -> tuple[list[list[float]], str]:
    """The engine's log-probabilities, and the precision that it computes in."""
    from tuneloom.engine.core import EngineCore
    from tuneloom.engine.options import EngineConfig

    ref = _reference(adapter)
    # What computes stays as it is served; what only makes room for many is made small.
    small = {
        "max_sequences": 1,
        "kv_cache_tokens": max(64, max(len(row.ids) for row in rows) + 16),
        "prefix_cache_bytes": 0,
        "adapter_slots": 1,
        "max_rank": max(options.max_rank, ref.rank),
        "host_cache_bytes": 2 * ref.size_bytes,
    }
    release_memory()
    core = EngineCore(
        base.path, EngineConfig(**{**options.model_dump(exclude={"disk_cache_bytes"}), **small}), lambda _: adapter
    )
    try:
        scores = [core.score(row.ids, row.places, ref) for row in rows]
        facts = core.stats().extra
    finally:
        core.close()
        del core
        release_memory()
    if options.quantization != "none":
        return scores, options.quantization
    # A checkpoint that was stored quantised does not say here how; NF4 is the coarsest.
    return scores, "nf4" if facts["quantised_linears"] else {"bfloat16": "bf16", "float32": "fp32"}[facts["dtype"]]


def _reference(adapter: Path) -> AdapterRef:
    weights = adapter / WEIGHTS_FILE
    shapes = [tensor.shape for name, tensor in read_header(weights).items() if name.endswith("lora_A.weight")]
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    return AdapterRef(
        sha256=sha256, uri=str(adapter), rank=max(shape[0] for shape in shapes), size_bytes=weights.stat().st_size
    )


def _first_difference(
    base: Base,
    rows: Sequence[Scored],
    trained: Sequence[Sequence[float]],
    served: Sequence[Sequence[float]],
    fidelity: Fidelity,
) -> str:
    """What differs, told by the first token beyond the tolerance, or by the mean where none is."""
    codec = Codec.load(base.path)
    told = (
        f"over {fidelity.tokens} learned tokens the mean difference is {fidelity.mean_difference:.3g}, and it may be "
        f"{MEAN_TOLERANCE[fidelity.precision]:.3g}"
    )
    for row, ours, theirs in zip(rows, trained, served, strict=True):
        for place, our, their in zip(row.places, ours, theirs, strict=True):
            if not abs(our - their) <= fidelity.tolerance:
                told = (
                    f"row {row.number + 1} as it is trained, token {place}, {codec.token_text(row.ids[place])[0]!r} "
                    f"({row.ids[place]}): the log-probability is {our:.4f} in the trainer and {their:.4f} in the "
                    f"engine, further apart than {fidelity.tolerance:g} ({fidelity.precision})"
                )
                return _SERVED_OTHERWISE.format(told)
    return _SERVED_OTHERWISE.format(told)


_AGAIN = "It would not be served as it was trained, so no version was made of it. Train it again."
_SERVED_OTHERWISE = (
    "The adapter would not be served as it was trained, so no version was made of it: {}. Train it again; if it fails "
    "again, choose other settings for the base's engine (`dtype`, `quantization`, `native`) or for the run "
    "(`tuneloom.precision`, `tuneloom.quantization`)."
)
