"""The other side of most ratios: transformers and PEFT, one request at a time, `set_adapter` then `generate`."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.inputs import Setup
from tuneloom.domain import AdapterRef


class PeftSide:
    """A base with all its adapters in memory."""

    def __init__(self, setup: Setup, adapters: Sequence[AdapterRef]) -> None:
        self._now = setup.now
        kind = torch.bfloat16 if setup.dtype == "bf16" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(setup.base, dtype=kind)
        # Adapters in the base's own type: faster for PEFT than its default, which keeps them in fp32.
        first, *others = adapters
        self._model = PeftModel.from_pretrained(
            model, first.uri, adapter_name=first.sha256, autocast_adapter_dtype=False
        )
        for ref in others:
            self._model.load_adapter(ref.uri, adapter_name=ref.sha256, autocast_adapter_dtype=False)
        self._model.to(kind).eval()

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], new_tokens: int, adapter: AdapterRef) -> list[int]:
        self._model.set_adapter(adapter.sha256)
        ids = torch.tensor([list(prompt)])
        answer = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return answer[0, len(prompt) :].tolist()

    def tokens_per_s(self, prompts: Sequence[Sequence[int]], new_tokens: int, adapters: Sequence[AdapterRef]) -> float:
        """Answer tokens of all prompts, one after another over the adapters in turn, per second."""
        started = self._now()
        for i, prompt in enumerate(prompts):
            self.answer(prompt, new_tokens, adapters[i % len(adapters)])
        return len(prompts) * new_tokens / (self._now() - started)
