"""A GGUF file of the Llama architecture as a Hugging Face folder: bf16 safetensors, config and tokenizer. No torch.

What is not understood (another architecture, tokenizer, rope scaling, an unknown tensor) is refused by name: a
checkpoint that is converted almost right answers almost right, which nobody notices.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from tuneloom.errors import InvalidRequest

ARCHITECTURE = "llama"
TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp's numbers for the kinds of tokens.
CONTROL, USER_DEFINED = 3, 4
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS_THEN_BYTE_LEVEL = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
}
# llama.cpp's names for the ways of splitting text before BPE.
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": DIGITS_THEN_BYTE_LEVEL,
    "starcoder": DIGITS_THEN_BYTE_LEVEL,
    "refact": DIGITS_THEN_BYTE_LEVEL,
    "command-r": DIGITS_THEN_BYTE_LEVEL,
    "codeshell": DIGITS_THEN_BYTE_LEVEL,
}


@dataclass(frozen=True)
class Metadata:
    """The key-values of a GGUF file."""

    values: dict[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def need(self, key: str) -> Any:
        if key not in self.values:
            raise InvalidRequest(f"The GGUF file has no `{key}`.")
        return self.values[key]

    def llama(self, key: str, default: Any = None) -> Any:
        return self.values.get(f"{ARCHITECTURE}.{key}", default)


def convert(source: Path, folder: Path) -> str | None:
    """Write the Hugging Face form of `source` into `folder`; return the license that the file names.

    Raises:
        InvalidRequest: something in the file is not known here.
    """
    try:
        reader = GGUFReader(source)
    except ValueError as error:
        raise InvalidRequest(f"`{source.name}` is not a GGUF file: {error}.") from error
    metadata = Metadata({key: field.contents() for key, field in reader.fields.items() if key[:5] != "GGUF."})
    _check(metadata)
    tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    if "model.embed_tokens.weight" not in tensors:
        raise InvalidRequest("The GGUF file has no token embedding (`token_embd.weight`).")
    _write_json(folder / "config.json", _config(metadata, tensors))
    _write_json(folder / "generation_config.json", _special_ids(metadata))
    _write_json(folder / "tokenizer.json", _tokenizer(metadata))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))
    _write_weights(folder / "model.safetensors", tensors, metadata)
    return metadata.get("general.license")


def _check(metadata: Metadata) -> None:
    known = {
        "general.architecture": (ARCHITECTURE,),
        "tokenizer.ggml.model": ("gpt2",),
        "tokenizer.ggml.pre": tuple(PRE_TOKENIZERS),
    }
    for key, accepted in known.items():
        if metadata.need(key) not in accepted:
            raise InvalidRequest(
                f"`{key}` is `{metadata.need(key)}` in the GGUF file. Known here: {', '.join(accepted)}."
            )
    if metadata.llama("rope.scaling.type", "none") != "none" or metadata.llama("expert_count", 0):
        raise InvalidRequest("GGUF files with rope scaling or experts are not known here. Use the safetensors release.")
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        raise InvalidRequest("GGUF tokenizers that add a BOS token are not known here. Use the safetensors release.")


def _hf_name(name: str) -> str:
    if name in TOP_TENSORS:
        return TOP_TENSORS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in LAYER_TENSORS:
        raise InvalidRequest(f"The GGUF file has a tensor that is not known here: `{name}`.")
    return f"model.layers.{match[1]}.{LAYER_TENSORS[match[2]]}.weight"


def _config(metadata: Metadata, tensors: dict[str, ReaderTensor]) -> dict[str, Any]:
    hidden_size = metadata.need("llama.embedding_length")
    heads = metadata.need("llama.attention.head_count")
    head_dim = metadata.llama("attention.key_length", hidden_size // heads)
    if metadata.llama("rope.dimension_count", head_dim) != head_dim:
        raise InvalidRequest("GGUF files that rotate only a part of each head are not known here.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        # The embedding's rows, for the metadata may count without padding. GGUF gives shapes innermost first.
        "vocab_size": int(tensors["model.embed_tokens.weight"].shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": metadata.need("llama.feed_forward_length"),
        "num_hidden_layers": metadata.need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.llama("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.need("llama.context_length"),
        # Stored as float32: 1e-05 comes back as 9.999999747378752e-06.
        "rms_norm_eps": round(float(metadata.need("llama.attention.layer_norm_rms_epsilon")), 12),
        "rope_theta": float(metadata.llama("rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **_special_ids(metadata),
    }


def _special_ids(metadata: Metadata) -> dict[str, int]:
    eos = metadata.need("tokenizer.ggml.eos_token_id")
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", eos),
        "eos_token_id": eos,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id", eos),
    }


def _tokenizer(metadata: Metadata) -> dict[str, Any]:
    tokens = metadata.need("tokenizer.ggml.tokens")
    kinds = metadata.need("tokenizer.ggml.token_type")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": index, "content": token, **flags, "special": kind == CONTROL}
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in metadata.need("tokenizer.ggml.merges")],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[metadata.need("tokenizer.ggml.pre")],
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": model,
    }


def _tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    tokens = metadata.need("tokenizer.ggml.tokens")
    ids = _special_ids(metadata)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.need("llama.context_length"),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def _write_weights(path: Path, tensors: dict[str, ReaderTensor], metadata: Metadata) -> None:
    """One tensor at a time: the whole model in float32 is never in memory."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(tensors):
        shape = [int(size) for size in reversed(tensors[name].shape)]
        end = offset + 2 * int(np.prod(shape))
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in sorted(tensors):
            file.write(_to_bf16(_weight(name, tensors[name], metadata)).tobytes())


def _weight(name: str, tensor: ReaderTensor, metadata: Metadata) -> np.ndarray:
    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    values = values.reshape([int(size) for size in reversed(tensor.shape)])
    heads = metadata.need("llama.attention.head_count")
    if name.endswith("q_proj.weight"):
        return _unpermute(values, heads)
    if name.endswith("k_proj.weight"):
        return _unpermute(values, metadata.llama("attention.head_count_kv", heads))
    return values


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each head's rows for its rotary kernel; put them in order again."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32, rounded to nearest even; numpy has no bf16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
