"""What the trainer's model thinks of rows, as training computes it, and the adapter that it thinks so with."""

# Shapes: T tokens of a row · K places of learned tokens · V vocabulary · I inputs, O outputs of a layer · R rank

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tuneloom.train.sample import Scored


@torch.no_grad()
def trainer_scores(trainer: Any, rows: Sequence[Scored]) -> list[list[float]]:
    """Log-probabilities of the tokens at each row's places, by teacher forcing.

    In the precision of training, on the base as it was loaded for it, without dropout. `trainer` is transformers' or
    one made from it; its model is left as it was.
    """
    model = trainer.model
    was_training = model.training
    model.eval()
    try:
        return [_score(trainer, model, row) for row in rows]
    finally:
        model.train(was_training)


def _score(trainer: Any, model: Any, row: Scored) -> list[float]:
    device = next(model.parameters()).device
    ids_T = torch.tensor(row.ids, device=device)
    places_K = torch.tensor(row.places, device=device)
    inputs = {"input_ids": ids_T[None], "attention_mask": torch.ones_like(ids_T)[None]}
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        logits_KV = model(**inputs, use_cache=False, logits_to_keep=places_K - 1).logits[0]
    chosen_K = logits_KV.float().log_softmax(-1).gather(-1, ids_T[places_K][:, None])
    return chosen_K.squeeze(-1).tolist()


def trainer_factors(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A (R, I), and B transposed and scaled (R, O), of each adapted layer by its name in the base; in fp32 on the host.

    `model` is a PEFT model with one adapter.
    """
    found = {}
    for name, module in model.get_base_model().named_modules():
        if "default" in getattr(module, "lora_A", ()):
            a_RI, b_OR = (side["default"].weight.detach().cpu().float() for side in (module.lora_A, module.lora_B))
            found[name] = (a_RI.clone(), b_OR.t() * module.scaling["default"])
    return found
