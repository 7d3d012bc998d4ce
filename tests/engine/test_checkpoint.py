"""What a base's files tell before it is loaded, held against the base once loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.conftest import OpenCore, ref_of, request
from tests.engine.models import COMMON, make_model
from tests.tiny import make_adapter
from tuneloom.engine import assembly
from tuneloom.engine.checkpoint import Checkpoint
from tuneloom.engine.loader import load_model
from tuneloom.engine.memory import BaseSizes, Room
from tuneloom.errors import InvalidRequest

CPU = torch.device("cpu")
BIASED = {**COMMON, "attention_bias": True, "tie_word_embeddings": False}


def sizes_of(folder: Path, dtype: torch.dtype = torch.float32, quantization: str = "none", **form: bool) -> BaseSizes:
    options = {"is_batched": True, "stacks_blocks": True, "copies_head": False, **form}
    return Checkpoint.open(folder).sizes(dtype, quantization=quantization, **options)


def loaded_bytes(folder: Path, dtype: torch.dtype, quantization: str = "none") -> int:
    model = load_model(Checkpoint.open(folder), CPU, dtype, quantization=quantization).model
    return model.get_memory_footprint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [BIASED, {**COMMON, "tie_word_embeddings": True}])
def test_the_headers_tell_what_the_weights_take(tmp_path: Path, dtype: torch.dtype, settings: dict):
    base = make_model(tmp_path / "base", "llama", settings)
    # Rotary frequencies are no part of a checkpoint.
    assert sizes_of(base, dtype).weight_bytes == pytest.approx(loaded_bytes(base, dtype), rel=0.001)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_layers_tell_what_quantised_weights_take(tmp_path: Path, kind: str):
    base = make_model(tmp_path / "base", "llama", {**BIASED, "hidden_size": 256, "intermediate_size": 512})
    planned = sizes_of(base, torch.bfloat16, kind).weight_bytes
    # The footprint leaves the scales out.
    assert planned == pytest.approx(loaded_bytes(base, torch.bfloat16, kind), rel=0.03)
    assert planned < sizes_of(base, torch.bfloat16).weight_bytes


def test_weights_in_several_files_are_counted_once(tmp_path: Path):
    base = make_model(tmp_path / "base", "llama", BIASED)
    whole = sizes_of(base).weight_bytes
    model = load_model(Checkpoint.open(base), CPU, torch.float32).model
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    # Others of the folder are not loaded.
    (tmp_path / "parts" / "consolidated.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    assert sizes_of(tmp_path / "parts").weight_bytes == whole


def test_a_head_of_its_own_is_counted_where_there_will_be_one(tmp_path: Path):
    tied = make_model(tmp_path / "tied", "llama", {**COMMON, "tie_word_embeddings": True})
    more = sizes_of(tied, copies_head=True).weight_bytes - sizes_of(tied).weight_bytes
    assert more == COMMON["vocab_size"] * COMMON["hidden_size"] * 4
    apart = make_model(tmp_path / "apart", "llama", BIASED)
    assert sizes_of(apart, copies_head=True).weight_bytes == sizes_of(apart).weight_bytes


def test_a_slot_takes_what_is_planned_for_its_rank(open_core: OpenCore, tiny_base: Path, tmp_path: Path, tiny_prompts):
    adapter = make_adapter(tmp_path / "adapter", tiny_base, rank=32)
    engine = open_core(tiny_base, max_rank=32)
    engine.core.add(request("r", tiny_prompts[0], adapter=ref_of(adapter, rank=32)))
    engine.run()
    assert engine.core._runner.lora.slot_bytes == 32 * sizes_of(tiny_base).rank_bytes


def test_a_base_that_does_not_fit_is_refused_before_it_is_loaded(
    open_core: OpenCore, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(assembly, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(assembly, "measure_room", lambda _: Room("the host", 1 << 20))
    with pytest.raises(
        InvalidRequest, match=r"The base tiny does not fit into the host: .*weights .* = .* MiB"
    ) as refusal:
        open_core(host_cache_bytes=0, prefix_cache_bytes=0)
    assert refusal.value.code == "out_of_memory"


def test_the_cache_gets_what_the_plan_has_for_it(open_core: OpenCore, monkeypatch: pytest.MonkeyPatch):
    plentiful = open_core().core.stats()
    assert plentiful.kv_tokens_total == 8 * 512 == plentiful.extra["memory"]["kv_cache_tokens"]
    fixed = plentiful.extra["memory"]["device_bytes_planned"] - plentiful.extra["memory"]["items"]["keys and values"]
    token = plentiful.extra["memory"]["items"]["keys and values"] // (8 * 512)
    monkeypatch.setattr(assembly, "measure_room", lambda _: Room("the host", fixed + 1000 * token))
    scarce = open_core(memory_share=1.0)
    assert scarce.core.stats().kv_tokens_total == 1000 and scarce.core.max_length == 512


def test_a_number_of_cache_tokens_bounds_the_context(open_core: OpenCore):
    engine = open_core(kv_cache_tokens=100)
    assert engine.core.stats().kv_tokens_total == 100 == engine.core.max_length


def test_code_of_a_base_is_never_run(open_core: OpenCore, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Model"}}')
    with pytest.raises(InvalidRequest, match="code of its own"):
        open_core(tmp_path)


def test_code_that_comes_with_a_known_kind_of_base_is_not_needed(open_core: OpenCore, tmp_path: Path, tiny_prompts):
    base = make_model(tmp_path / "base", "phi3", COMMON)
    config = json.loads((base / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (base / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    (base / "own.py").write_text("raise SystemExit('run')")
    engine = open_core(base)
    engine.core.add(request("r", tiny_prompts[0]))
    engine.run()
    assert len(engine.tokens("r")) == 8


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no readable `config.json`"),
        ({"config.json": "{}"}, "of a kind that is unknown"),
        ({"config.json": '{"model_type": "t5"}'}, "writes no text"),
        ({"config.json": '{"model_type": "llama"}'}, "no readable weights in `model.safetensors`"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors": "short"}, "no readable weights"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors.index.json": "[]"}, "no readable weight index"),
    ],
)
def test_a_folder_that_is_no_base_is_refused_with_the_reason(
    open_core: OpenCore, tmp_path: Path, files: dict[str, str], reason: str
):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InvalidRequest, match=reason):
        open_core(tmp_path)


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({UP: None, NORM: None}, f"`{UP}` is missing, `{NORM}` is missing. Add the whole"),
        ({UP: torch.zeros(90, 64)}, r"up_proj.weight` is \[90, 64\], not \[96, 64\]"),
        ({"lm_head.weight": None}, "`lm_head.weight` is missing"),
        ({UP: torch.full((96, 64), torch.nan)}, "no finite scores"),
        ({UP: torch.zeros(96, 64, dtype=torch.float8_e4m3fn)}, "stores `model.*` as F8_E4M3"),
    ],
)
def test_weights_that_do_not_make_up_the_base_are_refused_by_name(
    open_core: OpenCore, tmp_path: Path, change: dict[str, torch.Tensor | None], reason: str
):
    """transformers itself fills in random numbers for those that are missing."""
    base = make_model(tmp_path / "base", "llama", {**COMMON, "tie_word_embeddings": False})
    tensors = {**load_file(base / "model.safetensors"), **change}
    save_file({name: t for name, t in tensors.items() if t is not None}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidRequest, match=reason):
        open_core(base)


def test_weights_that_were_cut_short_are_refused(open_core: OpenCore, tmp_path: Path):
    base = make_model(tmp_path / "base", "llama", COMMON)
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate((base / "model.safetensors").stat().st_size - 4)
    with pytest.raises(InvalidRequest, match="cannot be loaded"):
        open_core(base)


def test_a_tied_head_need_not_be_in_the_files(open_core: OpenCore, tmp_path: Path, tiny_prompts):
    base = make_model(tmp_path / "base", "llama", {**COMMON, "tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    engine = open_core(base)
    engine.core.add(request("r", tiny_prompts[0]))
    engine.run()
    assert not engine.errors


def test_fp16_weights_become_bf16(tmp_path: Path):
    base = make_model(tmp_path / "base", "llama", BIASED)
    model = load_model(Checkpoint.open(base), CPU, torch.float32).model.half()
    model.save_pretrained(tmp_path / "half")
    checkpoint = Checkpoint.open(tmp_path / "half")
    assert {tensor.kind for tensor in checkpoint.tensors()} == {"F16"}
    loaded = load_model(checkpoint, CPU, torch.bfloat16).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_lengths_are_those_for_which_a_token_does_not_depend_on_its_batch(tmp_path: Path):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    settings = {**COMMON, "rope_parameters": rope, "original_max_position_embeddings": 64}
    base = make_model(tmp_path / "base", "phi3", settings)
    checkpoint = Checkpoint.open(base)
    assert checkpoint.max_length(is_batched=True) == 64
    assert checkpoint.max_length(is_batched=False) == COMMON["max_position_embeddings"]
    assert checkpoint.max_length(32, is_batched=True) == 32 and checkpoint.max_length(100, is_batched=True) == 64


def test_a_recurrent_base_has_the_context_that_is_asked_for(tmp_path: Path):
    recurrent = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
    checkpoint = Checkpoint.open(make_model(tmp_path / "base", "mamba", recurrent))
    assert checkpoint.max_length(is_batched=False) == 2048
    assert checkpoint.max_length(9000, is_batched=False) == 9000
