"""Chooses tokens from logits, row by row as each request asks. Nothing of one row depends on another.

Greedy rows cost one look at their logits; only rows that draw, or change their logits, are copied.

Shapes: N rows · V vocabulary · K candidates or a block · B blocks · E entries of all rows
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tuneloom.engine.base import TokenOutput
from tuneloom.engine.draw import best_candidates, draw_tokens, read_rows
from tuneloom.engine.matcher import Matcher
from tuneloom.errors import TuneloomError
from tuneloom.generation import SamplingParams

# Below this only the best token counts, which float32 would not tell apart from its neighbours.
_LEAST_TEMPERATURE = 1e-4
_MAX_LOGPROBS = 20
# torch finds the place of a maximum slowly and the maximum itself fast: first by blocks, then within one.
_BLOCK = 256
# Logits that are worked on at once on a CPU: their float32 copies stay in its cache, and need no new pages each time.
_PART = 1 << 19


class SampledRow(Protocol):
    """What the sampler reads of a sequence."""

    params: SamplingParams
    sampling: "SamplingState"


class SamplingState:
    """What a sequence carries from token to token: its random numbers, what it has seen, where its grammar stands.

    Survives preemption: nothing here depends on the cache or on slots.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Rows[int], matcher: Matcher | None = None) -> None:
        self.matcher = matcher
        # Not torch's generator, to which seeds that agree in 32 bits are one.
        self._generator = np.random.default_rng(None if params.seed is None else params.seed % (1 << 64))
        has_penalty = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)
        self.counts = _Counts(prompt_ids if params.repetition_penalty != 1 else ()) if has_penalty else None
        self.bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self.bias_values = np.fromiter(params.logit_bias.values(), np.float32)

    @property
    def is_adjusted(self) -> bool:
        """Whether a row's logits are changed before a token is chosen."""
        return self.counts is not None or bool(self.bias_ids.size) or self.matcher is not None

    @property
    def is_ready(self) -> bool:
        """Whether its grammar, if it has one, is compiled. Raises InvalidRequest if that is none."""
        return self.matcher is None or self.matcher.is_ready

    @property
    def is_complete(self) -> bool:
        """Whether the grammar ends the answer here."""
        return self.matcher is not None and self.matcher.is_complete

    def draw(self) -> float:
        return self._generator.random()

    def record(self, token_id: int) -> None:
        """Take note of a token of the answer."""
        if self.counts is not None:
            self.counts.add(token_id)
        if self.matcher is not None:
            self.matcher.advance(token_id)


class _Counts:
    """How often each token has come in an answer; tokens of the prompt count 0."""

    def __init__(self, prompt_ids: Rows[int]) -> None:
        self._place = {id: place for place, id in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.fromiter(self._place, np.int64)
        self._counts = np.zeros(len(self._ids), np.float32)

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: len(self._place)]

    def add(self, token_id: int) -> None:
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            room = max(64, len(self._ids))
            self._ids = np.concatenate([self._ids, np.zeros(room, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, np.float32)])
        self._ids[place] = token_id
        self._counts[place] += 1


@dataclass(frozen=True)
class _Entries:
    """Single logits of several rows, with what the rows' parameters say for each."""

    rows_E: Tensor
    ids_E: Tensor

    @classmethod
    def of(cls, ids: list[np.ndarray], device: torch.device) -> "_Entries":
        rows = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
        return cls(torch.from_numpy(rows).to(device), torch.from_numpy(np.concatenate(ids)).to(device))

    def spread(self, per_row: list[float]) -> Tensor:
        return torch.tensor(per_row, device=self.rows_E.device)[self.rows_E]


@torch.inference_mode()
def sample(logits_NV: Tensor, rows: Rows[SampledRow]) -> list[TokenOutput | TuneloomError]:
    """One token for each row; an error for a row whose logits are not numbers or whose grammar fails.

    Log-probabilities are those of the raw logits, before penalties, bias, grammar and temperature.
    """
    best_N, chosen_N = best_tokens(logits_NV)
    found: dict[int, int | TuneloomError] = {}
    changed = [i for i, row in enumerate(rows) if row.sampling.is_adjusted or _is_drawn(row)]
    for part in _parts(changed, logits_NV):
        part_NV = logits_NV.index_select(0, torch.tensor(part, device=logits_NV.device)).float()
        found |= zip(part, _choose(part_NV, [rows[i] for i in part]), strict=True)
    outputs: list[TokenOutput | TuneloomError] = []
    for i, (token, is_sound) in enumerate(read_rows(chosen_N, torch.isfinite(best_N))):
        if not is_sound:
            message = "The model gave no finite scores for this prompt. The adapter or the base may be damaged."
            outputs.append(TuneloomError(message, code="model_error"))
        else:
            chosen = found.get(i, token)
            outputs.append(chosen if isinstance(chosen, TuneloomError) else TokenOutput(chosen))
    _add_logprobs(outputs, logits_NV, rows)
    return outputs


