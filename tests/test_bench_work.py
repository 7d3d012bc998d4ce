"""The ceilings beside W, and where the time of a step goes."""

from pathlib import Path

import pytest
import torch

from bench.anatomy import ADAPTERS, ATTENTION, PRODUCTS, REST, Anatomy
from bench.inputs import Work
from bench.work import Shape, least_s, work_flops
from tests.engine.conftest import OpenCore, ref_of, request
from tests.engine.conftest import open_core as open_core
from tuneloom.engine.core import EngineCore


def test_a_shape_counts_what_the_base_has(tiny_base: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    shape = Shape.of(tiny_base)
    assert shape.body == sum(m.weight.numel() for m in linears)
    assert shape.head == model.get_output_embeddings().weight.numel()
    assert shape.adapter == 16 * sum(m.in_features + m.out_features for m in linears)


def test_the_least_time_is_that_of_multiplications_or_that_of_memory(tiny_base: Path):
    work, shape = Work(requests=4, prompt=8, new=16), Shape.of(tiny_base)
    by_flops = least_s(shape, work, num_adapters=0, item=2, gflops=1.0, gb_per_s=1e9)
    assert by_flops == pytest.approx(work_flops(tiny_base, work) / 1e9, rel=0.05)
    by_bytes = least_s(shape, work, num_adapters=0, item=2, gflops=1e9, gb_per_s=1.0)
    # One step for the prompts and one for each further token read all weights; keys and values are some more.
    assert 16 * 2 * (shape.body + shape.head) / 1e9 < by_bytes < 1.2 * 16 * 2 * (shape.body + shape.head) / 1e9
    with_adapters = least_s(shape, work, num_adapters=8, item=2, gflops=1e9, gb_per_s=1.0)
    assert with_adapters - by_bytes == pytest.approx(16 * 2 * 8 * shape.adapter / 1e9)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_parts_of_a_step_are_told_apart(open_core: OpenCore, tiny_adapters: list[Path], dtype: str):
    engine = open_core(dtype=dtype)
    plain_step = EngineCore.step
    for i in range(3):
        engine.core.add(request(f"r{i}", [5 + i, 6, 7], adapter=ref_of(tiny_adapters[i])))
    ticks = iter(range(1 << 30))
    anatomy = Anatomy(lambda: float(next(ticks)))
    with anatomy.watching():
        engine.run()
    parts = anatomy.decode()
    # By a clock that ticks with each look at it: two layers of four products and the head, two of attention.
    assert parts[PRODUCTS] == 9000 and parts[ADAPTERS] == 8000 and parts[ATTENTION] == 2000 and parts[REST] > 0
    assert max(step.rows for step in anatomy.steps) == 3 and EngineCore.step is plain_step
