"""Puts an engine together for a base: whether it fits, in which way it can be served, and what that takes.

A base shares steps among sequences if its attention can be ours; a trial at the start proves it. Any other is served
one sequence at a time, with the same scheduler, sampler and adapters.
"""

import gc
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneloom.engine import kernels
from tuneloom.engine.blocks import BLOCK_TOKENS
from tuneloom.engine.checkpoint import Checkpoint
from tuneloom.engine.dense_cache import DenseCache
from tuneloom.engine.kv_cache import KVCache, KVShape
from tuneloom.engine.linear import ProductOptions
from tuneloom.engine.loader import load_model, pick_device, pick_dtype
from tuneloom.engine.lora import PackOptions
from tuneloom.engine.memory import Demand, MemoryPlan, measure_room, plan_memory
from tuneloom.engine.options import EngineConfig
from tuneloom.engine.paged_cache import PagedCache
from tuneloom.engine.runner import Runner
from tuneloom.engine.serial import SerialCache, SerialRunner
from tuneloom.errors import InvalidRequest

logger = logging.getLogger(__name__)

# Adapters on the device for a base that uses one at a time.
_SERIAL_SLOTS = 4


@dataclass(frozen=True)
class Assembly:
    """`reason`: why sequences cannot share steps; None: they do. Lengths are tokens."""

    runner: Runner | SerialRunner
    cache: KVCache | SerialCache
    plan: MemoryPlan
    reason: str | None
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_length: int
    max_sequences: int
    max_step_tokens: int
    adapter_slots: int
    num_quantised: int

    def report(self) -> dict[str, Any]:
        """How the base is served, as plain values, for people who look after the engine."""
        return {
            "mode": "batched" if self.reason is None else "one at a time",
            "reason": self.reason,
            "quantised_linears": self.num_quantised,
            "memory": self.plan.report(),
        }


def assemble(folder: Path, config: EngineConfig) -> Assembly:
    """Load the base in `folder` ready to step.

    Raises:
        InvalidRequest: it cannot be loaded, or does not fit; the message has the arithmetic.
    """
    checkpoint = Checkpoint.open(folder)
    reason = checkpoint.unbatchable_reason()
    site = _Site(checkpoint, config)
    if reason is None:
        try:
            return site.batched()
        except CannotBatch as error:
            reason = str(error)
    # What the trial has loaded is not the base any more; it goes before the base is loaded anew.
    gc.collect()
    logger.warning("%s is served one request at a time: %s", folder.name, reason)
    return site.serial(reason)


class CannotBatch(Exception):
    """A trial has shown that a base computes something else in a shared step."""


class _Site:
    """A base, an engine's options, and the machine."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self._checkpoint, self._config = checkpoint, config
        self._device = pick_device()
        self._dtype = pick_dtype(config.dtype, self._device)
        is_packable = self._dtype == torch.bfloat16 and self._device.type == "cpu"
        self._kernels = kernels.load() if config.native and is_packable else None
        self._copies_head = config.native and is_packable

    def batched(self) -> Assembly:
        """Raises CannotBatch."""
        config = self._config
        length = self._checkpoint.max_length(config.max_length, is_batched=True)
        plan = self._plan(length, config.max_sequences, config.adapter_slots, is_batched=True)
        # A sequence that has the cache for itself must fit.
        length = min(length, plan.kv_cache_tokens)
        loaded = self._load()
        shape = KVShape.of(self._checkpoint.text_config, self._dtype)
        cache = self._cache(shape, length, plan.kv_cache_tokens)
        options = PackOptions(
            config.adapter_slots,
            config.max_rank,
            ProductOptions(prepack=config.native, kernels=self._kernels),
            self._dtype,
        )
        try:
            runner = Runner(loaded, cache, options)
        except InvalidRequest as error:
            raise CannotBatch(error.message) from None
        except Exception as error:
            # The modules are not ours: whatever they raise, they do not go together with our attention.
            logger.info("the trial of a shared step failed", exc_info=True)
            raise CannotBatch(f"its layers fail under the engine's attention ({type(error).__name__})") from None
        return Assembly(
            runner,
            cache,
            plan,
            None,
            self._device,
            self._dtype,
            loaded.vocab_size,
            length,
            config.max_sequences,
            config.max_step_tokens,
            config.adapter_slots,
            loaded.num_quantised,
        )

    def serial(self, reason: str) -> Assembly:
        config = self._config
        length = self._checkpoint.max_length(config.max_length, is_batched=False)
        slots = min(config.adapter_slots, _SERIAL_SLOTS)
        plan = self._plan(length, 1, slots, is_batched=False)
        length = min(length, plan.kv_cache_tokens)
        loaded = self._load()
        runner = SerialRunner(loaded)
        step_tokens = config.max_step_tokens if runner.feeding == "in chunks" else max(length, config.max_step_tokens)
        cache = SerialCache(length, self._dtype)
        return Assembly(
            runner,
            cache,
            plan,
            reason,
            self._device,
            self._dtype,
            loaded.vocab_size,
            length,
            1,
            step_tokens,
            slots,
            loaded.num_quantised,
        )

    @property
    def _is_paged(self) -> bool:
        form = self._config.kv_cache
        return form == "paged" or (form == "auto" and self._device.type != "cpu")

    def _cache(self, shape: KVShape, length: int, num_tokens: int) -> KVCache:
        slots, device = self._config.max_sequences, self._device
        if self._is_paged:
            return PagedCache(shape, slots, length, device, num_tokens=num_tokens)
        blocks = self._config.prefix_cache_bytes // (shape.bytes_per_token * BLOCK_TOKENS)
        return DenseCache(
            shape, slots, length, device, token_budget=num_tokens, prefix_blocks=blocks, kernels=self._kernels
        )

    def _load(self) -> Any:
        return load_model(self._checkpoint, self._device, self._dtype, quantization=self._config.quantization)

    def _plan(self, length: int, max_sequences: int, slots: int, *, is_batched: bool) -> MemoryPlan:
        config, native = self._config, self._kernels is not None
        sizes = self._checkpoint.sizes(
            self._dtype,
            quantization=config.quantization,
            is_batched=is_batched,
            stacks_blocks=is_batched and not native,
            copies_head=is_batched and self._copies_head,
        )
        demand = Demand(
            max_sequences=max_sequences,
            max_length=length,
            max_step_tokens=config.max_step_tokens,
            adapter_slots=slots,
            max_rank=config.max_rank,
            host_cache_bytes=config.host_cache_bytes,
            # A paged cache keeps prefixes in itself.
            prefix_cache_bytes=config.prefix_cache_bytes if is_batched and not self._is_paged else 0,
            kv_cache_tokens=config.kv_cache_tokens,
            memory_share=config.memory_share,
        )
        return plan_memory(self._checkpoint.folder.name, sizes, demand, measure_room(self._device.type))
