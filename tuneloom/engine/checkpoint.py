"""What a base is, read from its files before anything of its size is loaded: config, layers, bytes. No weights.

Checkpoints are safetensors on local disk in the form of Hugging Face; no code of a base is run.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tuneloom.domain import DEFAULT_CONTEXT_LENGTH
from tuneloom.engine.kv_cache import KVShape, layer_configs
from tuneloom.engine.lora import linear_groups
from tuneloom.engine.memory import BaseSizes
from tuneloom.errors import InvalidRequest

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Rope variants whose frequencies depend on the longest position in the batch; up to their first length they do not.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# Fields of a config by which attention differs from the plain one.
_FOREIGN_ATTENTION = {"attn_logit_softcapping": "caps its attention scores", "kv_lora_rank": "compresses its keys"}
_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = {"F64", "F32", "BF16", "F16"}
# Bytes of a quantised weight: NF4 keeps half a byte, an eighth-bit scale for each 64 weights and a scale of those
# for each 256; int8 keeps a byte, and an fp32 scale for each row.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class TensorHeader:
    kind: str
    num_items: int


@dataclass(frozen=True)
class Checkpoint:
    """A base on disk. `quantization` is how its files store the weights: `none`, or `nf4`, `fp4` or `int8`."""

    folder: Path
    config: Any
    quantization: str

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the config.

        Raises:
            InvalidRequest: the engine cannot load such a base; the message says why.
        """
        try:
            plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"The base in {folder.name} has no readable `config.json`.") from error
        kind = plain.get("model_type")
        if kind not in CONFIG_MAPPING:
            why = "needs code of its own, which is never run" if "auto_map" in plain else "is of a kind that is unknown"
            raise InvalidRequest(f"The base in {folder.name} ({kind}) {why}. Use another base.")
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, TypeError) as error:
            raise InvalidRequest(f"The `config.json` of the base in {folder.name} is damaged: {error}") from error
        return cls(folder, config, _stored_quantization(folder, plain))

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without weights."""
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        except ValueError as error:
            raise InvalidRequest(f"The base in {self.folder.name} writes no text: {error}") from error

    def tensors(self) -> Iterator[TensorHeader]:
        """The headers of the weights that are loaded."""
        for path in self._files():
            yield from _read_header(path)

    def max_length(self, wanted: int | None = None, *, is_batched: bool) -> int:
        """The context: `wanted` if the base was made for it; in a batch, up to where no token depends on others."""
        config = self.text_config
        length = getattr(config, "max_position_embeddings", None) or wanted or DEFAULT_CONTEXT_LENGTH
        rope = config.to_dict().get("rope_parameters") or {}
        for each in [rope, *(value for value in rope.values() if isinstance(value, dict))] if is_batched else ():
            if each.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
                length = min(length, each.get("original_max_position_embeddings") or length)
        return min(wanted or length, length)

    def unbatchable_reason(self) -> str | None:
        """Why this base cannot share steps with others, as far as its config tells. None: a trial decides."""
        name, config = type(self.skeleton).__name__, self.text_config
        kinds = set(config.to_dict().get("layer_types") or ()) - _LAYER_TYPES
        if self.skeleton._is_stateful:
            return f"{name} carries a recurrent state from token to token"
        if kinds:
            return f"{name} has layers of kind {', '.join(sorted(kinds))}"
        if config.is_heterogeneous:
            return f"{name} has layers that differ in {', '.join(sorted(config.per_layer_attributes))}"
        if not self.skeleton._supports_attention_backend:
            return f"{name} does not let its attention be replaced"
        for field, what in _FOREIGN_ATTENTION.items():
            if getattr(config, field, None):
                return f"{name} {what} (`{field}`)"
        return None

    def sizes(
        self, dtype: torch.dtype, *, quantization: str, is_batched: bool, stacks_blocks: bool, copies_head: bool
    ) -> BaseSizes:
        """What the base takes once loaded as `dtype`, by its headers and its layers.

        `copies_head`: a head that shares the embedding's weights gets its own. `stacks_blocks`: the factors of layers
        of one input are each as wide as all of them.
        """
        item, config = dtype.itemsize, self.text_config
        body = self.skeleton.get_decoder()
        if is_batched:
            groups = [[m.get_submodule(n) for n in names] for m in body.modules() for names in linear_groups(m)]
        else:
            groups = [[module] for module in body.modules() if isinstance(module, nn.Linear)]
        layers = [linear for linears in groups for linear in linears]
        hidden = config.hidden_size
        widest = max((linear.out_features for linear in layers), default=hidden)
        repeats = max(_repeats(each) for each in layer_configs(config))
        kv_bytes = KVShape.of(config, dtype).bytes_per_token if repeats else 0
        return BaseSizes(
            weight_bytes=self._weight_bytes(layers, item, quantization, copies_head),
            rank_bytes=sum(_rank_width(linears, stacks_blocks) for linears in groups) * item,
            kv_token_bytes=kv_bytes,
            vocab_size=config.vocab_size,
            # Residual stream, norm, attention in and out, and what the widest layer reads and writes, twice in fp32.
            step_token_bytes=item * 6 * hidden + 8 * widest,
            seen_token_bytes=item * repeats,
            state_bytes=0 if is_batched else max(_state_bytes(each, item) for each in layer_configs(config)),
        )

    def _weight_bytes(self, layers: list[nn.Linear], item: int, quantization: str, copies_head: bool) -> int:
        total = sum(t.num_items * (item if t.kind in _FLOATS else _ITEM_BYTES[t.kind]) for t in self.tensors())
        if self.quantization == "none" and quantization != "none":
            for linear in layers:
                count = linear.weight.numel()
                kept = count * _NF4_BYTES if quantization == "nf4" else count + 4 * linear.out_features
                total += int(kept) - count * item
        if copies_head and self.text_config.tie_word_embeddings:
            total += self.text_config.vocab_size * self.text_config.hidden_size * item
        return total

    def _files(self) -> list[Path]:
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        try:
            if single.exists() or not index.exists():
                return [single]
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"The base in {self.folder.name} has no readable weight index.") from error
        return [self.folder / Path(name).name for name in sorted(names)]


def _read_header(path: Path) -> Iterator[TensorHeader]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise InvalidRequest(f"The base has no readable weights in `{path.name}`: {error}") from error
    for name, entry in header.items():
        if name != "__metadata__":
            if entry["dtype"] not in _ITEM_BYTES:
                raise InvalidRequest(
                    f"The base stores `{name}` as {entry['dtype']}, without saying how that is quantised. "
                    "Use its plain weights, or those of bitsandbytes."
                )
            yield TensorHeader(entry["dtype"], math.prod(entry["shape"]))


def _stored_quantization(folder: Path, config: dict[str, Any]) -> str:
    stored = config.get("quantization_config")
    if not stored:
        return "none"
    if stored.get("load_in_8bit"):
        return "int8"
    if stored.get("load_in_4bit"):
        return stored.get("bnb_4bit_quant_type", "fp4")
    method = stored.get("quant_method", "unknown")
    raise InvalidRequest(
        f"The base in {folder.name} is quantised by `{method}`. Use its plain weights, or those of bitsandbytes."
    )


def _repeats(config: Any) -> int:
    """Heads that share keys; 0 without attention."""
    heads = getattr(config, "num_attention_heads", None) or 0
    return heads // (getattr(config, "num_key_value_heads", None) or heads) if heads else 0


def _rank_width(linears: list[nn.Linear], stacks_blocks: bool) -> int:
    """Numbers that one adapter adds for each unit of rank to layers of one input."""
    outputs = sum(linear.out_features for linear in linears)
    inputs = linears[0].in_features
    return len(linears) * (inputs + outputs) if stacks_blocks else len(linears) * inputs + outputs


def _state_bytes(config: Any, item: int) -> int:
    """Roughly what recurrent layers carry for one sequence; their configs name it in several ways."""
    state = next((v for n in ("state_size", "mamba_d_state", "linear_key_head_dim") if (v := getattr(config, n, 0))), 0)
    inner = getattr(config, "intermediate_size", None) or 2 * config.hidden_size
    return config.num_hidden_layers * inner * (state + 4) * max(item, 4) if state else 0
