"""The head of a language model only where something is learned. Knows tensors and one method of TRL's trainer.

TRL scores every position on a CPU; with short answers after long prompts that is most of the head's work, and the head
of a small model with a large vocabulary is most of the model. Here the positions with a label are picked first.
"""

# Shapes: B rows · T tokens of a row · N positions with a label · D model width · V vocabulary

import functools
import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

# Logits held at once, in numbers: 32 MB in fp32. Half as many positions a chunk read a large head more often.
LOGITS_AT_ONCE = 8 << 20
# Config fields by which an architecture changes its logits after the head; None and 1 mean that it does not.
_LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "output_router_logits",
)


def score_answers_only(model: PreTrainedModel) -> bool:
    """Make TRL's `fused_lm_head` call of `model` score labelled positions only; False where the head is not plain.

    Call it after the trainer is built. A head with a bias, with trained weights or with scaled logits keeps TRL's own
    way, which is right for all of them. The entropy of the predictions is not computed: nobody reads it.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    if any(getattr(config, name, None) not in (None, False, 1, 1.0) for name in _LOGIT_CHANGES):
        return False
    if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.requires_grad:
        return False
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **inputs: Any) -> Any:
        if not fused_lm_head or labels is None:
            return original(*args, fused_lm_head=fused_lm_head, labels=labels, **inputs)
        inputs.pop("num_items_in_batch", None)
        hidden_BTD = self.base_model(*args, **{**inputs, "use_cache": False}).last_hidden_state[:, :-1]
        return _score(hidden_BTD, self.get_output_embeddings().weight, labels[:, 1:])

    model.forward = types.MethodType(forward, model)
    return True


def _score(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor) -> FusedCausalLMOutput:
    mask_BT = labels_BT != -100
    log_prob_N, is_top1_N = _AnswerScores.apply(hidden_BTD[mask_BT], weight_VD, labels_BT[mask_BT])

    def spread(x_N: Tensor) -> Tensor:
        return x_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, x_N)

    return FusedCausalLMOutput(log_probs=spread(log_prob_N), is_top1=spread(is_top1_N), label_mask=mask_BT)


class _AnswerScores(torch.autograd.Function):
    """Log-probability of each target under softmax(hidden @ weight.T), and whether it is the likeliest.

    The gradient for `hidden` of one position depends on that position alone, so it is computed beside the logits, a
    chunk of positions at a time, and only scaled in `backward`: two products with the head, and never (N, V) kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        num_positions, vocab = len(hidden_ND), len(weight_VD)
        needs_grad = ctx.needs_input_grad[0]
        log_prob_N = hidden_ND.new_empty(num_positions, dtype=torch.float32)
        is_top1_N = torch.empty_like(log_prob_N, dtype=torch.bool)
        grad_ND = torch.empty_like(hidden_ND, dtype=torch.float32) if needs_grad else None
        step = max(1, LOGITS_AT_ONCE // vocab)
        for start in range(0, num_positions, step):
            part = slice(start, start + step)
            target = target_N[part, None]
            logits = (hidden_ND[part].to(weight_VD.dtype) @ weight_VD.T).float()
            top, top_index = logits.max(-1, keepdim=True)
            is_top1_N[part] = (top_index == target).squeeze(-1)
            of_target = logits.gather(-1, target) - top
            # In place: softmax(logits), of which only the sum of the powers is divided out at the end.
            powers = logits.sub_(top).exp_()
            total = powers.sum(-1, keepdim=True)
            log_prob_N[part] = (of_target - total.log()).squeeze(-1)
            if grad_ND is not None:
                # d log p(target) / d hidden = weight[target] - p @ weight
                powers.div_(total).scatter_add_(-1, target, torch.full_like(of_target, -1))
                grad_ND[part] = (powers.to(weight_VD.dtype) @ weight_VD).float().neg_()
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        ctx.hidden_dtype = hidden_ND.dtype
        ctx.mark_non_differentiable(is_top1_N)
        return log_prob_N, is_top1_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Any) -> tuple[Tensor, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_N[:, None] * grad_ND).to(ctx.hidden_dtype), None, None
