"""One forward pass over packed tokens of many sequences: the model's own modules with our attention and linears.

All tokens of a step form one row [1, T]. Attention finds its sequences by the `CacheBatch` that travels with the call,
linears find their adapters by the LoRA plan. Nothing here chooses tokens or sequences.
"""

import logging
from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor, nn

from tuneloom.engine.attention import ATTENTION, StepAttention
from tuneloom.engine.fused import fuse
from tuneloom.engine.kv_cache import CacheBatch, Chunk, KVCache
from tuneloom.engine.linear import PackedLinear
from tuneloom.engine.loader import LoadedModel
from tuneloom.engine.lora import LoraLayers, PackOptions
from tuneloom.engine.sequence import Sequence
from tuneloom.engine.work import Work
from tuneloom.errors import InvalidRequest

logger = logging.getLogger(__name__)

_TRIAL_TOKENS = 12


class Runner:
    """A model prepared for packed steps. Used by one thread."""

    def __init__(self, loaded: LoadedModel, cache: KVCache, options: PackOptions) -> None:
        """Take over `loaded.model`: its linears and attention are replaced.

        Raises:
            InvalidRequest: with our attention the model computes something else.
        """
        self._model, self._body, self._device = loaded.model, loaded.body, loaded.device
        self._cache = cache
        ids = torch.arange(_TRIAL_TOKENS, device=loaded.device) * 7 % loaded.vocab_size
        expected = self._model(input_ids=ids[None], use_cache=False).logits[0, -1].float()
        self._model.set_attn_implementation(ATTENTION)
        self.lora = LoraLayers(loaded.body, options, prefix=loaded.body_name)
        self.num_fused = fuse(loaded.body, options.kernels, cache) if options.kernels is not None else 0
        head = self._model.get_output_embeddings()
        if type(head) is nn.Linear:
            self._model.set_output_embeddings(PackedLinear(head, options.product))
        self._try(ids.tolist(), expected, loaded)
        logger.info("linears ready: %d of %d packed", self.lora.num_packed, self.lora.num_packs)

    def forward(self, work: Work) -> Tensor | None:
        """Logits (N, V) of the sequences in `work` that sample, in order; None if none does.

        Afterwards every token of `work` is in the cache; the caller counts them as computed.
        """
        ids = [sequence.output_ids[-1] for sequence in work.decoding]
        positions = [sequence.num_computed for sequence in work.decoding]
        samples = list(range(len(ids)))
        chunks = []
        for sequence, count in work.prefilling:
            start = sequence.num_computed
            chunks.append(Chunk(_slot(sequence), len(ids), count, start))
            ids += sequence.tokens(start, start + count)
            positions += range(start, start + count)
            if count == sequence.num_pending:
                samples.append(len(ids) - 1)
        slots = [_slot(sequence) for sequence in work.decoding]
        batch = CacheBatch(slots, positions[: len(slots)], chunks, self._device)
        self.lora.plan(
            [sequence.adapter_slot for sequence in work.decoding],
            [(sequence.adapter_slot, count) for sequence, count in work.prefilling],
            self._device,
        )
        return self._call(ids, positions, samples, StepAttention(self._cache, batch))

    def read(self, ids: Rows[int], start: int, keep: Rows[int], *, cache_slot: int, adapter_slot: int) -> Tensor | None:
        """Logits (K, V) behind the tokens `keep` of `ids`, a piece of one sequence from position `start`.

        None if there are none to keep. The cache holds what comes before the piece, and the piece afterwards.
        """
        batch = CacheBatch([], [], [Chunk(cache_slot, 0, len(ids), start)], self._device)
        self.lora.plan([], [(adapter_slot, len(ids))], self._device)
        return self._call(ids, range(start, start + len(ids)), keep, StepAttention(self._cache, batch))

    def _call(self, ids: Rows[int], positions: Rows[int], samples: Rows[int], step: StepAttention) -> Tensor | None:
        arguments = {
            "input_ids": torch.tensor([ids], device=self._device),
            "position_ids": torch.tensor([positions], device=self._device),
            "use_cache": False,
            "tuneloom": step,
        }
        if not samples:
            self._body(**arguments)
            return None
        keep = 0 if len(samples) == len(ids) else torch.tensor(samples, device=self._device)
        return self._model(**arguments, logits_to_keep=keep).logits[0]

    def _try(self, ids: list[int], expected: Tensor, loaded: LoadedModel) -> None:
        """Prove on a short prompt, half as one chunk and the rest token by token, that the result is the base's."""
        slot = self._cache.acquire(len(ids))
        assert slot is not None
        half = len(ids) // 2
        step = StepAttention(self._cache, CacheBatch([], [], [Chunk(slot, 0, half, 0)], self._device))
        self._call(ids[:half], range(half), [], step)
        _check_calls(step, loaded.model.config.get_text_config())
        for at in range(half, len(ids)):
            step = StepAttention(self._cache, CacheBatch([slot], [at], [], self._device))
            found = self._call([ids[at]], [at], [0], step)
        self._cache.release(slot, length=len(ids), is_clean=False)
        assert found is not None
        error = (found[0].float() - expected).norm() / expected.norm().clamp_min(1e-6)
        if not error <= loaded.trial_tolerance:
            raise InvalidRequest(
                f"it computes something else under the engine's attention (relative error {float(error):.2g})"
            )


def _check_calls(step: StepAttention, config: Any) -> None:
    """Every layer must have come to our attention, and told its window: the trial is shorter than windows are."""
    layers = config.num_hidden_layers
    windowed = list(config.to_dict().get("layer_types") or ()).count("sliding_attention")
    if step.num_calls != layers or step.num_windowed < windowed:
        raise InvalidRequest(
            f"of its {layers} layers, {windowed} with a window, {step.num_calls} and {step.num_windowed} "
            "take part in the engine's attention"
        )


def _slot(sequence: Sequence) -> int:
    assert sequence.cache_slot is not None
    return sequence.cache_slot
