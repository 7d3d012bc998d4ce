import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.tiny import make_adapter
from tuneloom.errors import AdapterRejected
from tuneloom.store.artifacts import check_adapter
from tuneloom.store.peft_folder import AdapterConfig

BASE = "tiny/llama"
LAYER = "model.layers.0.self_attn.q_proj"
A = f"base_model.model.{LAYER}.lora_A.weight"
B = f"base_model.model.{LAYER}.lora_B.weight"
SHAPES = {LAYER: (6, 4)}


@pytest.fixture(scope="module")
def shapes(tiny_base: Path) -> dict[str, tuple[int, int]]:
    with safe_open(tiny_base / "model.safetensors", "np") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys() if "proj" in name}  # noqa: SIM118
    return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in found.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of rank 2 for one layer of (out 6, in 4), written byte by byte."""
    path = tmp_path / "adapter"
    path.mkdir()
    write_config(path)
    write_weights(path, header())
    return path


def config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        **changes,
    }


def write_config(folder: Path, text: str | None = None, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(text if text is not None else json.dumps(config(**changes)))


def header() -> dict[str, Any]:
    return {
        A: {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
        B: {"dtype": "F32", "shape": [6, 2], "data_offsets": [32, 80]},
    }


def write_weights(folder: Path, header: dict[str, Any] | bytes, *, size: int = 80, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = (len(text) if length is None else length).to_bytes(8, "little")
    (folder / "adapter_model.safetensors").write_bytes(prefix + text + bytes(size))


def rejection(folder: Path, *, base: str = BASE, max_rank: int = 64) -> str:
    with pytest.raises(AdapterRejected) as error:
        check_adapter(folder, base, SHAPES, max_rank)
    error.value.message.encode()
    return error.value.message


# --- what is accepted ---


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({}, 4),
        ({"targets": ("q_proj", "v_proj"), "rank": 8}, 8),
        ({"rank_pattern": {"q_proj": 16, "^model.layers.1.mlp.up_proj|down_proj": 2}}, 16),
        ({"rank_pattern": {"^model.layers.0.self_attn.k_proj": 3}, "alpha_pattern": {"k_proj": 1.5}}, 4),
        ({"use_rslora": True, "lora_dropout": 0.1}, 4),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, 4),
        ({"init_lora_weights": "gaussian"}, 4),
        ({"init_lora_weights": "orthogonal"}, 4),
        ({"exclude_modules": ["down_proj"]}, 4),
        ({"task_type": None}, 4),
    ],
)
def test_what_peft_saves_for_plain_lora_is_accepted(
    tmp_path: Path, tiny_base: Path, shapes: dict[str, tuple[int, int]], settings: Any, rank: int
) -> None:
    folder = make_adapter(tmp_path / "adapter", tiny_base, **settings)
    assert check_adapter(folder, BASE, shapes, 16) == rank


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_what_peft_saves_for_more_than_lora_is_refused_by_name(
    tmp_path: Path, tiny_base: Path, shapes: dict[str, tuple[int, int]], settings: Any
) -> None:
    folder = make_adapter(tmp_path / "adapter", tiny_base, **settings)
    with pytest.raises(AdapterRejected, match=f"`{next(iter(settings))}`"):
        check_adapter(folder, BASE, shapes, 64)


def test_ranks_follow_patterns_as_peft_does(tmp_path: Path, tiny_base: Path) -> None:
    patterns = {"layers.0.mlp.up_proj|layers.1.self_attn.o_proj": 3, "q_proj": 5, "model.layers.1.self_attn.k_proj": 6}
    folder = make_adapter(tmp_path / "adapter", tiny_base, rank_pattern=patterns)
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        actual = {
            name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): file.get_slice(name).get_shape()[0]
            for name in file.keys()  # noqa: SIM118
            if "lora_A" in name
        }
    ours = AdapterConfig.model_validate(config(r=4, rank_pattern=patterns)).ranks(actual)
    assert ours == actual


def test_a_minimal_adapter_and_other_files_beside_it_are_accepted(folder: Path) -> None:
    for name in ("README.md", "tokenizer.json", "chat_template.jinja", "training_log.csv"):
        (folder / name).write_text("x")
    (folder / "runs").mkdir()
    assert check_adapter(folder, BASE, SHAPES, 2) == 2


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_accepted(folder: Path, dtype: str) -> None:
    halves = {
        A: {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, 16]},
        B: {"dtype": dtype, "shape": [6, 2], "data_offsets": [16, 40]},
        "__metadata__": {"format": "pt"},
    }
    write_weights(folder, halves, size=40)
    assert check_adapter(folder, BASE, SHAPES, 2) == 2


@pytest.mark.parametrize(
    "name", [None, "", BASE, "Tiny/LLAMA", "/srv/models/x", "./x", "../x", "a/b/c", "C:\\x", "~/x"]
)
def test_the_base_may_be_named_by_its_id_or_a_local_path(folder: Path, name: str | None) -> None:
    write_config(folder, base_model_name_or_path=name)
    assert check_adapter(folder, BASE, SHAPES, 2) == 2


# --- the config ---


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_model_name_or_path": "other/base"}, "other/base"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"r": 0}, "`r`"),
        ({"r": "2"}, "`r`"),
        ({"r": True}, "`r`"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_alpha": "4"}, "lora_alpha"),
        ({"bias": "all"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"corda_config": {"a": 1}}, "corda_config"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": {"a": []}}, "init_lora_weights"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"(q_proj": 2}}, "rank_pattern"),
        ({"rank_pattern": {"[9-0]": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"(a+)+b": 2}}, "alpha_pattern"),
        ({"rank_pattern": {f"q{i}": 2 for i in range(2000)}}, "rank_pattern"),
    ],
)
def test_a_config_that_is_not_plain_lora_is_refused_by_name(folder: Path, changes: Any, named: str) -> None:
    write_config(folder, **changes)
    assert named in rejection(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        '{"r": NaN}',
        '{"r": 1, "r": 2}',
        '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 1e999}',
        '{"x": ' * 100_000,
        "[" * 100_000,
        '{"r": ' + "9" * 5000 + "}",
        '{"\\ud800": 1}',
        '{"x": "' + "x" * (1 << 20) + '"}',
    ],
)
def test_a_config_that_is_not_sound_json_is_refused(folder: Path, text: str) -> None:
    write_config(folder, text)
    rejection(folder)


def test_a_config_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(b'{"r": "\xff"}')
    assert "adapter_config.json" in rejection(folder)


def test_patterns_cannot_keep_us_busy(folder: Path) -> None:
    evil = [
        "(a+)+b",
        "(a|a|a)*",
        "(.*)*x",
        "((a|b)|(c|d))e",
        ".*.*.*.*x",
        "a{1,1000}{1,1000}",
        "(?=a)" * 50,
        "(q_proj",
        "[9-0]",
        "x" * 201,
        "",
    ]
    started = time.monotonic()
    for pattern in evil:
        write_config(folder, rank_pattern={pattern: 2})
        assert "rank_pattern" in rejection(folder)
    assert time.monotonic() - started < 5


# --- the folder ---


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "x.pth", "X.PKL", "a.ckpt", "a.npy"])
def test_a_pickle_in_the_folder_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    assert f"`{name}`" in rejection(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
def test_a_symbolic_link_in_the_folder_is_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "elsewhere"
    if (folder / name).exists():
        shutil.move(folder / name, target)
    (folder / name).symlink_to(target)
    assert f"`{name}`" in rejection(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("replaced_by", ["nothing", "a folder"])
def test_a_missing_file_is_named(folder: Path, name: str, replaced_by: str) -> None:
    (folder / name).unlink()
    if replaced_by == "a folder":
        (folder / name).mkdir()
    assert f"`{name}`" in rejection(folder)


def test_a_folder_that_is_not_there_or_is_a_file_is_refused(folder: Path, tmp_path: Path) -> None:
    rejection(tmp_path / "absent")
    rejection(folder / "adapter_config.json")


# --- the weights ---


def change(name: str, **entry: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**header(), name: {**header().get(name, {}), **entry}}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (change(A, dtype="F64"), "F64"),
        (change(A, dtype="I8"), "I8"),
        (change(A, dtype=None), A),
        (change(A, shape=[4, 2]), "[4, 2]"),
        (change(A, shape=[8]), "[8]"),
        (change(A, shape=[2, -4]), A),
        (change(A, shape=[2, 4.0]), A),
        (change(A, shape=[True, 8]), A),
        (change(A, shape="24"), A),
        (change(A, shape=[2, 4, 2**60]), A),
        (change(A, shape=[1, 4], data_offsets=[0, 16]), B),
        (change(A, data_offsets=[0, 31]), A),
        (change(A, data_offsets=[32, 0]), A),
        (change(A, data_offsets=[-32, 0]), A),
        (change(A, data_offsets=[0, 32, 80]), A),
        (change(A, data_offsets=[48, 80]), B),
        (change(B, data_offsets=[0, 48]), B),
        (change(B, data_offsets=[33, 81]), B),
        (change(A, extra=1), A),
        (lambda: {A: header()[A]}, "32"),
        (lambda: {A: {**header()[A], "shape": [4, 5], "data_offsets": [0, 80]}}, "only one"),
        (lambda: {A.replace("layers.0", "layers.9"): header()[A], B: header()[B]}, "layers.9"),
        (lambda: {A.replace("lora_A", "lora_embedding_A"): header()[A], B: header()[B]}, "lora_embedding_A"),
        (lambda: {A: header()[A], "base_model.model.lm_head.weight": header()[B]}, "lm_head"),
        (lambda: {A: header()[A], B: "x"}, B),
        (lambda: {A: header()[A], B: []}, B),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    folder: Path, make: Callable[[], dict[str, Any]], named: str
) -> None:
    write_weights(folder, make())
    assert named in rejection(folder)


@pytest.mark.parametrize(
    ("text", "size", "length"),
    [
        (b"", 0, 0),
        (b"{}", 80, None),
        (b"{}", 0, None),
        (b"[]", 0, None),
        (b"{", 0, None),
        (b"\xff\xfe", 0, None),
        (b"{}", 0, 2**64 - 1),
        (b"{}", 0, 100 << 20),
        (b"{}", 0, 3),
        (b'{"a":{},"a":{}}', 0, None),
        (b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', 0, None),
        (b'{"a":' * 100_000, 0, None),
    ],
)
def test_a_broken_header_is_refused(folder: Path, text: bytes, size: int, length: int | None) -> None:
    write_weights(folder, text, size=size, length=length)
    rejection(folder)


@pytest.mark.parametrize("size", [0, 79, 81, 160])
def test_weights_of_another_size_than_the_header_says_are_refused(folder: Path, size: int) -> None:
    write_weights(folder, header(), size=size)
    assert str(size) in rejection(folder)


def test_a_file_shorter_than_its_header_is_refused(folder: Path) -> None:
    for length in range(8):
        (folder / "adapter_model.safetensors").write_bytes(bytes(length))
        rejection(folder)


def test_the_rank_must_be_the_one_of_the_config(folder: Path) -> None:
    write_config(folder, r=3)
    assert "[3, 4]" in rejection(folder)
    write_config(folder, r=3, rank_pattern={"q_proj": 2})
    assert check_adapter(folder, BASE, SHAPES, 2) == 2


def test_a_rank_above_the_limit_is_refused_with_both_numbers(folder: Path) -> None:
    assert "Rank 2 is above the limit: 1" in rejection(folder, max_rank=1)
