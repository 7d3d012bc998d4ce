"""Loss scaling for gradients in fp16, on any device: a step whose gradients overflow is computed again, not skipped."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

LARGEST = 2.0**16
# After so many steps a larger scale is tried again.
GROW_EVERY = 100


class LossScale:
    """What the loss of a step is multiplied by before its backward pass, so that small gradients are numbers in fp16.

    Powers of two, which are exact to divide out again; `value` is 1 where nothing is scaled.
    """

    def __init__(self, is_on: bool) -> None:
        self.value = LARGEST if is_on else 1.0
        self._is_on = is_on

    def step(self, number: int, backward: Callable[[], Tensor], parameters: Iterable[torch.nn.Parameter]) -> Tensor:
        """Run `backward`, which returns the loss of step `number`, until all gradients are numbers; divide them.

        A loss that is itself no number ends this at once: no scale helps.
        """
        if not self._is_on:
            return backward()
        if number and number % GROW_EVERY == 0:
            self.value = min(LARGEST, 2 * self.value)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        loss = backward()
        while self.value > 1 and math.isfinite(loss.item()) and not _are_finite(trained):
            self.value /= 2
            for parameter in trained:
                parameter.grad = None
            loss = backward()
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        torch._foreach_div_(gradients, self.value)
        return loss


def _are_finite(parameters: Iterable[torch.nn.Parameter]) -> bool:
    sums = [parameter.grad.sum() for parameter in parameters if parameter.grad is not None]
    return bool(torch.stack(sums).isfinite().all()) if sums else True
