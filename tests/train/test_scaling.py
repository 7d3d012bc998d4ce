import math

import pytest
import torch

from tuneloom.train.scaling import GROW_EVERY, LARGEST, LossScale


class Weight:
    """One number whose gradient is `size`, in fp16 as it comes from a backward pass: beyond its range it is inf."""

    def __init__(self, size: float) -> None:
        self.parameter = torch.nn.Parameter(torch.zeros(1))
        self.size = size
        self.passes = 0

    def backward(self, scale: LossScale, loss: float = 1.0) -> torch.Tensor:
        self.passes += 1
        self.parameter.grad = torch.tensor([self.size * scale.value]).half().float()
        return torch.tensor(loss)


def step(scale: LossScale, weight: Weight, number: int = 1, loss: float = 1.0) -> float:
    scale.step(number, lambda: weight.backward(scale, loss), [weight.parameter])
    assert weight.parameter.grad is not None
    return weight.parameter.grad.item()


def test_what_would_be_nothing_in_fp16_is_kept() -> None:
    assert torch.tensor(1e-9).half() == 0
    assert step(LossScale(is_on=True), Weight(1e-9)) == pytest.approx(1e-9, rel=0.02)


def test_an_overflow_halves_the_scale_and_the_step_is_computed_again() -> None:
    scale, weight = LossScale(is_on=True), Weight(8.0)
    assert step(scale, weight) == 8.0
    assert scale.value == LARGEST / 16 and weight.passes == 5
    step(scale, weight)
    assert weight.passes == 6, "the scale stays"


def test_a_larger_scale_is_tried_again_after_a_while() -> None:
    scale = LossScale(is_on=True)
    step(scale, Weight(8.0))
    step(scale, Weight(1e-3), number=GROW_EVERY)
    assert scale.value == LARGEST / 8


def test_no_scale_helps_a_loss_that_is_no_number() -> None:
    scale, weight = LossScale(is_on=True), Weight(math.nan)
    assert math.isnan(step(scale, weight, loss=math.nan))
    assert weight.passes == 1


def test_nothing_is_scaled_where_it_is_not_needed() -> None:
    scale, weight = LossScale(is_on=False), Weight(1e-9)
    assert step(scale, weight) == 0 and scale.value == 1
