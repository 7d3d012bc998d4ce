import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tuneloom.train import attention
from tuneloom.train.attention import Group, attend, groups_of


def plain(q: Tensor, k: Tensor, v: Tensor, borders: list[int], window: int | None) -> Tensor:
    """One product over all tokens, in fp64, with a mask that says who sees whom."""
    row = torch.bucketize(torch.arange(len(q)), torch.tensor(borders[1:]), right=True)
    behind = torch.arange(len(q))[:, None] - torch.arange(len(q))[None, :]
    mask = (row[:, None] == row[None, :]) & (behind >= 0) & (behind < (window or len(q)))
    heads = [x.double().transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads, mask, scale=0.3).transpose(0, 1)


@pytest.mark.parametrize(
    ("borders", "block", "window"),
    [
        ([0, 5, 10, 12, 13], 256, None),
        ([0, 11, 22, 25], 4, None),
        ([0, 40], 7, None),
        ([0, 9, 18, 20], 256, 4),
        ([0, 3, 6], 256, 4),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_rows_and_their_gradients_are_as_if_each_were_alone(
    borders: list[int],
    block: int,
    window: int | None,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 16), (2, 16), (2, 16))
    inputs = [torch.randn(borders[-1], *shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    weight = torch.randn(borders[-1], 6, 16, generator=generator)

    def run(output: Tensor) -> list[Tensor]:
        return [output, *torch.autograd.grad((output * weight.to(output.dtype)).sum(), inputs)]

    ours = run(attend(*inputs, groups_of(borders), scale=0.3, window=window))
    for mine, expected in zip(ours, run(plain(*inputs, borders, window)), strict=True):
        torch.testing.assert_close(mine.double(), expected.double(), atol=tolerance, rtol=tolerance)


def test_neighbours_of_one_length_are_computed_together() -> None:
    assert groups_of([0, 4, 8, 9, 13]) == [Group(0, 2, 4), Group(8, 1, 1), Group(9, 1, 4)]


def test_heads_that_stand_apart_in_memory_are_read_right() -> None:
    """As transformers hands them over: (1, H, T, D) seen as (T, H, D)."""
    x = torch.randn(3, 4, 10, 8, generator=torch.Generator().manual_seed(1))
    views = [each.transpose(0, 1) for each in x]
    copies = [each.contiguous() for each in views]
    groups = groups_of([0, 4, 10])
    assert torch.equal(attend(*views, groups, scale=1.0), attend(*copies, groups, scale=1.0))
