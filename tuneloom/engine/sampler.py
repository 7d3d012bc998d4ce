"""Chooses tokens from logits, row by row as each request asks. Nothing of one row depends on another.

A row draws one number from its own generator and looks it up in its own distribution, best tokens first. So the best
few hundred logits decide nearly always; the rest of the vocabulary is looked at only when the number falls there.

Shapes: N rows · V vocabulary · K candidates
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tuneloom.engine.base import TokenOutput
from tuneloom.generation import SamplingParams

# Candidates that are looked at first.
_CANDIDATES = 256


class SampledRow(Protocol):
    """What the sampler reads of a sequence."""

    params: SamplingParams
    sampling: "SamplingState"


@dataclass
class SamplingState:
    """What a sequence carries from token to token: its random numbers, and what it has seen if penalties ask.

    `counts_V` counts generated tokens; `seen_V` marks those of prompt and answer; `bias_V` is added to the logits.
    """

    generator: torch.Generator
    counts_V: Tensor | None = None
    seen_V: Tensor | None = None
    bias_V: Tensor | None = None
    is_adjusted: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_adjusted = not (self.counts_V is None and self.seen_V is None and self.bias_V is None)

    @classmethod
    def create(
        cls, params: SamplingParams, prompt_ids: Rows[int], vocab_size: int, device: torch.device
    ) -> "SamplingState":
        generator = torch.Generator()
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed % (1 << 63))
        counts = seen = bias = None
        if params.presence_penalty or params.frequency_penalty:
            counts = torch.zeros(vocab_size, device=device)
        if params.repetition_penalty != 1:
            seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            seen[torch.tensor(prompt_ids, device=device)] = True
        if params.logit_bias:
            bias = torch.zeros(vocab_size, device=device)
            bias[torch.tensor(list(params.logit_bias), device=device)] = torch.tensor(
                list(params.logit_bias.values()), dtype=torch.float32, device=device
            )
        return cls(generator, counts, seen, bias)

    def record(self, token_id: int) -> None:
        if self.counts_V is not None:
            self.counts_V[token_id] += 1
        if self.seen_V is not None:
            self.seen_V[token_id] = True

    def adjust(self, logits_V: Tensor, params: SamplingParams) -> Tensor:
        """Logits after penalties and bias.

        Source: repetition as in CTRL (Keskar et al. 2019, section 4.1); presence and frequency as in OpenAI's API.
        """
        if self.seen_V is not None:
            penalty = params.repetition_penalty
            penalised = torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty)
            logits_V = torch.where(self.seen_V, penalised, logits_V)
        if self.counts_V is not None:
            logits_V = logits_V - params.frequency_penalty * self.counts_V
            logits_V = logits_V - params.presence_penalty * (self.counts_V > 0)
        return logits_V if self.bias_V is None else logits_V + self.bias_V


def sample(logits_NV: Tensor, rows: Rows[SampledRow]) -> list[TokenOutput | None]:
    """One token for each row; None for a row whose logits are not numbers.

    Log-probabilities are those of the raw logits, before penalties, bias and temperature.
    """
    raw_NV = logits_NV.float()
    adjusted_NV = _adjust(raw_NV, rows)
    best_N, chosen_N = adjusted_NV.max(-1)
    is_sound_N = torch.isfinite(best_N)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    is_beyond_N = torch.zeros_like(is_sound_N)
    draws: list[float] = []
    if drawn:
        draws = [float(torch.rand((), generator=rows[i].sampling.generator)) for i in drawn]
        index = torch.tensor(drawn, device=raw_NV.device)
        tokens, is_beyond = _draw(adjusted_NV.index_select(0, index), [rows[i].params for i in drawn], draws)
        chosen_N = chosen_N.index_copy(0, index, tokens)
        is_beyond_N = is_beyond_N.index_copy(0, index, is_beyond)
    # The one transfer from the device.
    table = torch.stack([chosen_N, is_sound_N.long(), is_beyond_N.long()], -1).tolist()
    tokens_out = [token for token, _, _ in table]
    for i, draw in zip(drawn, draws, strict=True):
        if table[i][1] and table[i][2]:
            tokens_out[i] = _draw_beyond(adjusted_NV[i], rows[i].params, draw)
    outputs: list[TokenOutput | None] = [
        TokenOutput(token) if is_sound else None for token, (_, is_sound, _) in zip(tokens_out, table, strict=True)
    ]
    _add_logprobs(outputs, raw_NV, rows)
    return outputs


def _adjust(raw_NV: Tensor, rows: Rows[SampledRow]) -> Tensor:
    adjusted = [i for i, row in enumerate(rows) if row.sampling.is_adjusted]
    if not adjusted:
        return raw_NV
    index = torch.tensor(adjusted, device=raw_NV.device)
    changed = torch.stack([rows[i].sampling.adjust(raw_NV[i], rows[i].params) for i in adjusted])
    return raw_NV.index_copy(0, index, changed)


def _draw(logits_NV: Tensor, params: list[SamplingParams], draws: list[float]) -> tuple[Tensor, Tensor]:
    """Tokens looked up among the best candidates, and for which rows that was not enough."""
    device, vocab_size = logits_NV.device, logits_NV.shape[-1]
    count = min(_CANDIDATES, vocab_size)
    table = torch.tensor(
        [[p.temperature, p.top_p, p.top_k or vocab_size, p.min_p, u] for p, u in zip(params, draws, strict=True)],
        device=device,
    )
    temperature_N1, top_p_N1, top_k_N1, min_p_N1, draw_N1 = table.split(1, -1)
    # float64 sums: with 1e5 candidates float32 would round away the tail.
    values_NK, ids_NK = logits_NV.topk(count, sorted=True)
    best_N1 = values_NK[:, :1]
    total_N1 = ((logits_NV - best_N1) / temperature_N1).exp().sum(-1, keepdim=True, dtype=torch.float64)
    p_NK = ((values_NK - best_N1) / temperature_N1).exp().double() / total_N1
    p_NK = p_NK.masked_fill(torch.arange(count, device=device)[None] >= top_k_N1, 0)
    in_top_k_N1 = torch.where(top_k_N1 <= count, p_NK.sum(-1, keepdim=True), 1.0)
    before_NK = p_NK.cumsum(-1) - p_NK
    is_cut_N1 = (top_k_N1 <= count) | (before_NK[:, -1:] + p_NK[:, -1:] >= top_p_N1 * in_top_k_N1)
    keep_NK = (before_NK < top_p_N1 * in_top_k_N1) & (p_NK >= min_p_N1 * p_NK[:, :1])
    keep_NK[:, 0] = True
    # Candidates come in order, so once one is dropped by its share, all later ones are.
    is_cut_N1 = is_cut_N1 | (p_NK[:, -1:] < min_p_N1 * p_NK[:, :1])
    if count == vocab_size:
        is_cut_N1 = torch.ones_like(is_cut_N1)
    cumulative_NK = p_NK.masked_fill(~keep_NK, 0).cumsum(-1)
    kept_N1 = cumulative_NK[:, -1:]
    # Without a cut all of the distribution counts, so the draw stays as it is; `_draw_beyond` serves the rest. That
    # holds for top_p 1 and no top_k or min_p; other rows that need more candidates are looked up anew.
    is_open_N1 = ~is_cut_N1
    is_plain_N1 = (top_p_N1 >= 1) & (top_k_N1 >= vocab_size) & (min_p_N1 <= 0)
    target_N1 = draw_N1 * torch.where(is_open_N1, 1.0, kept_N1)
    place_N1 = (cumulative_NK <= target_N1).sum(-1, keepdim=True)
    last_N1 = keep_NK.long().sum(-1, keepdim=True) - 1
    is_beyond_N1 = is_open_N1 & (~is_plain_N1 | (place_N1 >= count))
    tokens_N1 = ids_NK.gather(-1, torch.minimum(place_N1, last_N1))
    return tokens_N1.squeeze(-1), is_beyond_N1.squeeze(-1)


def _draw_beyond(logits_V: Tensor, params: SamplingParams, draw: float) -> int:
    """Look up a draw that the best candidates do not decide; the candidates come first here too."""
    is_plain = params.top_p >= 1 and not params.top_k and params.min_p <= 0
    if is_plain:
        ids_V = torch.arange(logits_V.shape[0], device=logits_V.device)
        p_V = (logits_V / params.temperature).double().softmax(-1)
        best_K = logits_V.topk(_CANDIDATES).indices
        # The candidates' sum was rounded otherwise where the draw was compared with it.
        draw = max(0.0, draw - float(p_V[best_K].sum()))
        p_V[best_K] = 0
    else:
        logits_V, ids_V = logits_V.sort(descending=True, stable=True)
        p_V = (logits_V / params.temperature).double().softmax(-1)
        if params.top_k:
            p_V[params.top_k :] = 0
        before_V = p_V.cumsum(-1) - p_V
        p_V[(before_V >= params.top_p * p_V.sum()) | (p_V < params.min_p * p_V[0])] = 0
        draw *= float(p_V.sum())
    place = torch.searchsorted(p_V.cumsum(-1), draw, right=True)
    return int(ids_V[torch.minimum(place, p_V.nonzero()[-1, 0])])


def _add_logprobs(outputs: list[TokenOutput | None], raw_NV: Tensor, rows: Rows[SampledRow]) -> None:
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and outputs[i] is not None]
    if not asked:
        return
    tokens = torch.tensor([outputs[i].token_id for i in asked], device=raw_NV.device)
    logits_NV = raw_NV.index_select(0, torch.tensor(asked, device=raw_NV.device))
    total_N1 = logits_NV.logsumexp(-1, keepdim=True)
    chosen = (logits_NV.gather(-1, tokens[:, None]) - total_N1).squeeze(-1).tolist()
    most = max(rows[i].params.logprobs or 0 for i in asked)
    top_values: list[list[float]] = [[] for _ in asked]
    top_ids: list[list[int]] = [[] for _ in asked]
    if most:
        values, ids = logits_NV.topk(most)
        top_values, top_ids = (values - total_N1).tolist(), ids.tolist()
    for at, i in enumerate(asked):
        wanted = rows[i].params.logprobs or 0
        top = tuple(zip(top_ids[at][:wanted], top_values[at][:wanted], strict=True))
        outputs[i] = TokenOutput(outputs[i].token_id, chosen[at], top)
