"""An adapter folder as PEFT 0.21 saves it, read with distrust: which of them can be served exactly.

Nothing is executed and no tensor is loaded. What an adapter would need beyond plain LoRA is refused by its name, and so
are numbers that are not finite.
"""

import json
import math
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneloom.errors import AdapterRejected

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_PATTERNS = 1024

_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".dill"})
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# `org/name`: what stands for a model on the hub. More slashes, or one in front, make it a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
# PEFT reads the keys of a pattern as regular expressions, and these come from strangers: names, anchors and
# alternatives cannot run away, repetition can.
_PATTERN = re.compile(r"(?:[A-Za-z0-9_.^|]|\\\.){1,200}")


class AdapterConfig(BaseModel):
    """`adapter_config.json`, as far as it decides what the adapter computes."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    r: int = Field(gt=0)
    lora_alpha: int | float = Field(gt=0, allow_inf_nan=False)
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    fan_in_fan_out: Literal[False] = False
    base_model_name_or_path: str | None = None

    def ranks(self, modules: Iterable[str]) -> dict[str, int]:
        """The rank of each module: that of the first pattern which matches the end of its name, else `r`."""
        patterns = [(re.compile(rf"(.*\.)?({pattern})$"), rank) for pattern, rank in self.rank_pattern.items()]
        return {module: next((rank for p, rank in patterns if p.match(module)), self.r) for module in modules}


# Keys without any effect on what a trained adapter computes. Without a `task_type`, PEFT notes the base's class in
# `auto_mapping`.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
    }
)
# Most others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the weights of the base that they were trained on.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class Tensor:
    """`size_bytes` of numbers, which begin `begin` bytes behind the header of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


def check_adapter(folder: Path, base_id: str, shapes: Mapping[str, tuple[int, int]], max_rank: int) -> int:
    """Return the largest rank of an adapter that fits the base exactly.

    `shapes` are the base's linear layers: name -> (out, in).

    Raises:
        AdapterRejected: the folder holds anything else; the message says what, and what to do.
    """
    check_files(folder)
    config = read_config(folder / CONFIG_FILE)
    _check_base(config.base_model_name_or_path, base_id)
    tensors = read_header(folder / WEIGHTS_FILE)
    modules = _pair(tensors, shapes)
    ranks = config.ranks(modules)
    for module, (a, b) in modules.items():
        _check_module(module, a, b, shapes[module], ranks[module])
    rank = max(a.shape[0] for a, _ in modules.values())
    if rank > max_rank:
        raise AdapterRejected(f"Rank {rank} is above the limit: {max_rank}. Train it again with a smaller rank.")
    _check_finite(folder / WEIGHTS_FILE, tensors)
    return rank


def check_files(folder: Path) -> None:
    """Both files are there, nothing is a link, nothing is a pickle; other files do not matter."""
    try:
        entries = {path.name: path.lstat().st_mode for path in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterRejected("There is no such adapter folder.") from error
    for name, mode in sorted(entries.items()):
        if stat.S_ISLNK(mode):
            raise AdapterRejected(f"`{name}` is a symbolic link. Copy the folder with its contents, as `cp -rL` does.")
        if Path(name).suffix.lower() in _PICKLES:
            raise AdapterRejected(f"`{name}` may run code when it is loaded. Remove it; weights must be safetensors.")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not stat.S_ISREG(entries.get(name, 0)):
            raise AdapterRejected(f"`{name}` is missing. Save the adapter with PEFT's `save_pretrained`.")


def read_config(path: Path) -> AdapterConfig:
    with path.open("rb") as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        raise AdapterRejected(f"`{CONFIG_FILE}` is larger than {MAX_CONFIG_BYTES:,} bytes.")
    data = _parse_object(text, CONFIG_FILE)
    _check_keys(data)
    try:
        # PEFT writes null for a dictionary or a flag that was never set.
        config = AdapterConfig.model_validate({key: value for key, value in data.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AdapterRejected(f"`{where}` in `{CONFIG_FILE}` cannot be served: {first['msg']}.") from error
    _check_patterns(config)
    return config


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, if the header is sound and covers the file exactly."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise AdapterRejected(f"`{WEIGHTS_FILE}` is not a safetensors file: its header length is {length}.")
        header = _parse_object(file.read(length), WEIGHTS_FILE)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry) for name, entry in header.items()}
    end = 0
    for begin, stop, name in sorted((*header[name]["data_offsets"], name) for name in header):
        tensor = tensors[name]
        if begin != end or stop - begin != tensor.size_bytes:
            raise AdapterRejected(f"The bytes of `{name[:200]}` in `{WEIGHTS_FILE}` are not where they should be.")
        end = stop
    if end != size - 8 - length:
        raise AdapterRejected(f"`{WEIGHTS_FILE}` has {size - 8 - length} bytes of weights, its header says {end}.")
    return tensors


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # NumPy is loaded by those who take adapters in, not by all who serve.
    from tuneloom.store.peft_numbers import Span, find_not_finite

    start = path.stat().st_size - sum(tensor.size_bytes for tensor in tensors.values())
    spans = (Span(name, t.dtype, start + t.begin, start + t.begin + t.size_bytes) for name, t in tensors.items())
    if name := find_not_finite(path, spans):
        raise AdapterRejected(f"`{name}` holds numbers that are not finite: its training has diverged. Train it anew.")


def _tensor(name: str, entry: Any) -> Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, stop], **rest} if not rest:
            if dtype not in _DTYPE_BYTES:
                raise AdapterRejected(f"`{name[:200]}` is {dtype[:20]}. Save the adapter as F32, F16 or BF16.")
            if _are_counts(shape) and _are_counts((begin, stop)):
                return Tensor(dtype, tuple(shape), begin)
    raise AdapterRejected(f"`{WEIGHTS_FILE}` describes `{name[:200]}` in a way that is not safetensors.")


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**48 for value in values)


