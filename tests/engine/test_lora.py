import copy
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.engine.conftest import GREEDY, OpenCore, ref_of, request
from tests.tiny import make_adapter
from tuneloom.engine import kernels
from tuneloom.engine.adapter_files import read_adapter
from tuneloom.engine.kernels import Kernels
from tuneloom.engine.linear import Product, ProductOptions
from tuneloom.engine.lora import HostAdapter, LoraLayers, PackOptions
from tuneloom.engine.pages import lazy_zeros
from tuneloom.errors import AdapterRejected

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 8), nn.Linear(12, 4), nn.Linear(12, 4, bias=False)
        self.dense = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x)], -1))


@dataclass(frozen=True)
class Way:
    """How an engine multiplies: by torch in fp32, or by the CPU kernels in bf16."""

    dtype: torch.dtype
    native: Kernels | None

    def options(self, num_slots: int) -> PackOptions:
        return PackOptions(num_slots, 32, ProductOptions(prepack=True, kernels=self.native), self.dtype)

    def assert_close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        tolerance = 1e-4 if self.dtype == torch.float32 else 0.06
        assert (found - expected).float().norm() <= tolerance * expected.float().norm()


# Where the CPU has no kernels, the second way is torch in bf16.
WAYS = [Way(torch.float32, None), Way(torch.bfloat16, kernels.load())]

NAMES = ("b.q_proj", "b.k_proj", "b.v_proj", "b.dense")


def random_adapter(rank: int, block: Block, *, seed: int, without: str = "") -> HostAdapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in NAMES:
        layer = block.get_submodule(name[2:])
        if name != without:
            a = torch.randn(rank, layer.in_features, generator=generator)
            factors[name] = (a, torch.randn(rank, layer.out_features, generator=generator) * 0.3)
    return HostAdapter(rank, 1, factors)


def merged(block: Block, adapter: HostAdapter | None) -> Block:
    out = copy.deepcopy(block)
    for name, (a, b) in adapter.factors.items() if adapter else ():
        weight = out.get_submodule(name[2:]).weight
        weight.data += (a.t() @ b).t().to(weight.dtype)
    return out


@pytest.mark.parametrize(
    ("scattered", "runs"),
    [
        ([], [(0, 6)]),
        ([0, 0, 0], []),
        ([2, 2], [(2, 5), (0, 3)]),
        ([1, 0, 3, 1, 2, 3, 0, 1], []),
        ([3, 1, 0], [(2, 4), (1, 7)]),
        ([3, 0], [(3, 2)]),
    ],
)
@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_each_token_is_computed_with_its_own_adapter(way: Way, scattered: list[int], runs: list[tuple[int, int]]):
    torch.manual_seed(0)
    block = Block().to(way.dtype)
    adapters = [None, *(random_adapter(r, block, seed=r, without=w) for r, w in ((4, ""), (20, "b.k_proj"), (8, "")))]
    plain = [merged(block, adapter) for adapter in adapters]
    layers = LoraLayers(block, way.options(num_slots=3), prefix="b")
    for slot in (1, 2, 3):
        layers.write(slot, layers.arrange(adapters[slot]))
    slots = [*scattered, *(slot for slot, length in runs for _ in range(length))]
    x = torch.randn(1, len(slots), 12, dtype=way.dtype)
    layers.plan(scattered, runs, CPU)
    expected = torch.stack([plain[slot](x[0, i]) for i, slot in enumerate(slots)])
    way.assert_close(block(x)[0], expected)


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_a_slot_that_is_written_anew_forgets_the_old_adapter(way: Way):
    torch.manual_seed(0)
    block = Block().to(way.dtype)
    first, second = random_adapter(8, block, seed=1), random_adapter(2, block, seed=2, without="b.q_proj")
    plain = merged(block, second)
    layers = LoraLayers(block, way.options(num_slots=2), prefix="b")
    layers.plan([2, 0], [], CPU)
    x = torch.randn(1, 2, 12, dtype=way.dtype)
    layers.write(2, layers.arrange(first))
    block(x)
    layers.write(2, layers.arrange(second))
    way.assert_close(block(x)[0, 0], plain(x[0, 0]))


