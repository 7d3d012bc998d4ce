"""The engine without threads: sequences in, steps, tokens out. Used by one thread; deterministic given the requests.

    add(request) ... step() -> events ... abort(id)

A step that fails ends the sequences it computed; the others go on.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tuneloom.domain import AdapterRef
from tuneloom.engine.adapter_files import read_adapter
from tuneloom.engine.adapters import AdapterCache
from tuneloom.engine.base import EngineStats, SequenceOutput, SequenceRequest, TokenOutput
from tuneloom.engine.kv_cache import DenseCache, KVShape
from tuneloom.engine.loader import load_model
from tuneloom.engine.lora import HostAdapter
from tuneloom.engine.matcher import Grammars
from tuneloom.engine.runner import Runner
from tuneloom.engine.sampler import SamplingState, sample
from tuneloom.engine.scheduler import Scheduler, Work
from tuneloom.engine.sequence import Sequence
from tuneloom.errors import AdapterRejected, ContextLengthExceeded, InvalidRequest, Overloaded, TuneloomError
from tuneloom.generation import FinishReason

logger = logging.getLogger(__name__)

Event = tuple[str, SequenceOutput | TuneloomError]


@dataclass(frozen=True)
class EngineConfig:
    """How one engine runs; lengths in tokens. `config.EngineSettings` documents the fields they share.

    `prepack`: reorder bf16 weights for the CPU's matrix units.
    """

    dtype: str = "auto"
    max_sequences: int = 32
    max_waiting: int = 256
    max_length: int | None = None
    max_step_tokens: int = 256
    adapter_slots: int = 16
    max_rank: int = 64
    host_cache_bytes: int = 1 << 30
    threads: int = 0
    prepack: bool = True
    adapter_timeout_s: float = 60.0
    adapter_loaders: int = 4
    adapter_failure_s: float = 5.0
    adapter_idle_s: float | None = None


class EngineCore:
    """One base with its cache, adapters and running sequences."""

    @torch.inference_mode()
    def __init__(
        self,
        base_path: Path,
        config: EngineConfig,
        fetch: Callable[[AdapterRef], Path],
        *,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load the base; `wake` is called from other threads when a step may find more to do."""
        loaded = load_model(base_path, config.dtype)
        self.config = config
        self.max_length = min(config.max_length or loaded.max_length, loaded.max_length)
        self.vocab_size = loaded.vocab_size
        self._fetch, self._clock = fetch, clock
        self._device, self._dtype = loaded.device, loaded.dtype
        shape = KVShape.of(loaded.model.config.get_text_config(), loaded.dtype)
        self._cache = DenseCache(shape, config.max_sequences, self.max_length, loaded.device)
        self._runner = Runner(loaded, self._cache, num_adapter_slots=config.adapter_slots, prepack=config.prepack)
        self.adapters = AdapterCache(
            config.adapter_slots,
            config.host_cache_bytes,
            self._read,
            self._runner.lora.write,
            wake,
            time.time,
            num_loaders=config.adapter_loaders,
            failure_s=config.adapter_failure_s,
            idle_s=config.adapter_idle_s,
            slot_bytes=lambda: self._runner.lora.slot_bytes,
        )
        self._scheduler = Scheduler(config.max_sequences, config.max_step_tokens, self._admit, self._is_starved)
        self._grammars = Grammars(base_path, self.vocab_size, wake)
        self._sequences: dict[str, Sequence] = {}
        self._pending: list[Event] = []
        self._refused: list[tuple[Sequence, TuneloomError]] = []
        self._num_steps = self._num_generated = 0
        self._step_ms = 0.0
        self.did_run = False

    @property
    def has_sequences(self) -> bool:
        return bool(self._sequences or self._pending)

    def check(self, request: SequenceRequest) -> None:
        """Raise if `request` can never run here. Reads only what does not change; any thread may call it."""
        count, params = len(request.prompt_ids), request.params
        if not count:
            raise InvalidRequest("The prompt is empty. Send at least one token.", param="prompt")
        if count >= self.max_length:
            raise ContextLengthExceeded(
                f"The prompt has {count} tokens; this base takes up to {self.max_length}, prompt and answer together."
            )
        for param, ids in (("prompt", request.prompt_ids), ("logit_bias", params.logit_bias)):
            if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
                raise InvalidRequest(f"`{param}` has token ids outside 0..{self.vocab_size - 1}.", param=param)
        if request.adapter is not None and request.adapter.rank > self.config.max_rank:
            raise AdapterRejected(
                f"Rank {request.adapter.rank} is above this engine's limit: {self.config.max_rank}.", param="model"
            )

    @torch.inference_mode()
    def add(self, request: SequenceRequest) -> None:
        """Queue a request; its adapter starts to load at once. Errors come as its event."""
        try:
            self.check(request)
            room = self.max_length - len(request.prompt_ids)
            wanted = request.params.max_tokens
            matcher = self._grammars.open(request.grammar, request.stop_ids) if request.grammar else None
            sequence = Sequence(
                request,
                SamplingState(request.params, request.prompt_ids, matcher),
                arrived_at=self._clock(),
                max_tokens=room if wanted is None else min(wanted, room),
            )
        except TuneloomError as error:
            self._pending.append((request.id, error))
            return
        if sequence.max_tokens < 1:
            self._pending.append((request.id, SequenceOutput((), "length")))
            return
        if request.adapter is not None:
            self.adapters.expect(request.adapter)
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def abort(self, id: str) -> None:
        """Forget a sequence; an unknown id is fine."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._end(sequence, is_clean=sequence.is_decoding)

    def abort_all(self) -> None:
        for id in list(self._sequences):
            self.abort(id)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute one step if there is one to compute (`did_run`), and return what it brought."""
        started = self._clock()
        events, self._pending = self._pending, []
        events += self._expire(started)
        self.adapters.expire()
        work = self._scheduler.plan(started)
        events += [self._fail(sequence, error) for sequence, error in self._refused]
        self._refused = []
        self.did_run = bool(work.sequences)
        if self.did_run:
            events += self._run(work)
            self._compact()
            self._num_steps += 1
            elapsed_ms = (self._clock() - started) * 1000
            self._step_ms += (elapsed_ms - self._step_ms) * (0.05 if self._num_steps > 1 else 1)
        return events

    def stats(self) -> EngineStats:
        running = self._scheduler.running
        counters = self.adapters.counters
        return EngineStats(
            running=len(running),
            waiting=len(self._scheduler.waiting),
            kv_tokens_used=sum(sequence.num_computed for sequence in running),
            kv_tokens_total=self._cache.num_tokens,
            steps=self._num_steps,
            step_ms=self._step_ms,
            tokens_generated=self._num_generated,
            adapter_loads=counters.loads,
            adapter_evictions=counters.slot_evictions,
            tiers=self.adapters.tiers(),
            extra={
                "device": str(self._device),
                "dtype": str(self._dtype).removeprefix("torch."),
                "linears_packed": self._runner.lora.num_packed,
            },
        )

    def close(self) -> None:
        self.adapters.close()
        self._grammars.close()

    def _read(self, ref: AdapterRef) -> HostAdapter:
        return read_adapter(
            self._fetch(ref), self._runner.lora.shapes, max_rank=self.config.max_rank, dtype=self._dtype
        )

    def _admit(self, sequence: Sequence) -> bool:
        if not self._cache.num_free:
            return False
        try:
            if not sequence.sampling.is_ready:
                return False
        except TuneloomError as error:
            self._refused.append((sequence, error))
            return False
        if sequence.adapter is not None:
            try:
                slot = self.adapters.acquire(sequence.adapter)
            except TuneloomError as error:
                self._refused.append((sequence, error))
                return False
            if slot is None:
                return False
            sequence.adapter_slot = slot
        sequence.cache_slot = self._cache.acquire(self.max_length)
        return True

    def _is_starved(self, sequence: Sequence) -> bool:
        if sequence.adapter is None or not self._cache.num_free:
            return False
        return self.adapters.is_loaded(sequence.adapter)

    def _run(self, work: Work) -> list[Event]:
        try:
            logits = self._runner.forward(work)
            return self._advance(work, logits)
        except Exception:
            # One broken step must not end the engine; whatever it computed cannot be trusted.
            logger.exception("step failed: %s", [sequence.id for sequence in work.sequences])
            error = "The engine failed while computing this answer. Retry; if it happens again, see the engine's log."
            return [self._fail(s, TuneloomError(error)) for s in work.sequences if s.id in self._sequences]

    def _advance(self, work: Work, logits: Tensor | None) -> list[Event]:
        sampling = list(work.decoding)
        for sequence in work.decoding:
            sequence.num_computed += 1
        for sequence, count in work.prefilling:
            sequence.num_computed += count
            if not sequence.num_pending:
                sampling.append(sequence)
        if logits is None:
            return []
        return [self._take(s, token) for s, token in zip(sampling, sample(logits, sampling), strict=True)]

    def _take(self, sequence: Sequence, token: TokenOutput | TuneloomError) -> Event:
        if isinstance(token, TuneloomError):
            logger.error("no token can be chosen: %s: %s", sequence.id, token)
            return self._fail(sequence, token)
        sequence.output_ids.append(token.token_id)
        sequence.sampling.record(token.token_id)
        self._num_generated += 1
        reason: FinishReason | None = None
        if token.token_id in sequence.request.stop_ids or sequence.sampling.is_complete:
            reason = "stop"
        elif len(sequence.output_ids) >= sequence.max_tokens:
            reason = "length"
        if reason is not None:
            self._end(sequence, is_clean=True)
        return sequence.id, SequenceOutput((token,), reason)

    def _expire(self, now: float) -> list[Event]:
        events = []
        for sequence in list(self._sequences.values()):
            if now >= sequence.deadline_at:
                message = f"The request took longer than its limit of {sequence.request.deadline_s:g} s."
                error = Overloaded(f"{message} Ask for fewer tokens, or retry.", code="deadline_exceeded")
                error.retry_after_s = 1.0
                events.append(self._fail(sequence, error))
            elif (
                sequence.cache_slot is None
                and sequence.adapter is not None
                and now - sequence.arrived_at >= self.config.adapter_timeout_s
                and not self.adapters.is_loaded(sequence.adapter)
            ):
                message = f"The adapter was not loaded within {self.config.adapter_timeout_s:g} s. Retry in a moment."
                events.append(self._fail(sequence, Overloaded(message, retry_after_s=5.0)))
        return events

    def _fail(self, sequence: Sequence, error: TuneloomError) -> Event:
        self._end(sequence, is_clean=False)
        return sequence.id, error

    def _end(self, sequence: Sequence, *, is_clean: bool) -> None:
        """Give back all that a sequence holds."""
        del self._sequences[sequence.id]
        self._scheduler.remove(sequence)
        if sequence.cache_slot is None:
            if sequence.adapter is not None:
                self.adapters.forget(sequence.adapter)
            return
        # All its tokens, not only the computed ones: a failing step may have written behind those.
        self._cache.release(sequence.cache_slot, length=sequence.num_tokens, is_clean=is_clean)
        sequence.cache_slot = None
        if sequence.adapter is not None:
            self.adapters.release(sequence.adapter)

    def _compact(self) -> None:
        by_slot = {s.cache_slot: s for s in self._scheduler.running if s.cache_slot is not None}
        for move in self._cache.compact({slot: s.num_computed for slot, s in by_slot.items()}):
            by_slot[move.source].cache_slot = move.target
