"""The CPU kernels against torch in fp32. Where a CPU or a compiler is missing, that they are not offered."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.engine.conftest import OpenCore, ref_of, request
from tests.tiny import make_adapter
from tuneloom.engine import kernels
from tuneloom.engine.dense_cache import DenseCache
from tuneloom.engine.fused import FusedMLP, FusedNorm, fuse
from tuneloom.engine.kernels import Kernels
from tuneloom.engine.kv_cache import KVShape
from tuneloom.engine.linear import Product, ProductOptions
from tuneloom.engine.lora import LoraLayers, PackOptions
from tuneloom.generation import SamplingParams

Check = Callable[[Kernels], None]


def on_kernels(check: Check) -> None:
    """Run a check where kernels can be had; elsewhere there must be none."""
    native = kernels.load()
    if native is None:
        assert not (kernels.is_supported() and shutil.which("cc"))
    else:
        check(native)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 6e-3) -> None:
    assert (found.float() - expected).norm() <= tolerance * expected.norm()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def plain_attention(query, keys, values, window: int | None) -> torch.Tensor:
    """One token's (H, D) over the positions (C, n, D) that it may see."""
    heads, groups = query.shape[0], keys.shape[0]
    start = max(0, keys.shape[1] - window) if window else 0
    keys, values = (each[:, start:].float().repeat_interleave(heads // groups, 0) for each in (keys, values))
    scores = (keys @ query.float()[:, :, None]).squeeze(-1) * 0.2
    return (scores.softmax(-1)[:, None] @ values).squeeze(1)


@pytest.mark.parametrize(("heads", "groups", "width"), [(9, 3, 64), (4, 4, 32), (8, 1, 128), (10, 2, 96)])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_of_decoding_rows_and_chunks_is_the_plain_one(heads, groups, width, window):
    def check(native: Kernels) -> None:
        slots = torch.tensor([3, 0, 1, 1, 1, 1])
        positions = torch.tensor([40, 16, 0, 1, 2, 3])
        key, value = randn(4, groups, 48, width), randn(4, groups, 48, width, seed=1)
        rows = randn(6, (heads + 2 * groups) * width, seed=2).view(6, -1, width)
        query, new_key, new_value = rows.split([heads, groups, groups], 1)
        out = native.attend(query, new_key, new_value, key, value, slots, positions, scaling=0.2, window=window)
        assert torch.equal(key[1, :, 2], new_key[4]) and torch.equal(value[3, :, 40], new_value[0])
        for i, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
            seen = key[slot, :, : position + 1], value[slot, :, : position + 1]
            assert_near(out[i], plain_attention(query[i], *seen, window), 1e-2)

    on_kernels(check)


def test_what_is_no_number_stays_in_its_row():
    def check(native: Kernels) -> None:
        key, value = randn(2, 1, 20, 32), randn(2, 1, 20, 32, seed=1)
        key[0, 0, 3, 5] = float("nan")
        rows = randn(2, 4, 32, seed=2)
        arguments = rows[:, :2], rows[:, 2:3], rows[:, 3:], key, value, torch.tensor([0, 1]), torch.tensor([9, 9])
        out = native.attend(*arguments, scaling=0.2, window=None)
        assert out[0].isnan().all() and out[1].isfinite().all()

    on_kernels(check)


@pytest.mark.parametrize("width", [576, 50])
def test_small_kernels_are_torch_rounded_once_or_twice(width: int):
    def check(native: Kernels) -> None:
        x, weight = randn(7, width) * 20, randn(width, seed=1)
        normal = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        for offset in (0.0, 1.0):
            expected = normal * (offset + weight.float())
            assert_near(native.rms_norm(x, weight, eps=1e-5, offset=offset, rounds=False), expected)
        both = randn(9, 2 * width, seed=3) * 8
        assert_near(native.silu_mul(both), F.silu(both[:, :width].float()) * both[:, width:].float())

    on_kernels(check)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (576, 100), (30, 7), (130, 145)])
def test_products_of_any_shape_are_those_of_torch(rows: int, inputs: int, outputs: int):
    def check(native: Kernels) -> None:
        x, weight, bias = randn(rows, inputs), randn(outputs, inputs, seed=1), randn(outputs, seed=2)
        for some_bias in (None, bias):
            found = native.linear(x, native.pack_linear(weight), some_bias, outputs)
            expected = x.float() @ weight.float().t() + (0 if some_bias is None else some_bias.float())
            assert_near(found, expected)

    on_kernels(check)


def test_an_odd_number_of_inputs_is_served_otherwise():
    def check(native: Kernels) -> None:
        weight, x = randn(16, 33), randn(3, 33)
        product = Product(weight, None, ProductOptions(prepack=True, kernels=native))
        assert_near(product(x), x.float() @ weight.float().t(), 1e-2)

    on_kernels(check)


def test_threads_change_nothing():
    def check(native: Kernels) -> None:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            key, value, rows = randn(8, 2, 64, 32), randn(8, 2, 64, 32, seed=1), randn(8, 8, 32, seed=2)
            places = torch.arange(8), torch.arange(8) * 7
            parts = rows.split([4, 2, 2], 1)
            results.append(native.attend(*parts, key, value, *places, scaling=0.2, window=None))
            results.append(native.rms_norm(rows.view(8, -1), randn(256), eps=1e-5, offset=0.0, rounds=True))
            results.append(native.linear(rows.view(8, -1), native.pack_linear(randn(200, 256)), None, 200))
        torch.set_num_threads(1)
        assert all(map(torch.equal, results[:3], results[3:]))

    on_kernels(check)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(64), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return (x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight.float())).bfloat16()


