"""What PEFT can save, against what is served: the same as PEFT computes, or refused at publish and at load alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny import make_adapter
from tuneloom.engine.adapter_files import read_adapter
from tuneloom.errors import AdapterRejected
from tuneloom.store.peft_folder import check_adapter

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def shapes(tiny_base: Path) -> dict[str, tuple[int, int]]:
    """The linear layers between embeddings and head."""
    found = {}
    with safe_open(tiny_base / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            shape = file.get_slice(name).get_shape()
            if ".layers." in name and len(shape) == 2:
                found[name.removesuffix(".weight")] = (shape[0], shape[1])
    return found


def read(folder: Path, shapes: dict[str, tuple[int, int]], dtype: torch.dtype = torch.float32):
    return read_adapter(folder, shapes, max_rank=64, dtype=dtype)


def save_as_peft(folder: Path, base: Path, settings: dict[str, Any]) -> None:
    """An untrained adapter of any kind, as PEFT itself saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": list(ALL), **settings}
    get_peft_model(model, LoraConfig(**options)).save_pretrained(folder)


FOREIGN = [
    {"use_dora": True},
    {"modules_to_save": ["norm"]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"bias": "lora_only"},
    {"bias": "all"},
    {"lora_bias": True},
    {"layer_replication": [[0, 2], [1, 2]]},
    {"trainable_token_indices": [3, 5]},
    {"target_parameters": ["mlp.gate_proj.weight"], "target_modules": []},
    {"alora_invocation_tokens": [3, 5]},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"use_qalora": True, "qalora_group_size": 16},
]


@pytest.mark.filterwarnings("ignore")  # PEFT warns of most of these itself
@pytest.mark.parametrize("settings", FOREIGN, ids=lambda settings: "-".join(f"{k}-{v}" for k, v in settings.items()))
def test_what_peft_saves_for_more_than_plain_lora_is_refused_at_publish_and_at_load(
    tmp_path: Path, tiny_base: Path, shapes: dict[str, tuple[int, int]], settings: dict[str, Any]
):
    save_as_peft(tmp_path, tiny_base, settings)
    with pytest.raises(AdapterRejected):
        check_adapter(tmp_path, "tiny/llama", shapes, 64)
    with pytest.raises(AdapterRejected):
        read(tmp_path, shapes)