def test_layers_of_one_input_are_fused_and_all_are_named():
    layers = LoraLayers(Block(), WAYS[0].options(num_slots=1), prefix="b")
    assert layers.num_packs == 2
    assert layers.shapes == {"b.q_proj": (8, 12), "b.k_proj": (4, 12), "b.v_proj": (4, 12), "b.dense": (12, 8)}


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 12}, "alpha_pattern": {"v_proj": 32, "q_proj": 1}},
        {"use_rslora": True},
        {"rank": 12, "targets": ("v_proj", "down_proj")},
    ],
)
def test_ranks_scales_and_targets_mean_what_they_mean_in_peft(
    open_core: OpenCore, tiny_base: Path, tiny_prompts, plain_generate, tmp_path: Path, config: dict
):
    folder = make_adapter(tmp_path / "adapter", tiny_base, seed=3, **config)
    engine = open_core()
    for i in (3, 8):
        engine.core.add(request(f"r{i}", tiny_prompts[i], adapter=ref_of(folder)))
    engine.run()
    for i in (3, 8):
        assert engine.tokens(f"r{i}") == plain_generate(tiny_base, tiny_prompts[i], 8, folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"alpha_pattern": {"(a+)+": 3}}, "pattern"),
    ],
)
def test_adapters_that_would_be_served_wrong_are_refused(
    tiny_adapters: list[Path], tmp_path: Path, change: dict, reason: str
):
    config = json.loads((tiny_adapters[0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(AdapterRejected, match=reason):
        (tmp_path / "adapter_model.safetensors").symlink_to(tiny_adapters[0] / "adapter_model.safetensors")
        read_adapter(tmp_path, {}, max_rank=64, dtype=torch.float32)


def test_adapters_of_another_base_are_refused(tiny_adapters: list[Path]):
    with pytest.raises(AdapterRejected, match="no adaptable linear"):
        read_adapter(tiny_adapters[0], {}, max_rank=64, dtype=torch.float32)
    names = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
    with pytest.raises(AdapterRejected, match=r"no adaptable|another base"):
        read_adapter(tiny_adapters[0], dict.fromkeys(names, (64, 99)), max_rank=64, dtype=torch.float32)


@pytest.mark.parametrize("native", [None, kernels.load()])
def test_packed_weights_give_the_plain_product(native: Kernels | None):
    options = ProductOptions(prepack=True, kernels=native)
    weight, bias = torch.randn(64, 32).bfloat16(), torch.randn(64).bfloat16()
    x = torch.randn(5, 32).bfloat16()
    torch.testing.assert_close(Product(weight, bias, options)(x), F.linear(x, weight, bias), atol=0.1, rtol=0.05)
    assert not Product(weight.float(), None, options).is_packed
    assert not Product(weight, None, ProductOptions(prepack=False, kernels=native)).is_packed


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_without_a_sound_packing_operator_the_plain_product_serves(monkeypatch: pytest.MonkeyPatch, fault: str):
    class Operators:
        @staticmethod
        def _reorder_linear_weight(weight, rows):
            if fault == "raises":
                raise RuntimeError("not built with oneDNN")
            return weight

        class _linear_pointwise:
            @staticmethod
            def default(x, weight, bias, *rest):
                return F.linear(x, weight * 1.5, bias)

    monkeypatch.setattr(torch.ops, "mkldnn", Operators)
    weight = torch.randn(16, 8).bfloat16()
    product = Product(weight, None, ProductOptions(prepack=True, kernels=None))
    assert not product.is_packed
    x = torch.randn(3, 8).bfloat16()
    torch.testing.assert_close(product(x), F.linear(x, weight))


def test_bf16_with_packed_weights_agrees_with_generate_at_first(
    open_core: OpenCore, tiny_base: Path, tiny_adapters: list[Path], tiny_prompts, plain_generate
):
    """Rounding may part the ways later; the first token of short prompts is far from a tie here."""
    engine = open_core(dtype="bf16")
    for i in range(6):
        engine.core.add(request(f"r{i}", tiny_prompts[i], params=GREEDY, adapter=ref_of(tiny_adapters[i % 4])))
    engine.run()
    same = sum(
        engine.tokens(f"r{i}")[0] == plain_generate(tiny_base, tiny_prompts[i], 1, tiny_adapters[i % 4])[0]
        for i in range(6)
    )
    assert same >= 5
    assert engine.core.stats().extra["dtype"] == "bfloat16"


def test_lazy_zeros_are_zero_and_aligned():
    made = lazy_zeros(3, 5, 7, dtype=torch.bfloat16, device=CPU)
    assert made.shape == (3, 5, 7) and not made.any() and made.data_ptr() % 64 == 0
