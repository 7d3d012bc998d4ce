"""Learning from preferences: our trainer with the loss of DPO, its reference computed once, before the first step.

Source: Direct Preference Optimization, Rafailov et al. 2023, equation 7.
"""

# Shapes: P pairs of a micro-batch · N = 2 P rows, the preferred answers first · T tokens

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid

from tuneloom.train.data import PreferenceTokens, Tokens
from tuneloom.train.lora import LoraTrainer, Score, model_inputs
from tuneloom.train.order import Batches, cut_by_tokens
from tuneloom.train.plan import Plan

# How often the reference is saved while it is computed.
SAVE_EVERY_S = 30.0


@dataclass(frozen=True)
class _Referred:
    """Pairs with what the reference gives them: pair i is the rows 2 i, preferred, and 2 i + 1 of `tokens`.

    `reference` (pairs, 2) holds log-probabilities of both answers.
    """

    tokens: Tokens
    reference: np.ndarray

    @property
    def pair_lengths(self) -> np.ndarray:
        return self.tokens.lengths.reshape(-1, 2).sum(-1)


class PreferenceTrainer(LoraTrainer):
    """Raises the likelihood of each preferred answer over that of the other, against a frozen reference.

    The reference is what the model is before the first step: the base, or the base with the adapter of `warm_start`.
    It is kept in `folder`, so that a run that goes on measures against the same. `prepare` comes before `learn`.
    """

    def __init__(
        self, model: PeftModel, plan: Plan, pairs: PreferenceTokens, batches: Batches, *, folder: Path, **more: Any
    ) -> None:
        assert plan.beta is not None, "a plan for preferences has a beta"
        super().__init__(model, plan, _interleave(pairs), batches, folder=folder, **more)
        self._beta = plan.beta
        self._folder = folder
        self._training: _Referred | None = None
        self._validation: _Referred | None = None

    def prepare(self, validation: PreferenceTokens | None, is_wanted: Callable[[], bool]) -> None:
        """Compute the reference of all pairs, or read it, while the model is untrained.

        When it is not wanted any more it returns early and keeps what it has.
        """
        self._training = self._refer(self._tokens, is_wanted)
        self._validation = self._refer(_interleave(validation), is_wanted) if validation is not None else None

    def collate(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The micro-batches of the step that learns the pairs `rows`."""
        assert self._training is not None, "prepare() comes before learn()"
        mine = self._team.part(rows)
        parts = self.batches.cut(mine, padded=self._pad_id is not None)
        counts = (len(rows), len(mine), len(parts))
        return [{**self._inputs(self._training, part), "of_step": counts} for part in parts]

    def weigh(self, inputs: list[dict[str, Any]], learned: int) -> float:
        return inputs[0]["of_step"][1] if inputs else 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The part that a micro-batch has in the mean loss over the pairs of its step."""
        num_pairs, pairs_here, num_parts = inputs.pop("of_step")
        margins_P, accuracy = self._margins(model, inputs)
        metrics = self._metrics["train"]
        metrics["mean_token_accuracy"].append(accuracy)
        # What is logged is the mean over micro-batches, which differ in size.
        weight = num_parts / pairs_here
        metrics["train_reward_margin"].append(margins_P.detach().sum().item() * weight)
        metrics["train_reward_accuracy"].append((margins_P > 0).sum().item() * weight)
        return -logsigmoid(margins_P).sum() / num_pairs

    @torch.no_grad()
    def score(  # type: ignore[override]
        self, tokens: PreferenceTokens, micro_size: int, is_wanted: Callable[[], bool] = lambda: True
    ) -> Score | None:
        """The mean loss of the validation pairs that `prepare` was given; changes nothing of the training.

        None if it was not wanted any more before all were scored. The accuracy is that of the preferred answers'
        tokens; rewards have a mean margin and an accuracy of their own.
        """
        assert self._validation is not None and self._validation.tokens.num_rows == 2 * tokens.num_rows
        losses, margins, accuracies = [], [], []
        was_training = self.model.training
        self.model.eval()
        try:
            for part in self._cut(self._validation, micro_size):
                if not is_wanted():
                    return None
                inputs = self._prepare_inputs(self._inputs(self._validation, part))
                with self.compute_loss_context_manager():
                    margins_P, accuracy = self._margins(self.model_wrapped, inputs)
                margins += margins_P.tolist()
                losses += (-logsigmoid(margins_P)).tolist()
                accuracies += [accuracy] * len(part)
        finally:
            self.model.train(was_training)
        rewards = {
            "valid_reward_margin": float(np.mean(margins)),
            "valid_reward_accuracy": float(np.mean(np.array(margins) > 0)),
        }
        return Score(float(np.mean(losses)), float(np.mean(accuracies)), rewards)

    def _margins(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, float]:
        """How far each preferred answer's reward is above the other's, (P,); the accuracy of the preferred tokens."""
        reference_N = inputs.pop("reference")
        log_prob_N, accuracy = _answers(model, inputs)
        chosen_P, rejected_P = (log_prob_N - reference_N).chunk(2)
        return self._beta * (chosen_P - rejected_P), accuracy

    @torch.no_grad()
    def _refer(self, tokens: Tokens, is_wanted: Callable[[], bool]) -> _Referred:
        """`tokens` with their reference, NaN where it was not wanted any more."""
        path = self._folder / f"reference-{_content_sha256(tokens)[:24]}.npy"
        known = np.load(path) if path.exists() else np.full((tokens.num_rows // 2, 2), np.nan, np.float32)
        referred = _Referred(tokens, known)
        saved_at = time.monotonic()
        self.model.eval()
        frozen = self.model.disable_adapter() if self.plan.start is None else nullcontext()
        try:
            with frozen, self.compute_loss_context_manager(), self.accelerator.autocast():
                for part in self._cut(referred, self.plan.micro_size):
                    if not np.isnan(known[part]).any():
                        continue
                    if not is_wanted():
                        break
                    inputs = self._prepare_inputs(self._inputs(referred, part))
                    del inputs["reference"]
                    log_prob_N, _ = _answers(self.model, inputs)
                    known[part] = log_prob_N.view(2, -1).T.cpu().numpy()
                    if time.monotonic() - saved_at > SAVE_EVERY_S:
                        _save(known, path)
                        saved_at = time.monotonic()
        finally:
            self.model.train()
        _save(known, path)
        return referred

    def _inputs(self, referred: _Referred, pairs: Sequence[int]) -> dict[str, Any]:
        rows = [2 * pair for pair in pairs] + [2 * pair + 1 for pair in pairs]
        inputs = model_inputs(referred.tokens, rows, pad_id=self._pad_id)
        return {**inputs, "reference": torch.from_numpy(referred.reference[list(pairs)].T.reshape(-1))}

    def _cut(self, referred: _Referred, micro_size: int) -> list[list[int]]:
        """All pairs, those of like length together, in parts that one forward pass takes."""
        lengths = referred.pair_lengths
        order = np.argsort(-lengths, kind="stable").tolist()
        return cut_by_tokens(order, lengths, micro_size * int(lengths.max()), padded=self._pad_id is not None)


def pair_lengths(pairs: PreferenceTokens) -> np.ndarray:
    """Tokens of each pair, both rows."""
    return pairs.chosen.lengths + pairs.rejected.lengths


def _answers(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, float]:
    """The log-probability of each row's answer (N,), and how many of the preferred answers' tokens were likeliest."""
    output = model(**inputs, fused_lm_head=True, use_cache=False)
    per_row = [_rows(each, inputs) for each in (output.log_probs.float(), output.is_top1, output.label_mask)]
    log_prob_N, right_N, count_N = (torch.stack([row.sum() for row in rows]) for rows in per_row)
    preferred = slice(len(count_N) // 2)
    return log_prob_N, right_N[preferred].sum().item() / max(1, int(count_N[preferred].sum()))


def _rows(x_BT: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    """What belongs to each row of a result that lacks the first place: padded rows, or one with all end to end."""
    if "cu_seq_lens_q" not in inputs:
        return list(x_BT)
    lengths = inputs["cu_seq_lens_q"].diff().tolist()
    return list(x_BT[0].split([lengths[0] - 1, *lengths[1:]]))


def _interleave(pairs: PreferenceTokens) -> Tokens:
    """The preferred and the other row of each pair, one after the other."""
    sides = (pairs.chosen, pairs.rejected)
    parts = [(side, slice(side.offsets[row], side.offsets[row + 1])) for row in range(pairs.num_rows) for side in sides]
    lengths = np.stack([side.lengths for side in sides], axis=1).reshape(-1)
    return Tokens(
        np.concatenate([side.ids[part] for side, part in parts]),
        np.concatenate([side.learned[part] for side, part in parts]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def _content_sha256(tokens: Tokens) -> str:
    digest = hashlib.sha256()
    for array in (tokens.ids, tokens.learned, tokens.offsets):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _save(known: np.ndarray, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft.npy")
    np.save(draft, known)
    os.replace(draft, path)
