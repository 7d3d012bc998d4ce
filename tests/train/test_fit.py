import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuneloom.bases import Base
from tuneloom.domain import Hyperparameters, JobSpec, TrainOptions
from tuneloom.engine.memory import Room
from tuneloom.errors import InvalidRequest
from tuneloom.train.data import Tokens
from tuneloom.train.fit import fit_plan
from tuneloom.train.memory import MEMORY_SHARE, plan_memory
from tuneloom.train.micro import with_micro_size
from tuneloom.train.plan import Plan, change, make_plan


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """A base of 1.2 billion weights by its header; the file of them is a hole."""
    shapes = {"model.embed_tokens.weight": (49152, 2048)}
    for layer in range(24):
        for name, shape in {
            "self_attn.q_proj": (2048, 2048),
            "self_attn.k_proj": (512, 2048),
            "self_attn.v_proj": (512, 2048),
            "self_attn.o_proj": (2048, 2048),
            "mlp.gate_proj": (5632, 2048),
            "mlp.up_proj": (5632, 2048),
            "mlp.down_proj": (2048, 5632),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    header, end = {}, 0
    for name, (out, inner) in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [out, inner], "data_offsets": [end, end + 2 * out * inner]}
        end += 2 * out * inner
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return Base("large", tmp_path, "0", 2048, 49152, end)


def plan_of(base: Base, **options: Any) -> tuple[Plan, TrainOptions]:
    tokens = Tokens(np.zeros(8 * 400, np.int32), np.ones(8 * 400, np.bool_), np.arange(9) * 400)
    chosen = TrainOptions(**{"precision": "fp32", "rank": 4, **options})
    spec = JobSpec(
        base=base.id, training_file="f", seed=1, hyperparameters=Hyperparameters(batch_size=8), options=chosen
    )
    return make_plan(spec, tokens, base, has_bf16=False, use_gpu=True), chosen


def room_for(base: Base, plan: Plan) -> Room:
    """Just enough for `plan`."""
    return Room("the host", int(plan_memory(base, plan).total_bytes / MEMORY_SHARE) + 2)


def reasons(plan: Plan) -> dict[str, str]:
    return {setting.name: setting.reason for setting in plan.settings}


def test_what_fits_stays_as_it_is(base: Base) -> None:
    plan, options = plan_of(base)
    assert fit_plan(plan, options, base, room_for(base, plan)) == plan


def test_fewer_rows_at_once_come_first(base: Base) -> None:
    plan, options = plan_of(base)
    found = fit_plan(plan, options, base, room_for(base, with_micro_size(plan, 4, "")))
    assert (found.micro_size, found.gradient_checkpointing, found.quantization) == (4, False, "none")
    assert {s.name: s.value for s in found.settings}["accumulation_steps"] == 2
    assert reasons(found)["accumulation_steps"].endswith(" are free")


def test_then_activations_are_computed_again(base: Base) -> None:
    plan, options = plan_of(base)
    less = Room("the host", room_for(base, with_micro_size(plan, 1, "")).device_bytes - (1 << 20))
    found = fit_plan(plan, options, base, less)
    assert (found.gradient_checkpointing, found.quantization) == (True, "none")


def test_then_the_base_is_quantised(base: Base) -> None:
    plan, options = plan_of(base)
    smallest = change(with_micro_size(plan, 1, ""), "gradient_checkpointing", True, "")
    less = Room("the host", room_for(base, smallest).device_bytes - (1 << 20))
    found = fit_plan(plan, options, base, less)
    assert found.quantization == "nf4"
    assert reasons(found)["quantization"].startswith("the run needs ")
    with pytest.raises(InvalidRequest, match=r"base 4\.73 GB \(1,182,793,728 weights in fp32\)"):
        fit_plan(*plan_of(base, quantization="none"), base, less)


def test_what_was_asked_for_does_not_give_way(base: Base) -> None:
    plan, options = plan_of(base, quantization="none", accumulation_steps=1)
    again = change(plan, "gradient_checkpointing", True, "")
    room = room_for(base, again)
    assert fit_plan(plan, options, base, room).gradient_checkpointing
    with pytest.raises(InvalidRequest, match="does not fit into the memory of the host"):
        fit_plan(plan, options, base, Room("the host", room.device_bytes - (1 << 20)))


def test_a_restart_keeps_what_was_chosen_when_there_was_less(base: Base) -> None:
    plan, options = plan_of(base)
    before = change(change(plan, "quantization", "nf4", "x"), "gradient_checkpointing", True, "x").settings
    found = fit_plan(plan, options, base, Room("the host", 1 << 40), before)
    assert (found.quantization, found.gradient_checkpointing) == ("nf4", True)
    assert reasons(found)["quantization"] == "as before the restart"
