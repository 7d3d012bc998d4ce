"""Draws tokens from distributions: a number between 0 and 1 is looked up in a row's, the best tokens first.

Of equal tokens the one with the lower id comes first. So a number means one token, whatever else is drawn beside it.

Shapes: N rows · V vocabulary · K candidates
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tuneloom.generation import SamplingParams

# Candidates that are looked at, until they decide; then all.
_CANDIDATES = (256, 4096)


def draw_tokens(logits_NV: Tensor, best_N: Tensor, params: Rows[SamplingParams], draws: Rows[float]) -> list[int]:
    """A token of each row's distribution, looked up among more and more candidates."""
    wanted = Wanted.of(logits_NV, best_N, params, draws)
    tokens = [0] * len(draws)
    open_rows = list(range(len(draws)))
    for count in (*_CANDIDATES, logits_NV.shape[-1]):
        found = read_rows(*_look_up(logits_NV, wanted, count))
        for i, (token, _) in zip(open_rows, found, strict=True):
            tokens[i] = token
        undecided = [at for at, (_, is_decided) in enumerate(found) if not is_decided]
        if not undecided:
            break
        open_rows = [open_rows[at] for at in undecided]
        index = torch.tensor(undecided, device=logits_NV.device)
        logits_NV, wanted = logits_NV.index_select(0, index), wanted.select(index)
    return tokens


def best_candidates(logits_NV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best logits of each row in order, equal ones by id; their ids; and which are sure to be complete.

    Of logits that equal the last candidate's there may be more than were taken.
    """
    if count >= logits_NV.shape[-1]:
        values_NK, ids_NK = logits_NV.sort(dim=-1, descending=True, stable=True)
        return values_NK, ids_NK, torch.ones_like(values_NK, dtype=torch.bool)
    ids_NK = logits_NV.topk(count).indices.sort(dim=-1).values
    values_NK, order_NK = logits_NV.gather(-1, ids_NK).sort(dim=-1, descending=True, stable=True)
    return values_NK, ids_NK.gather(-1, order_NK), values_NK > values_NK[:, -1:]


def read_rows(tokens_N: Tensor, is_so_N: Tensor) -> list[tuple[int, bool]]:
    """Tokens and what is so of them, in one transfer from the device."""
    tokens, flags = torch.stack([tokens_N, is_so_N.long()]).tolist()
    return [(token, bool(flag)) for token, flag in zip(tokens, flags, strict=True)]


@dataclass(frozen=True)
class Wanted:
    """What rows ask of their distributions, one column each, and the numbers that they drew.

    `total_N1` is the sum of a row's weights `exp((logit - best) / temperature)`.
    """

    best_N1: Tensor
    total_N1: Tensor
    temperature_N1: Tensor
    top_p_N1: Tensor
    top_k_N1: Tensor
    min_p_N1: Tensor
    draw_N1: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, best_N: Tensor, params: Rows[SamplingParams], draws: Rows[float]) -> "Wanted":
        table = [
            (p.temperature, p.top_p if p.top_p < 1 else float("inf"), p.top_k or logits_NV.shape[-1], p.min_p)
            for p in params
        ]
        columns = torch.tensor(table, dtype=torch.float64, device=logits_NV.device).split(1, -1)
        draws_N = torch.tensor(draws, dtype=torch.float64, device=logits_NV.device)
        best_N1 = best_N[:, None]
        # Not a sum of `exp`, which torch computes slowly where it vanishes.
        share_N1 = (logits_NV / columns[0].float()).softmax(-1).amax(-1, keepdim=True)
        total_N1 = 1 / share_N1.double()
        return cls(best_N1, total_N1, *columns, draws_N[:, None])

    def select(self, index: Tensor) -> "Wanted":
        return Wanted(*(getattr(self, field.name).index_select(0, index) for field in fields(self)))


def _weights(logits_NK: Tensor, best_N1: Tensor, temperature_N1: Tensor) -> Tensor:
    return (logits_NK - best_N1).div_(temperature_N1.float()).exp_()


def _look_up(logits_NV: Tensor, wanted: Wanted, count: int) -> tuple[Tensor, Tensor]:
    """The token of each row's draw among its best `count`, and whether those decide it.

    Candidates come in order of their share, so whatever cuts one cuts all behind it: where some are cut, the kept ones
    are the whole distribution. Where none is, that is known only of a row that asks for no cut.
    """
    vocab_size = logits_NV.shape[-1]
    is_whole = count >= vocab_size
    values_NK, ids_NK, is_known_NK = best_candidates(logits_NV, count)
    p_NK = _weights(values_NK, wanted.best_N1, wanted.temperature_N1).double() / wanted.total_N1
    is_in_top_k_NK = torch.arange(values_NK.shape[-1], device=logits_NV.device) < wanted.top_k_N1
    p_NK.masked_fill_(~(is_known_NK & is_in_top_k_NK), 0)
    before_NK = p_NK.cumsum(-1) - p_NK
    # Of all that top_k leaves, which may be more than the candidates.
    num_known_N1 = is_known_NK.sum(-1, keepdim=True)
    is_top_k_known_N1 = (wanted.top_k_N1 <= num_known_N1) | is_whole
    mass_N1 = torch.where(is_top_k_known_N1, p_NK.sum(-1, keepdim=True), 1.0)
    keep_NK = (before_NK < wanted.top_p_N1 * mass_N1) & (p_NK >= wanted.min_p_N1 * p_NK[:, :1]) & (p_NK > 0)
    keep_NK[:, 0] = True
    is_cut_N1 = (keep_NK.sum(-1, keepdim=True) < num_known_N1) | is_top_k_known_N1
    has_mass_N1 = is_top_k_known_N1 | (wanted.top_k_N1 >= vocab_size) | (wanted.top_p_N1 > 1)
    is_plain_N1 = (wanted.top_p_N1 > 1) & (wanted.top_k_N1 >= vocab_size) & (wanted.min_p_N1 <= 0)
    shares_NK = p_NK.masked_fill(~keep_NK, 0).cumsum(-1)
    kept_N1 = shares_NK[:, -1:]
    target_N1 = wanted.draw_N1 * torch.where(is_cut_N1 & ~is_plain_N1 | is_whole, kept_N1, 1.0)
    place_N1 = (shares_NK <= target_N1).sum(-1, keepdim=True)
    last_N1 = keep_NK.sum(-1, keepdim=True) - 1
    is_decided_N1 = torch.where(is_plain_N1, place_N1 <= last_N1, is_cut_N1 & has_mass_N1) | is_whole
    tokens_N1 = ids_NK.gather(-1, torch.minimum(place_N1, last_N1))
    return tokens_N1.squeeze(-1), is_decided_N1.squeeze(-1)
