from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuneloom.bases import Base
from tuneloom.domain import Hyperparameters, JobSpec, TrainOptions
from tuneloom.train.data import Tokens
from tuneloom.train.plan import Plan, make_plan


def plan(rows: int, *, length: int = 10, size_bytes: int = 100, options: Any = None, **asked: Any) -> Plan:
    tokens = Tokens(np.zeros(rows * length, np.int32), np.ones(rows * length, np.bool_), np.arange(rows + 1) * length)
    spec = JobSpec(
        base="b",
        training_file="file-1",
        seed=1,
        hyperparameters=Hyperparameters(**asked),
        options=options or TrainOptions(),
    )
    return make_plan(spec, tokens, Base("b", Path("b"), "0", 8192, 512, size_bytes), has_bf16=True)


@pytest.mark.parametrize(
    ("rows", "epochs", "batch"), [(10, 10, 4), (3, 25, 3), (50, 3, 4), (3_000, 3, 6), (20_000, 1, 40), (90_000, 1, 64)]
)
def test_auto_follows_the_number_of_rows(rows: int, epochs: int, batch: int) -> None:
    made = plan(rows)
    assert (made.n_epochs, made.batch_size) == (epochs, batch)
    assert made.hyperparameters == Hyperparameters(n_epochs=epochs, batch_size=batch, learning_rate_multiplier=1.0)
    assert made.total_steps == epochs * -(-rows // batch)


def test_what_is_asked_is_done() -> None:
    options = TrainOptions(rank=8, alpha=4.0, dropout=0.1, learning_rate=1e-3, precision="fp32")
    made = plan(100, n_epochs=7, batch_size=10, learning_rate_multiplier=0.5, options=options)
    assert (made.n_epochs, made.batch_size, made.learning_rate) == (7, 10, 5e-4)
    assert (made.rank, made.alpha, made.dropout, made.precision) == (8, 4.0, 0.1, "fp32")


def test_a_small_base_learns_by_larger_steps() -> None:
    assert plan(100, size_bytes=1 << 20).learning_rate == 5e-4
    assert plan(100, size_bytes=8 << 30).learning_rate == 2e-4
    assert plan(100, size_bytes=8 << 30, learning_rate_multiplier=2.0).learning_rate == 4e-4


def test_a_batch_is_cut_so_that_its_longest_rows_fit() -> None:
    assert plan(100, batch_size=64, length=10).micro_size == 64
    assert plan(100, batch_size=64, length=1000).micro_size == 4
    assert plan(100, batch_size=64, length=8000).micro_size == 1
