"""The bases of an installation, as their manifests tell. Reads only; what a folder must be is decided by the intake."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tuneloom.errors import InvalidRequest, ModelNotFound

MANIFEST = "tuneloom.json"
MAX_HEADER_BYTES = 100 << 20
_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.")
_PACKED = re.compile(r"(?P<module>.+)\.weight\.quant_state\.bitsandbytes__\w+")
_LANGUAGE = "language_model."


class Manifest(BaseModel):
    """What the intake writes of a base. `files` maps each name to its sha256; `sha256` covers the weights alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    sha256: str
    files: dict[str, str]
    size_bytes: int
    context_length: int
    vocab_size: int
    license: str | None = None
    source: str


@dataclass(frozen=True)
class Base:
    """A base checkpoint on this machine. `path` is a Hugging Face folder; `size_bytes` is that of its weights."""

    id: str
    path: Path
    sha256: str
    context_length: int
    vocab_size: int
    size_bytes: int
    license: str | None = None

    @cached_property
    def slug(self) -> str:
        return slug(self.id)


def slug(base_id: str) -> str:
    """The id as a name for folders and applications: lower case, `-` for whatever is not a letter or digit."""
    return re.sub(r"[^a-z0-9]", "-", base_id.lower())


def catalogue(bases_dir: Path) -> dict[str, Base]:
    """All bases whose intake is complete, by id."""
    if not bases_dir.is_dir():
        return {}
    found = (read_base(folder) for folder in sorted(bases_dir.iterdir()) if not folder.name.startswith("."))
    return {base.id: base for base in found if base}


def get_base(bases_dir: Path, base_id: str) -> Base:
    """The base with this id.

    Raises:
        ModelNotFound: there is none.
    """
    base = read_base(bases_dir / slug(base_id))
    if base is None or base.id != base_id:
        raise ModelNotFound.named(base_id)
    return base


def read_base(folder: Path) -> Base | None:
    """The base in a folder, or None where no intake has finished."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    facts = manifest.model_dump(include={"id", "sha256", "context_length", "vocab_size", "size_bytes", "license"})
    return Base(path=folder, **facts)


def read_manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        message = f"{folder / MANIFEST} is damaged. Delete the folder and add the base again: `tuneloom bases add`."
        raise InvalidRequest(message) from error


def linear_shapes(base: Base) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear layer that an adapter may change, by module name; embeddings and head are not.

    Of a base that also sees or hears, the layers of its language model.

    Example: `model.layers.0.self_attn.q_proj` -> (576, 576).
    """
    shapes: dict[str, tuple[int, int]] = {}
    packed: dict[str, tuple[int, int]] = {}
    for file in sorted(base.path.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            if not _LAYER.search(name):
                continue
            if match := _PACKED.fullmatch(name):
                packed[match["module"]] = _packed_shape(file, entry)
            elif name.endswith(".weight") and len(entry["shape"]) == 2:
                out_features, in_features = entry["shape"]
                shapes[name.removesuffix(".weight")] = (out_features, in_features)
    shapes |= packed
    of_text = {name: shape for name, shape in shapes.items() if _LANGUAGE in name}
    # The files of some bases name their parts in another order than the modules are named.
    return {re.sub(rf"^{_LANGUAGE}model\.", f"model.{_LANGUAGE}", n): shape for n, shape in (of_text or shapes).items()}


def _packed_shape(file: Path, entry: dict) -> tuple[int, int]:
    """The shape of a layer that bitsandbytes keeps in 4 bits: beside the weights, which are one long row, as JSON."""
    with file.open("rb") as source:
        begin, end = entry["data_offsets"]
        source.seek(8 + int.from_bytes(source.read(8), "little") + begin)
        try:
            out_features, in_features = json.loads(source.read(end - begin))["shape"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"`{file.name}` does not tell the shapes of its 4-bit layers.") from error
    return out_features, in_features


def read_header(path: Path) -> dict[str, dict]:
    """The tensor table of a safetensors file: name -> `{dtype, shape, data_offsets}`.

    Raises:
        InvalidRequest: it is not a whole safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        available = path.stat().st_size - 8
        if not 2 <= length <= min(available, MAX_HEADER_BYTES):
            raise InvalidRequest(f"`{path.name}` is not a safetensors file: its header claims {length} bytes.")
        try:
            table = json.loads(file.read(length))
            table.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in table.values()), default=0)
            if not all(isinstance(size, int) for entry in table.values() for size in entry["shape"]):
                raise ValueError("a shape is none")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"`{path.name}` is not a safetensors file: its header is damaged.") from error
    if end != available - length:
        raise InvalidRequest(f"`{path.name}` is not whole: {available - length} bytes of tensors where {end} belong.")
    return table
