"""Models from a folder or bucket in the layout `models/{name}/v{N}/adapter/`, there perhaps `training_config.json`.

Versions come in one by one, in the order of their numbers, each in one commit; one that cannot is told and passed over.
What has come in before is known by its content, so an import that was cut off is completed by running it again.
"""

import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tuneloom.bases import get_base
from tuneloom.config import BaseSettings
from tuneloom.control import models
from tuneloom.control.context import ApiContext
from tuneloom.control.retry import retry
from tuneloom.domain import adapter_sha256, check_model_name
from tuneloom.errors import AdapterRejected, InvalidRequest, TuneloomError
from tuneloom.store import open_blobs
from tuneloom.store.artifacts import ADAPTER_FILES
from tuneloom.store.peft_folder import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE, check_files, read_config

TRAINING_CONFIG = "training_config.json"

_VERSION = re.compile(r"v([1-9][0-9]{0,8})")
# Keys of objects that are looked into, such as `models/bot/v1/adapter/adapter_config.json`, or under no version's name.
_READ = "|".join(map(re.escape, (*ADAPTER_FILES, TRAINING_CONFIG)))
_IS_READ = re.compile(rf"/[^/]+/(adapter/({_READ})|{re.escape(TRAINING_CONFIG)})$")
CHUNK_BYTES = 1 << 20
_BASE_KEYS = ("base_model", "base_model_name_or_path", "model_name_or_path", "base_model_id", "model_id", "model_name")
_ACTIVE_KEYS = ("active", "is_active")
# Objects whose entries count as if they stood outside.
_SECTIONS = frozenset({"lora", "lora_config", "training", "training_args", "hyperparameters", "metrics"})
# Our word -> those that trainers use for it.
_SETTINGS = {
    "rank": ("rank", "r", "lora_r", "lora_rank"),
    "alpha": ("alpha", "lora_alpha"),
    "dropout": ("dropout", "lora_dropout"),
    "target_modules": ("target_modules", "lora_target_modules"),
    "learning_rate": ("learning_rate", "lr"),
    "n_epochs": ("n_epochs", "num_train_epochs", "num_epochs", "epochs"),
    "batch_size": ("batch_size", "per_device_train_batch_size", "train_batch_size"),
    "accumulation_steps": ("accumulation_steps", "gradient_accumulation_steps"),
    "max_length": ("max_length", "max_seq_length", "max_seq_len"),
    "scheduler": ("scheduler", "lr_scheduler_type"),
    "warmup_steps": ("warmup_steps",),
    "weight_decay": ("weight_decay",),
    "max_grad_norm": ("max_grad_norm",),
    "quantization": ("quantization",),
    "packing": ("packing",),
    "seed": ("seed",),
}
_METRICS = {
    "train_loss": ("train_loss", "final_loss"),
    "valid_loss": ("valid_loss", "eval_loss"),
    "train_runtime_s": ("train_runtime", "training_time_seconds"),
}


@dataclass(frozen=True)
class Imported:
    """What became of one version folder, `found` below the given one. `settings` are known ones of its training under
    our names, `unknown` the rest of its training config.
    """

    found: str
    result: Literal["added", "present", "refused"]
    note: str = ""
    added_as: str | None = None
    base: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Told:
    """What `training_config.json` tells of a version."""

    base: str | None = None
    is_active: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class _Candidate:
    """A version whose adapter can be added: `folder` holds its two files as they will be stored."""

    number: int
    folder: Path
    base: BaseSettings
    sha256: str
    told: _Told


def import_layout(context: ApiContext, owner: str, folder: Path, base_map: dict[str, str]) -> list[Imported]:
    """Add what is in `folder`; `base_map` gives other names to bases.

    The version of a model that is marked `active` in its training config, else the highest, is what the bare name
    calls from then on, if it is added now. Numbers are kept where they are above those which there have been.

    Raises:
        InvalidRequest: nothing in the folder is in that layout.
    """
    root = folder / "models" if (folder / "models").is_dir() else folder
    versions, others = _version_folders(root)
    names = sorted({path.parent.name for path in versions})
    if not names:
        raise InvalidRequest(f"{folder} holds no `NAME/vN` folders. Give the copy of the bucket, or its `models`.")
    results = [result for name in names for result in _import_model(context, owner, name, root / name, base_map)]
    note = "versions are called v1, v2 and so on; rename the folder"
    return [*results, *(Imported(f"{path.parent.name}/{path.name}", "refused", note) for path in others)]


@contextmanager
def at_hand(source: str) -> Iterator[Path]:
    """The folder `source`; of `gs://BUCKET/PREFIX` a copy of what an import reads, until the end of the context.

    Raises:
        InvalidRequest: the URL names no bucket.
        StoreRefused, Overloaded: the bucket does not let us in, or does not answer.
    """
    if not source.startswith("gs://"):
        yield Path(source)
        return
    blobs = open_blobs(source)
    with tempfile.TemporaryDirectory(prefix="tuneloom-import-") as scratch:
        for blob in blobs.walk():
            if _IS_READ.search(f"/{blob.key}"):
                path = Path(scratch, blob.key)
                path.parent.mkdir(parents=True, exist_ok=True)
                with blobs.open(blob.key) as content, path.open("xb") as copy:
                    shutil.copyfileobj(content, copy, CHUNK_BYTES)
        yield Path(scratch)


def _version_folders(root: Path) -> tuple[list[Path], list[Path]]:
    """Those of versions, and others that hold an adapter, too, under a name that is no version's."""
    found = sorted(path for path in root.glob("*/*") if path.is_dir()) if root.is_dir() else []
    versions = [path for path in found if _VERSION.fullmatch(path.name)]
    return versions, [path for path in found if path not in versions and (path / "adapter").is_dir()]


