"""A runner for bases that cannot share steps: one sequence at a time, by the model's own forward and cache.

It has the face of `runner.Runner` and `kv_cache.KVCache`, so scheduling, sampling and adapters are those of any base.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tuneloom.engine.blocks import BlockPool
from tuneloom.engine.kv_cache import KVShape, Move
from tuneloom.engine.loader import LoadedModel
from tuneloom.engine.lora import HostAdapter
from tuneloom.engine.work import Work
from tuneloom.errors import InvalidRequest

logger = logging.getLogger(__name__)

# By what names models return what they need to see again with the next token.
_CACHES = ("past_key_values", "cache_params", "state")
_TRIAL_TOKENS = 12

Feeding = Literal["in chunks", "whole", "anew"]
# How a trial feeds its tokens.
_TRIAL_PIECES: dict[Feeding, tuple[int, ...]] = {"in chunks": (5, 4, 1, 1, 1), "whole": (9, 1, 1, 1)}


class SerialCache:
    """Room for one sequence; what it holds is the model's own."""

    def __init__(self, num_tokens: int, dtype: torch.dtype) -> None:
        self.shape = KVShape(0, 0, 0, dtype)
        self.pool = BlockPool(0)
        self.num_tokens = num_tokens
        self._reserved: int | None = None

    @property
    def num_free_tokens(self) -> int:
        return self.num_tokens - (self._reserved or 0)

    @property
    def num_free(self) -> int:
        return int(self._reserved is None)

    def acquire(self, num_tokens: int, blocks: Sequence[int] = ()) -> int | None:
        if self._reserved is not None or num_tokens > self.num_tokens:
            return None
        self._reserved = num_tokens
        return 0

    def extend(self, slot: int, num_tokens: int) -> bool:
        if num_tokens > self.num_tokens:
            return False
        self._reserved = max(self._reserved or 0, num_tokens)
        return True

    def release(self, slot: int, *, length: int, is_clean: bool) -> None:
        self._reserved = None

    def compact(self, lengths: dict[int, int]) -> list[Move]:
        return []

    def save(self, slot: int, index: int) -> int | None:
        return None

    def attach(self, slot: int, index: int, blocks: Sequence[int]) -> None:
        """There are no blocks."""

    def share(self, slot: int, index: int, block: int) -> None:
        """There are no blocks."""