def _parse_object(text: bytes, file_name: str) -> dict[str, Any]:
    """JSON without duplicate keys, NaN or endless nesting, whose outermost value is an object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        data = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
        # An escaped half of a surrogate pair is not text and could not be named in an error.
        json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"`{file_name}` does not hold valid JSON: {str(error)[:200]}.") from error
    if not isinstance(data, dict):
        raise AdapterRejected(f"`{file_name}` does not hold a JSON object.")
    return data


def _check_keys(data: dict[str, Any]) -> None:
    known = AdapterConfig.model_fields.keys() | _HARMLESS
    # PEFT writes a default that is false, null or empty for each variant of LoRA that was not used.
    used = sorted(key for key, value in data.items() if key not in known and value not in (None, False, {}, [], ""))
    if used:
        raise AdapterRejected(
            f"`{used[0][:100]}` is set in `{CONFIG_FILE}` and needs more than plain LoRA, which is all that is served. "
            "Train the adapter without it."
        )
    start = data.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise AdapterRejected(
            f"`init_lora_weights` is {json.dumps(start)[:100]}; served are adapters that began as `true`, `gaussian`, "
            "`orthogonal`, `eva` or `mica`, which leave the base as it is. Convert it to plain LoRA with PEFT's "
            "`path_initial_model_for_weight_conversion`."
        )


def _check_patterns(config: AdapterConfig) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        patterns: dict[str, int | float] = getattr(config, field)
        if len(patterns) > MAX_PATTERNS:
            raise AdapterRejected(f"`{field}` has {len(patterns)} entries; at most {MAX_PATTERNS} are served.")
        for pattern, value in patterns.items():
            if not _PATTERN.fullmatch(pattern):
                raise AdapterRejected(f"`{field}` has the pattern `{pattern[:100]}`. Use the names of modules instead.")
            if not 0 < value < math.inf:
                raise AdapterRejected(f"`{field}` gives `{pattern[:100]}` the value {value}; it must be above 0.")


def _check_base(named: str | None, base_id: str) -> None:
    if named and _HUB_ID.fullmatch(named) and named.lower() != base_id.lower():
        raise AdapterRejected(
            f"The adapter was trained on `{named[:200]}`, not on `{base_id}`. Name that base; if they are one model, "
            f"put `{base_id}` into `base_model_name_or_path` of `{CONFIG_FILE}`."
        )


def _pair(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A, B), if the tensors are pairs for modules of the base and nothing else."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise AdapterRejected(f"`{name[:200]}` is not part of a plain LoRA adapter. Train it without that part.")
        if match["module"] not in shapes:
            raise AdapterRejected(
                f"The base has no linear layer `{match['module'][:200]}` that an adapter can be served on; its head is "
                "none. Is it another base's adapter?"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise AdapterRejected(f"`{WEIGHTS_FILE}` holds no tensors.")
    for module, pair in sides.items():
        if len(pair) != 2:
            raise AdapterRejected(f"`{module}` has only one of its two matrices `lora_A` and `lora_B`.")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _check_module(module: str, a: Tensor, b: Tensor, shape: tuple[int, int], rank: int) -> None:
    out_features, in_features = shape
    for side, tensor, expected in (("A", a, (rank, in_features)), ("B", b, (out_features, rank))):
        if tensor.shape != expected:
            raise AdapterRejected(
                f"`lora_{side}` of `{module}` has the shape {list(tensor.shape)[:8]}; by the base and "
                f"`{CONFIG_FILE}` it should be {list(expected)}."
            )
