from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuneloom.bases import Base
from tuneloom.domain import Hyperparameters, JobSpec, TrainOptions
from tuneloom.errors import InvalidRequest
from tuneloom.train.data import Tokens
from tuneloom.train.plan import Plan, make_plan, settings_text
from tuneloom.train.start import Start


def plan(
    rows: int,
    *,
    length: int = 10,
    size_bytes: int = 100,
    options: Any = None,
    start: Start | None = None,
    method: Any = "supervised",
    validation: str | None = None,
    **asked: Any,
) -> Plan:
    tokens = Tokens(np.zeros(rows * length, np.int32), np.ones(rows * length, np.bool_), np.arange(rows + 1) * length)
    spec = JobSpec(
        base="b",
        training_file="file-1",
        validation_file=validation,
        seed=1,
        method=method,
        hyperparameters=Hyperparameters(**asked),
        options=options or TrainOptions(),
    )
    # As the trainer gets it: through the store, which keeps every field.
    spec = JobSpec.model_validate_json(spec.model_dump_json())
    return make_plan(spec, tokens, Base("b", Path("b"), "0", 8192, 512, size_bytes), has_bf16=True, start=start)


def reasons(made: Plan) -> dict[str, str]:
    return {setting.name: setting.reason for setting in made.settings}


@pytest.mark.parametrize(
    ("rows", "epochs", "batch"), [(10, 10, 4), (3, 25, 3), (50, 3, 4), (3_000, 3, 6), (20_000, 1, 40), (90_000, 1, 64)]
)
def test_auto_follows_the_number_of_rows(rows: int, epochs: int, batch: int) -> None:
    made = plan(rows)
    assert (made.n_epochs, made.batch_size) == (epochs, batch)
    assert made.hyperparameters == Hyperparameters(n_epochs=epochs, batch_size=batch, learning_rate_multiplier=1.0)
    assert made.total_steps == epochs * -(-rows // batch)


def test_what_is_asked_is_done() -> None:
    options = TrainOptions(rank=8, alpha=4.0, dropout=0.1, learning_rate=1e-3, precision="fp32", scheduler="cosine")
    made = plan(100, n_epochs=7, batch_size=10, learning_rate_multiplier=0.5, options=options)
    assert (made.n_epochs, made.batch_size, made.learning_rate) == (7, 10, 5e-4)
    assert (made.rank, made.alpha, made.dropout, made.precision) == (8, 4.0, 0.1, "fp32")
    why = reasons(made)
    assert {why[name] for name in ("n_epochs", "batch_size", "rank", "alpha", "dropout", "scheduler")} == {"as asked"}
    assert why["learning_rate"] == "as asked, times 0.5"
    assert why["weight_decay"] == "the default"


def test_every_option_is_told_with_its_value_and_reason() -> None:
    made = plan(40, validation="file-2", options=TrainOptions(early_stopping_patience=2))
    told = {setting.name: setting.value for setting in made.settings}
    # These are told elsewhere: in what they resolve to, with the data, or with the job.
    apart = {"preset", "long_rows", "validation_share", "checkpoint_every_steps", "checkpoint_every_minutes"}
    assert TrainOptions.model_fields.keys() - apart - {"warm_start", "modules_to_save"} <= told.keys()
    assert told["evaluate_every_steps"] == "each epoch" and told["target_modules"] == "all linear layers"
    assert all(setting.reason for setting in made.settings)
    text = settings_text(made.settings)
    assert "n_epochs 3: the default; batch_size 4: 0.2 % of 40 rows, from 4 to 64" in text
    assert "early_stopping_patience 2: as asked" in text and "max_grad_norm" not in text


@pytest.mark.parametrize(("name", "values"), [("quick", (3, 5e-5, 8, 16.0)), ("balanced", (5, 2e-5, 16, 32.0))])
def test_a_preset_gives_what_is_not_set(name: Any, values: tuple[Any, ...]) -> None:
    made = plan(10, options=TrainOptions(preset=name))
    assert (made.n_epochs, made.learning_rate, made.rank, made.alpha) == values
    why = reasons(made)
    assert {why[setting] for setting in ("n_epochs", "learning_rate", "rank", "alpha")} == {f"preset {name}"}

    made = plan(10, n_epochs=2, options=TrainOptions(preset=name, rank=4, learning_rate=1e-3))
    assert (made.n_epochs, made.learning_rate, made.rank, made.alpha) == (2, 1e-3, 4, values[3])
    assert reasons(made)["rank"] == "as asked"
    assert plan(10, learning_rate_multiplier=2.0, options=TrainOptions(preset=name)).learning_rate == 2 * values[1]


def test_a_small_base_learns_by_larger_steps() -> None:
    assert plan(100, size_bytes=1 << 20).learning_rate == 5e-4
    assert plan(100, size_bytes=8 << 30).learning_rate == 2e-4
    assert plan(100, size_bytes=8 << 30, learning_rate_multiplier=2.0).learning_rate == 4e-4


def test_preferences_have_a_beta_and_learn_by_a_tenth() -> None:
    made = plan(100, method="dpo", beta="auto")
    assert (made.beta, made.hyperparameters.beta) == (0.1, 0.1)
    assert made.learning_rate == pytest.approx(plan(100).learning_rate / 10)
    assert plan(100, method="dpo", beta=0.5).beta == 0.5
    assert plan(100).beta is None


def test_a_batch_is_cut_so_that_its_longest_rows_fit() -> None:
    assert plan(100, batch_size=64, length=8).micro_size == 64
    assert plan(100, batch_size=64, length=100).micro_size == 5
    assert plan(100, batch_size=64, length=8000).micro_size == 1
    # A pair is two rows.
    assert plan(100, batch_size=64, length=100, method="dpo").micro_size == 3


def test_a_step_is_as_many_passes_as_asked() -> None:
    made = plan(100, batch_size=8, options=TrainOptions(accumulation_steps=4))
    assert (made.batch_size, made.micro_size, made.accumulation_steps) == (8, 2, 4)
    assert reasons(made)["accumulation_steps"] == "as asked: 2 of the 8 rows of a step at a time"
    assert plan(100, options=TrainOptions(accumulation_steps=3)).batch_size == 6
    assert plan(10, batch_size=64, options=TrainOptions(accumulation_steps=4)).batch_size == 8


@pytest.mark.parametrize(
    ("options", "asked", "param", "text"),
    [
        ({"accumulation_steps": 4}, {"batch_size": 6}, "accumulation_steps", "Use one of 1, 2, 3, 6."),
        ({"accumulation_steps": 40}, {}, "accumulation_steps", "there are 20 rows"),
        ({"warmup_steps": 60}, {"n_epochs": 1}, "warmup_steps", "the run has 5 steps"),
        ({"early_stopping_patience": 1}, {}, "early_stopping_patience", "`validation_file` or a `validation_share`"),
        ({"evaluate_every_steps": 1}, {}, "evaluate_every_steps", "`validation_file` or a `validation_share`"),
        ({"early_stopping_min_delta": 0.1}, {}, "early_stopping_min_delta", "`early_stopping_patience`"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(
    options: dict[str, Any], asked: dict[str, Any], param: str, text: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(20, options=TrainOptions(**options), **asked)
    assert caught.value.param == f"tuneloom.{param}" and text in caught.value.message


def test_a_validation_share_beside_a_validation_file_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"`tuneloom\.validation_share` does not go with `validation_file`"):
        plan(20, validation="file-2", options=TrainOptions(validation_share=0.1))


START = Start(Path("a"), 8, 12.0, True, ("q_proj", "up_proj"))


def test_a_warm_start_has_the_shape_of_its_adapter() -> None:
    options = TrainOptions(warm_start="mine@v1", preset="quick", target_modules=("up_proj", "q_proj"), rank=8)
    made = plan(20, options=options, start=START)
    assert (made.rank, made.alpha, made.rslora, made.target_modules) == (8, 12.0, True, ("q_proj", "up_proj"))
    assert made.learning_rate == 5e-5
    assert reasons(made)["alpha"] == "that of mine@v1"


@pytest.mark.parametrize("asked", [{"rank": 16}, {"alpha": 16}, {"target_modules": ("q_proj",)}])
def test_a_warm_start_cannot_have_another_shape(asked: dict[str, Any]) -> None:
    (name,) = asked
    with pytest.raises(InvalidRequest, match=f"`{name}` is .*, and the adapter of `warm_start` has ") as caught:
        plan(20, options=TrainOptions(warm_start="mine@v1", **asked), start=START)
    assert caught.value.param == f"tuneloom.{name}"


def test_a_run_checkpoints_and_evaluates_when_asked() -> None:
    options = TrainOptions(checkpoint_every_steps=5, checkpoint_every_minutes=1.5, evaluate_every_steps=3)
    made = plan(20, validation="file-2", options=options)
    assert (made.checkpoint_every_steps, made.checkpoint_every_s, made.evaluate_every_steps) == (5, 90.0, 3)
    assert plan(20).checkpoint_every_s is None


def test_rows_are_packed_unless_asked_otherwise() -> None:
    assert plan(20).packing
    assert not plan(20, options=TrainOptions(packing=False)).packing