class SerialLora:
    """Adapters in slots, one of which is in use: each linear's output gets the update of the adapter's factors.

    By hooks, since such models also read weights past their layers. A layer whose hook never runs cannot be adapted.
    """

    num_packed = 0

    def __init__(self, body: nn.Module, *, prefix: str, device: torch.device) -> None:
        self.shapes: dict[str, tuple[int, int]] = {}
        self.called: set[str] = set()
        self._device = device
        self._slots: dict[int, Mapping[str, tuple[Tensor, Tensor]]] = {}
        self._current: Mapping[str, tuple[Tensor, Tensor]] = {}
        for name, module in body.named_modules(prefix=prefix):
            if isinstance(module, nn.Linear):
                self.shapes[name] = (module.out_features, module.in_features)
                module.register_forward_hook(self._hook(name))

    @property
    def uses_host_copies(self) -> bool:
        """Whether a slot points to the factors in host memory instead of having its own."""
        return self._device.type == "cpu"

    @property
    def slot_bytes(self) -> int:
        """What the largest adapter takes."""
        if self.uses_host_copies:
            return 0
        return max((sum(a.nbytes + b.nbytes for a, b in slot.values()) for slot in self._slots.values()), default=0)

    def arrange(self, adapter: HostAdapter) -> HostAdapter:
        return adapter

    def write(self, slot: int, adapter: HostAdapter) -> None:
        self._slots[slot] = {name: (a.to(self._device), b.to(self._device)) for name, (a, b) in adapter.factors.items()}

    def use(self, slot: int) -> None:
        """Let the next forward pass use a slot; 0 is no adapter."""
        self._current = self._slots[slot] if slot else {}

    def forget_uncalled(self) -> None:
        """Offer no layer that no forward pass came through. An expert may just not have had a token."""
        for name in set(self.shapes) - self.called:
            if "expert" not in name:
                del self.shapes[name]

    def _hook(self, name: str) -> Any:
        def add_update(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            self.called.add(name)
            factors = self._current.get(name)
            if factors is None:
                return None
            a_RK, b_RN = factors
            return output + (inputs[0].to(a_RK.dtype) @ a_RK.t() @ b_RN).to(output.dtype)

        return add_update


class SerialRunner:
    """A model with the state of one sequence. Used by one thread."""

    num_fused = 0

    def __init__(self, loaded: LoadedModel) -> None:
        self._model, self._device = loaded.model, loaded.device
        self.lora = SerialLora(loaded.body, prefix=loaded.body_name, device=loaded.device)
        self._takes = set(inspect.signature(loaded.model.forward).parameters)
        self._state: dict[str, Any] = {}
        self.feeding = self._find_feeding(loaded)
        self.lora.forget_uncalled()
        logger.info("one sequence at a time; prompts are fed %s", self.feeding)

    def forward(self, work: Work) -> Tensor | None:
        """Logits (1, V) of the sequence in `work` if it samples."""
        [(sequence, count)] = [*((sequence, 1) for sequence in work.decoding), *work.prefilling]
        start, is_last = sequence.num_computed, count == sequence.num_pending
        self.lora.use(sequence.adapter_slot)
        if self.feeding == "anew":
            return self._call(sequence.tokens(0, start + count), 0) if is_last else None
        logits = self._call(sequence.tokens(start, start + count), start)
        return logits if is_last else None

    def read(
        self, ids: Sequence[int], start: int, keep: Sequence[int], *, cache_slot: int, adapter_slot: int
    ) -> Tensor | None:
        """As `Runner.read`. A model that cannot be fed in chunks gets its pieces whole: a step has room for them."""
        assert not start or self.feeding == "in chunks"
        self.lora.use(adapter_slot)
        logits = self._call(list(ids), start, keep)
        return logits if keep else None

    def _call(self, ids: list[int], start: int, keep: Sequence[int] = ()) -> Tensor:
        """Logits behind the tokens `keep`, or behind the last one."""
        if not start:
            self._state = {}
        arguments: dict[str, Any] = {
            "input_ids": torch.tensor([ids], device=self._device),
            "use_cache": self.feeding != "anew",
            **self._state,
        }
        if "position_ids" in self._takes:
            arguments["position_ids"] = torch.arange(start, start + len(ids), device=self._device)[None]
        if takes_places := "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = torch.tensor(keep, device=self._device) if keep else 1
        out = self._model(**arguments)
        if self.feeding != "anew":
            self._state = {name: out[name] for name in _CACHES if out.get(name) is not None}
        return out.logits[0] if takes_places else out.logits[0, list(keep) or [-1]]

    def _find_feeding(self, loaded: LoadedModel) -> Feeding:
        """The quickest way that gives what the model gives for all tokens at once."""
        ids = [at * 7 % loaded.vocab_size for at in range(_TRIAL_TOKENS)]
        self.feeding: Feeding = "anew"
        expected = self._call(ids, 0).float()
        if not expected.isfinite().all():
            raise InvalidRequest("The base gives no finite scores: its weights are damaged. Add the checkpoint anew.")
        for feeding in _TRIAL_PIECES:
            self.feeding = feeding
            try:
                found = self._feed(ids, _TRIAL_PIECES[feeding]).float()
            except Exception as error:
                # Anything may come out of a model that is fed in a way it was not made for.
                logger.info("prompts cannot be fed %s: %r", feeding, error)
                continue
            if (found - expected).norm() <= loaded.trial_tolerance * expected.norm().clamp_min(1e-6):
                return feeding
        return "anew"

    def _feed(self, ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
        for piece, start in _pieces(ids, lengths):
            logits = self._call(piece, start)
        return logits


def _pieces(ids: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    start = 0
    for length in lengths:
        yield list(ids[start : start + length]), start
        start += length
