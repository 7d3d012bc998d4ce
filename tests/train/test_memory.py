import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tuneloom.bases import Base
from tuneloom.domain import Hyperparameters, JobSpec, TrainOptions
from tuneloom.engine.memory import Room
from tuneloom.errors import InvalidRequest
from tuneloom.train.data import Tokens
from tuneloom.train.memory import check_fits, free_room, gigabytes, plan_memory
from tuneloom.train.plan import Plan, make_plan

ROWS, LENGTH = 8, 40


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return Base("tiny/llama", tiny_base, "0", 512, 512, 1 << 20)


def plan_of(base: Base, *, length: int = LENGTH, **options: Any) -> Plan:
    tokens = Tokens(np.zeros(ROWS * length, np.int32), np.ones(ROWS * length, np.bool_), np.arange(ROWS + 1) * length)
    spec = JobSpec(
        base=base.id,
        training_file="file-1",
        seed=1,
        hyperparameters=Hyperparameters(batch_size=8),
        options=TrainOptions(**{"precision": "fp32", **options}),
    )
    return make_plan(spec, tokens, base, has_bf16=False)


def parts(base: Base, plan: Plan) -> dict[str, int]:
    return {item.name: item.size_bytes for item in plan_memory(base, plan).items}


def test_weights_and_adapter_are_counted_exactly(base: Base) -> None:
    from tuneloom.train import models

    for precision in ("fp32", "bf16"):
        plan = plan_of(base, precision=precision, rank=4, target_modules=("q_proj", "down_proj"))
        model = models.add_lora(models.load_base(base, plan), plan)
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        found = parts(base, plan)
        assert found["base"] == frozen
        # The weights themselves, gradients, and two moments.
        assert found["adapter"] == 4 * trained


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.516), ("int8", 1.0)])
def test_linear_layers_are_counted_as_they_are_quantised(base: Base, kind: str, share: float) -> None:
    from tuneloom.train import models

    plan = plan_of(base, quantization=kind)
    model = models.load_base(base, plan)
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    plain = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32) * 4
    assert parts(base, plan)["base"] == pytest.approx(linear * share + plain + 64 * 128 * 4, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_a_forward_pass_of_peft_keeps(base: Base, precision: str) -> None:
    from tuneloom.train import models

    plan = plan_of(base, precision=precision, rank=4)
    model = models.add_lora(models.load_base(base, plan), plan).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.full((plan.micro_size, LENGTH), 5)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        states = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
    assert states.requires_grad
    planned = parts(base, plan)["activations"]
    # One layer's gradients come on top, of two layers here.
    assert 0.9 * planned < sum(kept.values()) * 1.5 < 1.2 * planned


def test_less_is_planned_for_fewer_tokens_at_once_and_for_activations_computed_again(base: Base) -> None:
    plan = plan_of(base)
    whole = parts(base, plan)
    half = parts(base, replace(plan, micro_size=plan.micro_size // 2))
    assert half["activations"] == pytest.approx(whole["activations"] / 2, rel=0.01)
    assert (half["base"], half["adapter"]) == (whole["base"], whole["adapter"])
    deep = replace(plan_of(base), gradient_checkpointing=True)
    assert parts(base, deep)["activations"] > 0
    assert parts(base, plan_of(base, dropout=0.1))["activations"] > whole["activations"]


def test_what_does_not_fit_is_refused_with_a_true_sum(base: Base) -> None:
    plan = plan_of(base)
    memory = plan_memory(base, plan)
    check_fits(base, plan, Room("the host", memory.total_bytes * 2))
    with pytest.raises(InvalidRequest) as caught:
        check_fits(base, plan, Room("the host", memory.total_bytes))
    text = caught.value.message
    assert caught.value.code == "out_of_memory"
    assert f"= {gigabytes(memory.total_bytes)}, and there are {gigabytes(int(memory.total_bytes * 0.9))}" in text
    assert all(f"{item.name} {gigabytes(item.size_bytes)}" in text for item in memory.items)


def test_a_job_may_have_no_more_than_its_limit() -> None:
    assert free_room(use_gpu=False, limit_bytes=1000) == Room("a job", 1000)
    assert free_room(use_gpu=False, limit_bytes=None).device_bytes > 1 << 20


def test_a_base_is_read_by_its_headers_alone(base: Base, tmp_path: Path) -> None:
    """Without config.json and without a whole file of weights: only the shapes count."""
    (tmp_path / "config.json").write_text(json.dumps({}))
    (tmp_path / "model.safetensors").symlink_to(base.path / "model.safetensors")
    other = replace(base, path=tmp_path)
    assert plan_memory(other, plan_of(other)) == plan_memory(base, plan_of(base))