class Gated(nn.Module):
    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.norm, self.other = Norm(), nn.LayerNorm(64).bfloat16()
        self.gate_proj, self.up_proj = (nn.Linear(64, 96, bias=False).bfloat16() for _ in range(2))
        self.down_proj = nn.Linear(96, 64, bias=False).bfloat16()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


@torch.inference_mode()
def test_modules_are_replaced_only_where_the_result_is_theirs():
    def check(native: Kernels) -> None:
        body = nn.ModuleDict({"silu": Gated(F.silu), "gelu": Gated(F.gelu)})
        LoraLayers(body, PackOptions(1, 8, ProductOptions(prepack=True, kernels=native), torch.bfloat16), prefix="")
        x = randn(3, 64)
        expected = body["silu"](x).float()
        cache = DenseCache(KVShape(1, 1, 32, torch.bfloat16), 1, 16, torch.device("cpu"))
        assert fuse(body, native, cache) == 3
        assert isinstance(body["silu"], FusedMLP) and isinstance(body["gelu"], Gated)
        assert isinstance(body["gelu"].norm, FusedNorm) and isinstance(body["gelu"].other, nn.LayerNorm)
        assert_near(body["silu"](x), expected, 1e-2)

    on_kernels(check)


@pytest.mark.parametrize("fault", ["no compiler", "compiler fails", "other cpu"])
def test_without_compiler_or_cpu_there_are_no_kernels(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def fail(*command: str) -> str:
        raise subprocess.CalledProcessError(1, command, stderr="cc: error")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "is_supported", lambda: fault != "other cpu")
    if fault == "no compiler":
        monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    elif fault == "compiler fails":
        monkeypatch.setattr(kernels, "_run", fail)
    assert kernels.load.__wrapped__() is None
    assert ("no kernels" in caplog.text) == (fault != "other cpu")
    assert not list(tmp_path.rglob("*.so"))


def test_the_library_is_built_once_for_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def check(_: Kernels) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        first = kernels._build()
        assert kernels._build() == first and first.parent.stat().st_mode & 0o077 == 0
        assert [path.name for path in tmp_path.rglob("*.so")] == [first.name]

    on_kernels(check)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A Llama whose heads are wide enough for the attention kernel, with the tokenizer of the tiny one."""
    folder = tmp_path_factory.mktemp("wide") / "base"
    shutil.copytree(tiny_base, folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_base, hidden_size=128, head_dim=32, intermediate_size=96)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_an_engine_with_kernels_scores_as_one_without(
    wide_base: Path, open_core: OpenCore, tiny_prompts: list[list[int]], tmp_path: Path
):
    """Two adapters and the base in mixed steps; log-probabilities of both engines within what bf16 can tell."""
    folders = [None, make_adapter(tmp_path / "a", wide_base, rank=6), make_adapter(tmp_path / "b", wide_base, seed=1)]
    scores = {}
    for native in (False, True):
        engine = open_core(base=wide_base, dtype="bf16", native=native, max_step_tokens=40)
        for i in range(9):
            adapter = folders[i % 3] and ref_of(folders[i % 3])
            params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
            engine.core.add(request(f"r{i}", tiny_prompts[i], params=params, adapter=adapter))
        engine.run()
        assert not engine.errors
        scores[native] = [dict(engine.outputs[f"r{i}"][0].tokens[0].top) for i in range(9)]
        fused = engine.core.stats().extra["modules_fused"]
        assert fused == (9 if native and kernels.load() else 0)
    for plain, native in zip(scores[False], scores[True], strict=True):
        both = plain.keys() & native.keys()
        assert len(both) >= 15
        assert max(abs(plain[token] - native[token]) for token in both) < 0.15


def test_by_kernels_no_bit_of_an_answer_depends_on_what_else_is_computed(
    wide_base: Path, open_core: OpenCore, tiny_prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Drawn alone, and beside others in other chunks: the same tokens by exactly the same log-probabilities."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    adapter = ref_of(make_adapter(tmp_path / "a", wide_base, rank=6))
    params = SamplingParams(max_tokens=10, temperature=1.1, top_p=0.9, seed=3, logprobs=2)

    def check(_: Kernels) -> None:
        answers = []
        for step_tokens, others in ((256, 0), (48, 9)):
            engine = open_core(base=wide_base, dtype="bf16", max_step_tokens=step_tokens)
            assert engine.core.stats().extra["linears_packed"] == 8
            for i in range(others):
                engine.core.add(
                    request(f"other{i}", tiny_prompts[i], params=params, adapter=adapter if i % 2 else None)
                )
            for id, which in (("base", None), ("adapter", adapter)):
                engine.core.add(request(id, tiny_prompts[29], params=params, adapter=which))
            engine.run()
            answers.append([token for id in ("base", "adapter") for o in engine.outputs[id] for token in o.tokens])
        assert answers[0] == answers[1] and len(answers[0]) == 20

    on_kernels(check)