@pytest.mark.parametrize(
    "key",
    (
        *("use_dora", "lora_bias", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
        *("corda_config", "lora_ga_config", "loftq_config", "megatron_config", "a_variant_of_next_year"),
    ),
)
def test_a_variant_that_is_switched_on_is_named_at_publish_and_at_load(
    tmp_path: Path, tiny_adapters: list[Path], shapes: dict[str, tuple[int, int]], key: str
):
    config = json.loads((tiny_adapters[0] / "adapter_config.json").read_text())
    value = True if key.startswith(("use", "lora_b")) else {"r": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    (tmp_path / "adapter_model.safetensors").write_bytes((tiny_adapters[0] / "adapter_model.safetensors").read_bytes())
    with pytest.raises(AdapterRejected, match=f"`{key}`"):
        check_adapter(tmp_path, "tiny/llama", shapes, 64)
    with pytest.raises(AdapterRejected, match=f"`{key}`"):
        read(tmp_path, shapes)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 8, "use_rslora": True},
        {"rank_pattern": {"q_proj": 16, "^model.layers.1.mlp.up_proj|down_proj": 2}},
        {"alpha_pattern": {"k_proj": 1.5, "layers.1.mlp.gate_proj": 32}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"v_proj": 5, "o_proj": 3}},
        {"targets": ("q_proj", "down_proj"), "layers_to_transform": [1], "layers_pattern": "layers"},
        {"task_type": None, "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2}},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "mica"},
    ],
)
@pytest.mark.filterwarnings("ignore:.*eva")  # PEFT asks for data that only training needs
def test_factors_multiply_to_what_peft_adds_to_each_layer(
    tmp_path: Path, tiny_base: Path, shapes: dict[str, tuple[int, int]], settings: Any
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    make_adapter(tmp_path, tiny_base, **settings)
    check_adapter(tmp_path, "tiny/llama", shapes, 64)
    adapter = read(tmp_path, shapes)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path)
    layers = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and module.active_adapters
    }
    assert adapter.factors.keys() == layers.keys()
    for name, (a_RK, b_RN) in adapter.factors.items():
        expected = layers[name].get_delta_weight("default")
        torch.testing.assert_close((a_RK.t() @ b_RN).t(), expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_is_one_piece_of_memory_of_the_size_that_it_says(
    tiny_adapters: list[Path], shapes: dict[str, tuple[int, int]]
):
    for dtype in (torch.float32, torch.bfloat16):
        adapter = read(tiny_adapters[1], shapes, dtype)
        tensors = [tensor for pair in adapter.factors.values() for tensor in pair]
        assert adapter.rank == 8 and {tensor.dtype for tensor in tensors} == {dtype}
        assert all(tensor.is_contiguous() for tensor in tensors)
        assert adapter.size_bytes == sum(tensor.nbytes for tensor in tensors)
        assert {tensor.untyped_storage().nbytes() for tensor in tensors} == {adapter.size_bytes}


@pytest.mark.parametrize("kinds", [("F16",), ("BF16",), ("F16", "F32"), ("BF16", "F16", "F32")])
def test_weights_of_any_floating_format_are_read_also_mixed(
    tmp_path: Path, tiny_adapters: list[Path], shapes: dict[str, tuple[int, int]], kinds: tuple[str, ...]
):
    formats = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    tensors = load_file(tiny_adapters[0] / "adapter_model.safetensors")
    mixed = {
        name: tensor.to(formats[kinds[number % len(kinds)]]) for number, (name, tensor) in enumerate(tensors.items())
    }
    save_file(mixed, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((tiny_adapters[0] / "adapter_config.json").read_bytes())
    for module, (a_RK, b_RN) in read(tmp_path, shapes).factors.items():
        torch.testing.assert_close(a_RK, mixed[f"{PREFIX}{module}.lora_A.weight"].float())
        torch.testing.assert_close(b_RN, mixed[f"{PREFIX}{module}.lora_B.weight"].float().t() * 2.0)


@pytest.mark.parametrize("text", [b"", b"\x08\0\0\0\0\0\0\0{}", b"\xff" * 64])
def test_a_broken_weights_file_is_refused(
    tmp_path: Path, tiny_adapters: list[Path], shapes: dict[str, tuple[int, int]], text: bytes
):
    (tmp_path / "adapter_config.json").write_bytes((tiny_adapters[0] / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(text)
    with pytest.raises(AdapterRejected):
        read(tmp_path, shapes)


def test_weights_that_are_no_floating_numbers_are_refused(
    tmp_path: Path, tiny_adapters: list[Path], shapes: dict[str, tuple[int, int]]
):
    (tmp_path / "adapter_config.json").write_bytes((tiny_adapters[0] / "adapter_config.json").read_bytes())
    save_file({"x": torch.zeros(4, dtype=torch.int64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterRejected, match="I64"):
        read(tmp_path, shapes)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_numbers_that_are_not_finite_are_refused_at_publish_and_at_load(
    tmp_path: Path, tiny_adapters: list[Path], shapes: dict[str, tuple[int, int]], kind: torch.dtype, value: str
):
    """One in the very last place; the largest finite number is fine."""
    (tmp_path / "adapter_config.json").write_bytes((tiny_adapters[0] / "adapter_config.json").read_bytes())
    tensors = {name: t.to(kind) for name, t in load_file(tiny_adapters[0] / "adapter_model.safetensors").items()}
    name = f"{PREFIX}model.layers.1.self_attn.v_proj.lora_A.weight"
    for number, is_fine in ((torch.finfo(kind).max, True), (float(value), False)):
        tensors[name].view(-1)[-1] = number
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        if is_fine:
            check_adapter(tmp_path, "tiny/llama", shapes, 64)
            read(tmp_path, shapes)
            continue
        with pytest.raises(AdapterRejected, match=r"layers.1.self_attn.v_proj.* not finite"):
            check_adapter(tmp_path, "tiny/llama", shapes, 64)
        with pytest.raises(AdapterRejected, match=r"layers.1.self_attn.v_proj.* not finite"):
            read(tmp_path, shapes)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_unpacked_factors_are_the_same_numbers_rounded_once(
    tmp_path: Path, tiny_base: Path, shapes: dict[str, tuple[int, int]], kind: torch.dtype
):
    make_adapter(tmp_path, tiny_base, rank=3, alpha=5.0)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: tensor.to(kind) for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    packed = read(tmp_path, shapes, torch.bfloat16)
    loose = read_adapter(tmp_path, shapes, max_rank=64, dtype=torch.bfloat16, pack=False)
    assert (loose.rank, loose.size_bytes) == (packed.rank, packed.size_bytes)
    for module, (a_RK, b_RN) in packed.factors.items():
        exact = tensors[f"{PREFIX}{module}.lora_B.weight"].to(kind).float().t() * (5.0 / 3)
        assert torch.equal(b_RN, exact.to(torch.bfloat16)) and torch.equal(b_RN, loose.factors[module][1])
        assert torch.equal(a_RK, loose.factors[module][0])