def best_tokens(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, NaN if the row has one, and its first place."""
    if logits_NV.device.type != "cpu" or logits_NV.shape[-1] % _BLOCK or not logits_NV.is_contiguous():
        return logits_NV.max(-1)
    found = [_best_by_blocks(part_NV) for part_NV in logits_NV.split(_part_size(logits_NV))]
    best, place = zip(*found, strict=True)
    return torch.cat(best), torch.cat(place)


def _best_by_blocks(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    blocks_NBK = logits_NV.float().view(len(logits_NV), -1, _BLOCK)
    best_N, block_N = blocks_NBK.amax(-1).max(-1)
    place_N = blocks_NBK[torch.arange(len(logits_NV)), block_N].max(-1).indices
    return best_N, block_N * _BLOCK + place_N


def _part_size(logits_NV: Tensor) -> int:
    """How many rows to work on at once."""
    return max(1, _PART // logits_NV.shape[-1]) if logits_NV.device.type == "cpu" else len(logits_NV)


def _parts(rows: list[int], logits_NV: Tensor) -> list[list[int]]:
    size = _part_size(logits_NV)
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _is_drawn(row: SampledRow) -> bool:
    return row.params.temperature >= _LEAST_TEMPERATURE


def _choose(logits_NV: Tensor, rows: Rows[SampledRow]) -> list[int | TuneloomError]:
    """The best token of greedy rows and a drawn one of the others, after adjusting `logits_NV` in place."""
    errors = _adjust(logits_NV, rows)
    best_N, chosen_N = best_tokens(logits_NV)
    tokens: list[int | TuneloomError] = []
    for i, (token, is_sound) in enumerate(read_rows(chosen_N, torch.isfinite(best_N))):
        impossible = TuneloomError("The model allows no token that this answer may contain.", code="model_error")
        tokens.append(errors.get(i) or (token if is_sound else impossible))
    drawn = [i for i, row in enumerate(rows) if _is_drawn(row) and isinstance(tokens[i], int)]
    if drawn:
        index = torch.tensor(drawn, device=logits_NV.device)
        params, draws = [rows[i].params for i in drawn], [rows[i].sampling.draw() for i in drawn]
        chosen = draw_tokens(logits_NV.index_select(0, index), best_N.index_select(0, index), params, draws)
        for i, token in zip(drawn, chosen, strict=True):
            tokens[i] = token
    return tokens


def _adjust(logits_NV: Tensor, rows: Rows[SampledRow]) -> dict[int, TuneloomError]:
    """Apply penalties, bias and grammars in place; the rows whose grammar fails, with the reason."""
    _penalise(logits_NV, rows)
    biased = [row.sampling.bias_ids for row in rows]
    if any(each.size for each in biased):
        entries = _Entries.of(biased, logits_NV.device)
        values = torch.from_numpy(np.concatenate([row.sampling.bias_values for row in rows])).to(logits_NV.device)
        logits_NV.index_put_((entries.rows_E, entries.ids_E), values, accumulate=True)
    errors = {}
    for i, row in enumerate(rows):
        if row.sampling.matcher is not None:
            try:
                forbidden_V = torch.from_numpy(row.sampling.matcher.forbidden_V()).to(logits_NV.device)
                logits_NV[i].masked_fill_(forbidden_V, float("-inf"))
            except TuneloomError as error:
                errors[i] = error
    return errors


def _penalise(logits_NV: Tensor, rows: Rows[SampledRow]) -> None:
    """Lower the logits of tokens that were seen, in place.

    Source: repetition as in CTRL (Keskar et al. 2019, section 4.1); presence and frequency as in OpenAI's API.
    """
    empty = np.empty(0, np.int64)
    seen = [empty if row.sampling.counts is None else row.sampling.counts.ids for row in rows]
    if not any(each.size for each in seen):
        return
    entries = _Entries.of(seen, logits_NV.device)
    counts = [row.sampling.counts.counts for row in rows if row.sampling.counts is not None]
    counts_E = torch.from_numpy(np.concatenate(counts)).to(logits_NV.device)
    repetition_E = entries.spread([row.params.repetition_penalty for row in rows])
    logits_E = logits_NV[entries.rows_E, entries.ids_E]
    logits_E = torch.where(logits_E < 0, logits_E * repetition_E, logits_E / repetition_E)
    logits_E -= entries.spread([row.params.frequency_penalty for row in rows]) * counts_E
    logits_E -= entries.spread([row.params.presence_penalty for row in rows]) * (counts_E > 0)
    logits_NV[entries.rows_E, entries.ids_E] = logits_E


def _add_logprobs(outputs: list[TokenOutput | TuneloomError], logits_NV: Tensor, rows: Rows[SampledRow]) -> None:
    asked = [i for i, output in enumerate(outputs) if rows[i].params.logprobs is not None]
    for part in _parts([i for i in asked if isinstance(outputs[i], TokenOutput)], logits_NV):
        part_NV = logits_NV.index_select(0, torch.tensor(part, device=logits_NV.device)).float()
        wanted = [rows[i].params.logprobs or 0 for i in part]
        chosen = [output for i in part if isinstance(output := outputs[i], TokenOutput)]
        for i, output in zip(part, _with_logprobs(chosen, wanted, part_NV), strict=True):
            outputs[i] = output


def _with_logprobs(outputs: list[TokenOutput], wanted: list[int], logits_NV: Tensor) -> list[TokenOutput]:
    total_N1 = logits_NV.logsumexp(-1, keepdim=True)
    tokens_N1 = torch.tensor([[output.token_id] for output in outputs], device=logits_NV.device)
    chosen = (logits_NV.gather(-1, tokens_N1) - total_N1).squeeze(-1).tolist()
    # Always as many, so that which of equal ones are named does not depend on other rows.
    values_NK, ids_NK, _ = best_candidates(logits_NV, _MAX_LOGPROBS)
    top_values, top_ids = (values_NK - total_N1).tolist(), ids_NK.tolist()
    return [
        TokenOutput(output.token_id, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for output, count, logprob, ids, values in zip(outputs, wanted, chosen, top_ids, top_values, strict=True)
    ]