def _import_model(
    context: ApiContext, owner: str, name: str, folder: Path, base_map: dict[str, str]
) -> Iterator[Imported]:
    """The results for one model, in the order of its versions."""
    numbers = sorted(int(path.name[1:]) for path in folder.iterdir() if _VERSION.fullmatch(path.name))
    with tempfile.TemporaryDirectory(prefix="tuneloom-import-") as scratch:
        read: dict[int, _Candidate | Imported] = {}
        for number in numbers:
            try:
                read[number] = _read(context, name, folder / f"v{number}", number, Path(scratch), base_map)
            except TuneloomError as error:
                read[number] = Imported(f"{name}/v{number}", "refused", error.message)
        good = [each for each in read.values() if isinstance(each, _Candidate)]
        marked = [each.number for each in good if each.told.is_active]
        active = max(marked or [each.number for each in good], default=None)
        for each in read.values():
            yield _add(context, owner, name, each, each.number == active) if isinstance(each, _Candidate) else each


def _read(
    context: ApiContext, name: str, folder: Path, number: int, scratch: Path, base_map: dict[str, str]
) -> _Candidate:
    """Check the form of a version and copy its adapter. Raises TuneloomError: it cannot come in."""
    check_model_name(name, param="name")
    context.check_free_name(name, param="name")
    source = folder / "adapter"
    check_files(source)
    named = read_config(source / CONFIG_FILE).base_model_name_or_path
    told = _read_told(folder)
    base = _find_base(context, [told.base, named], base_map)
    copy = scratch / f"v{number}"
    copy.mkdir()
    shutil.copyfile(source / WEIGHTS_FILE, copy / WEIGHTS_FILE)
    shutil.copyfile(source / CONFIG_FILE, copy / CONFIG_FILE)
    if named != base.id:
        # It may be a path of the machine that trained it, or what the base was called there.
        config = {**json.loads((source / CONFIG_FILE).read_bytes()), "base_model_name_or_path": base.id}
        (copy / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return _Candidate(number, copy, base, _content_sha256(copy), told)


def _add(context: ApiContext, owner: str, name: str, candidate: _Candidate, activate: bool) -> Imported:
    store, told, base = context.store, candidate.told, candidate.base
    found = f"{name}/v{candidate.number}"
    facts: dict[str, Any] = {"base": base.id, "settings": told.settings, "unknown": told.unknown}
    for version in models.list_versions(store.records, owner, name):
        if version.adapter.sha256 == candidate.sha256:
            return Imported(found, "present", told.note, version.pinned_name, **facts)
    try:
        addition = models.draft_import(
            store,
            owner,
            get_base(context.bases_dir, base.id),
            name,
            candidate.folder,
            max_rank=base.engine.max_rank,
            metrics=told.metrics,
            wanted_number=candidate.number,
            activate=activate,
        )

        def once() -> str:
            again = addition()
            store.records.commit(*again.writes)
            return again.version.pinned_name

        return Imported(found, "added", told.note, retry(once), **facts)
    except TuneloomError as error:
        return Imported(found, "refused", error.message, **facts)


def _find_base(context: ApiContext, names: list[str | None], base_map: dict[str, str]) -> BaseSettings:
    """The served base that the first of `names` stands for which stands for any."""
    known = [name for name in names if name]
    for name in known:
        if (base := context.find_base(base_map.get(name, name))) is not None:
            return base
    if not known:
        raise AdapterRejected(f"Neither `{TRAINING_CONFIG}` nor `{CONFIG_FILE}` names the base.")
    raise AdapterRejected(
        f"The base `{known[0][:200]}` is not served here. Say which of ours it is: `--base-map {known[0][:200]}=ID`."
    )


def _read_told(folder: Path) -> _Told:
    """What the training config says; nothing, and a note, where it cannot be read."""
    for path in (folder / TRAINING_CONFIG, folder / "adapter" / TRAINING_CONFIG):
        if not path.is_file() or path.is_symlink():
            continue
        try:
            with path.open("rb") as file:
                # A loss may be NaN, which is no number to keep.
                data = json.loads(file.read(MAX_CONFIG_BYTES), parse_constant=lambda _: None)
            # Half a character cannot be shown, or stored.
            json.dumps(data, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            return _Told(note=f"`{TRAINING_CONFIG}` is not a JSON object and was left out")
        return _sort(data)
    return _Told(note=f"no `{TRAINING_CONFIG}`")


def _sort(data: dict[str, Any]) -> _Told:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= value if key in _SECTIONS and isinstance(value, dict) else {key: value}

    def take(keys: tuple[str, ...]) -> Any:
        """The value of the first of `keys` that is there; all of them count as known."""
        values = [flat.pop(key) for key in keys if key in flat]
        return next((value for value in values if value is not None), None)

    base = take(_BASE_KEYS)
    is_active = take(_ACTIVE_KEYS) is True
    settings = {ours: value for ours, theirs in _SETTINGS.items() if (value := take(theirs)) is not None}
    metrics = {ours: value for ours, theirs in _METRICS.items() if (value := _number(take(theirs))) is not None}
    return _Told(base if isinstance(base, str) else None, is_active, settings, metrics, flat)


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        # JSON has integers that no float holds.
        return None


def _content_sha256(folder: Path) -> str:
    hashes = {}
    for name in ADAPTER_FILES:
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return adapter_sha256(hashes)
