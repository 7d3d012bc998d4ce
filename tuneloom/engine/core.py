"""The engine without threads: sequences in, steps, tokens out. Used by one thread; deterministic given the requests.

    add(request) ... step() -> events ... abort(id)

A step that fails ends the sequences it computed; the others go on.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from pathlib import Path

import torch
from torch import Tensor

from tuneloom.domain import AdapterRef
from tuneloom.engine.adapter_files import read_adapter
from tuneloom.engine.adapters import AdapterCache
from tuneloom.engine.assembly import assemble
from tuneloom.engine.base import EngineStats, SequenceOutput, SequenceRequest, TokenOutput
from tuneloom.engine.deadlines import Alarms, too_late
from tuneloom.engine.lora import HostAdapter
from tuneloom.engine.matcher import Grammars
from tuneloom.engine.options import EngineConfig
from tuneloom.engine.prefix import PrefixCache
from tuneloom.engine.sampler import SamplingState, sample
from tuneloom.engine.scheduler import Scheduler
from tuneloom.engine.scoring import score
from tuneloom.engine.sequence import Sequence
from tuneloom.engine.work import Limits, Outcome, Work
from tuneloom.errors import AdapterRejected, ContextLengthExceeded, InvalidRequest, Overloaded, TuneloomError
from tuneloom.generation import FinishReason

logger = logging.getLogger(__name__)

# Room beyond its tokens that a sequence is admitted with, so that it does not give up its place at once.
_HEADROOM_TOKENS = 16

Event = tuple[str, SequenceOutput | TuneloomError]


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
        parts = self._parts = assemble(base_path, config)
        self.config = config
        self.max_length, self.vocab_size = parts.max_length, parts.vocab_size
        self._fetch, self._clock, self._wake = fetch, clock, wake
        self._cache, self._runner = parts.cache, parts.runner
        number_format = str(parts.dtype).removeprefix("torch.")
        self._prefix = PrefixCache(self._cache, number_format, is_on=config.prefix_cache_bytes > 0)
        self.adapters = AdapterCache(
            parts.adapter_slots,
            config.host_cache_bytes,
            self._read,
            self._runner.lora.write,
            self._tell,
            time.time,
            num_loaders=config.adapter_loaders,
            failure_s=config.adapter_failure_s,
            idle_s=config.adapter_idle_s,
            slot_bytes=lambda: self._runner.lora.slot_bytes,
            slots_use_host=self._runner.lora.uses_host_copies,
        )
        limits = Limits(
            parts.max_sequences,
            parts.max_step_tokens,
            self._cache.num_tokens,
            config.max_step_ms,
            config.decode_weight,
            config.adapter_bytes_per_token,
        )
        self._scheduler = Scheduler(limits, self)
        self._grammars = Grammars(base_path, self.vocab_size, self._tell)
        self._has_news = False
        self._sequences: dict[str, Sequence] = {}
        self._alarms = Alarms()
        self._pending: list[Event] = []
        self._refused: list[tuple[Sequence, TuneloomError]] = []
        self._num_steps = self._num_generated = 0
        self._step_ms = self._step_tokens = self._step_answers = 0.0
        self._busy_s = 0.0
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
            is_loaded = self.adapters.is_loaded(request.adapter)
            sequence.load_bytes = 0 if is_loaded else request.adapter.size_bytes
            self._alarms.set(sequence.arrived_at + self.config.adapter_timeout_s, request.id)
        self._alarms.set(sequence.deadline_at, request.id)
        sequence.chain = self._prefix.open(request.owner, sequence.adapter_key, sequence.tokens)
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    @torch.inference_mode()
    def abort(self, id: str) -> None:
        """Forget a sequence; an unknown id is fine."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._end(sequence, is_clean=sequence.is_decoding)

    def abort_all(self) -> None:
        for id in list(self._sequences):
            self.abort(id)

    def drop_prefixes(self, adapter: str) -> None:
        """Forget what was computed with an adapter, given by its content hash; running sequences go on."""
        self._prefix.drop_adapter(adapter)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute one step if there is one to compute (`did_run`), and return what it brought."""
        started = self._clock()
        events, self._pending = self._pending, []
        events += self._expire(started)
        self.adapters.expire()
        if self._has_news:
            self._has_news = False
            self._scheduler.news()
        work = self._scheduler.plan(started)
        events += [self._fail(sequence, error) for sequence, error in self._refused]
        self._refused = []
        self.did_run = bool(work.sequences)
        if self.did_run:
            self._num_steps += 1
            events += self._run(work, started)
            self._compact()
            self._charge(work, self._clock() - started)
        return events

    @torch.inference_mode()
    def score(self, ids: Ids[int], places: Ids[int], adapter: AdapterRef | None = None) -> list[float]:
        """Log-probabilities of the tokens of `ids` at ascending `places`, each given the tokens before it.

        Computed between steps and as a prompt is: nothing is sampled, kept or counted.

        Raises:
            AdapterRejected: the adapter does not fit this base.
            Overloaded: at this moment there is no room.
        """
        timeout_s = self.config.adapter_timeout_s
        return score(self._parts, self.adapters, ids, places, adapter, timeout_s=timeout_s)

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        counters = self.adapters.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            kv_tokens_used=self._cache.num_tokens - self._cache.num_free_tokens,
            kv_tokens_total=self._cache.num_tokens,
            steps=self._num_steps,
            step_ms=self._step_ms,
            tokens_generated=self._num_generated,
            adapter_loads=counters.loads,
            adapter_evictions=counters.slot_evictions,
            waiting_tokens=scheduler.waiting_tokens,
            preemptions=scheduler.num_preemptions,
            step_tokens=self._step_tokens,
            tokens_per_s=1000 * self._step_answers / self._step_ms if self._step_ms else 0.0,
            busy_s=self._busy_s,
            tiers=self.adapters.tiers(),
            extra={
                "device": str(self._parts.device),
                "dtype": str(self._parts.dtype).removeprefix("torch."),
                **self._parts.report(),
                "prefix_cache": self._prefix.stats(),
                "linears_packed": self._runner.lora.num_packed,
                "modules_fused": self._runner.num_fused,
            },
        )

    def close(self) -> None:
        self.adapters.close()
        self._grammars.close()

    def _read(self, ref: AdapterRef) -> HostAdapter:
        lora = self._runner.lora
        adapter = read_adapter(
            self._fetch(ref),
            lora.shapes,
            max_rank=self.config.max_rank,
            dtype=self._parts.dtype,
            pack=not lora.uses_host_copies,
        )
        return lora.arrange(adapter)

    def admit(self, sequence: Sequence) -> Outcome:
        """Give a waiting sequence its slots, for the scheduler. If it fails, its error comes with the step's events."""
        try:
            if not sequence.sampling.is_ready:
                return Outcome.COMPILING
            return self._admit(sequence)
        except TuneloomError as error:
            self._refused.append((sequence, error))
            return Outcome.REFUSED

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether nothing but room is wanting for a waiting sequence."""
        try:
            is_compiled = sequence.sampling.is_ready
        except TuneloomError:
            # `admit` refuses it.
            return True
        return is_compiled and (sequence.adapter is None or self.adapters.is_at_hand(sequence.adapter))

    def extend(self, sequence: Sequence) -> bool:
        assert sequence.cache_slot is not None
        return self._cache.extend(sequence.cache_slot, sequence.num_tokens)

    def goes_on(self, sequence: Sequence) -> bool:
        """Take what others have computed of a prompt meanwhile; False while another computes what comes next."""
        assert sequence.cache_slot is not None
        chain, count = sequence.chain, sequence.num_tokens
        found = self._prefix.attach(chain, sequence.cache_slot, sequence.num_computed, count)
        sequence.skip_to(found)
        if self._prefix.is_coming(chain, found, count):
            return False
        self._prefix.claim(chain, found, count)
        return True

    def take_back(self, sequence: Sequence) -> None:
        """Take the slots of a running sequence that will be admitted again; its answer and sampling stay with it."""
        assert sequence.cache_slot is not None
        self._prefix.yield_claims(sequence.chain)
        sequence.num_reached = max(sequence.num_reached, sequence.num_computed)
        self._cache.release(sequence.cache_slot, length=sequence.num_tokens, is_clean=True)
        sequence.cache_slot, sequence.num_computed = None, 0
        if sequence.adapter is not None:
            # Expected before it is released, so that nothing drops it in between.
            self.adapters.expect(sequence.adapter)
            self.adapters.release(sequence.adapter)
            self._alarms.set(self._clock() + self.config.adapter_timeout_s, sequence.id)

    def _admit(self, sequence: Sequence) -> Outcome:
        adapter = sequence.adapter
        room = min(sequence.num_tokens + _HEADROOM_TOKENS, sequence.most_tokens)
        cache_slot = self._prefix.acquire(sequence.chain, room, sequence.num_tokens)
        if cache_slot is None:
            return Outcome.NO_ROOM if self.is_ready(sequence) else Outcome.LOADING
        if adapter is not None:
            adapter_slot = self._acquire_adapter(sequence, adapter, cache_slot)
            if adapter_slot is None:
                return Outcome.NO_SLOT if self.adapters.is_loaded(adapter) else Outcome.LOADING
            sequence.adapter_slot = adapter_slot
        sequence.cache_slot = cache_slot
        sequence.skip_to(self._prefix.begin(sequence.chain, cache_slot, sequence.num_tokens))
        return Outcome.ADMITTED

    def _acquire_adapter(self, sequence: Sequence, adapter: AdapterRef, cache_slot: int) -> int | None:
        """The adapter's slot; without one the cache slot is given back."""
        slot, is_resident = None, self.adapters.is_resident(adapter)
        try:
            slot = self.adapters.acquire(adapter)
        finally:
            if slot is None:
                self._cache.release(cache_slot, length=0, is_clean=True)
        # Who fills a slot pays for it, and for the load if it was not in memory when the request came.
        sequence.load_bytes = 0 if slot is None or is_resident else sequence.load_bytes + adapter.size_bytes
        return slot

    def _tell(self) -> None:
        """From a loading thread: what was not ready may be."""
        self._has_news = True
        self._wake()

    def _run(self, work: Work, started: float) -> list[Event]:
        try:
            logits = self._runner.forward(work)
            tokens = self._advance(work, logits)
            self._keep(work)
        except Exception:
            # One broken step must not end the engine; whatever it computed cannot be trusted.
            logger.exception("step failed: %s", [sequence.id for sequence in work.sequences])
            error = "The engine failed while computing this answer. Retry; if it happens again, see the engine's log."
            return [self._fail(s, TuneloomError(error)) for s in work.sequences if s.id in self._sequences]
        self._measure(work, len(tokens), (self._clock() - started) * 1000)
        return [self._take(sequence, token) for sequence, token in tokens]

    def _measure(self, work: Work, num_answers: int, elapsed_ms: float) -> None:
        self._scheduler.done(work, elapsed_ms)
        gain = 0.05 if self._step_ms else 1
        self._step_ms += (elapsed_ms - self._step_ms) * gain
        self._step_tokens += (work.num_tokens - self._step_tokens) * gain
        self._step_answers += (num_answers - self._step_answers) * gain

    def _charge(self, work: Work, elapsed_s: float) -> None:
        """Share the time of a step among its sequences, also of one that failed."""
        self._busy_s += elapsed_s
        share = elapsed_s / work.num_tokens
        for sequence in work.decoding:
            sequence.request.meter.device_s += share
        for sequence, count in work.prefilling:
            sequence.request.meter.device_s += share * count

    def _advance(self, work: Work, logits: Tensor | None) -> list[tuple[Sequence, TokenOutput | TuneloomError]]:
        """Count what was computed, and choose the next tokens of those that have all of theirs computed."""
        sampling = list(work.decoding)
        for sequence in work.decoding:
            sequence.num_computed += 1
        for sequence, count in work.prefilling:
            sequence.num_computed += count
            if not sequence.num_pending:
                sampling.append(sequence)
        if logits is None:
            return []
        return list(zip(sampling, sample(logits, sampling), strict=True))

    def _keep(self, work: Work) -> None:
        """Leave what was computed to others; a sequence that fails takes it back."""
        for sequence in work.sequences:
            assert sequence.cache_slot is not None
            self._prefix.save(sequence.chain, sequence.cache_slot, sequence.num_computed)

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
        return sequence.id, SequenceOutput((token,), reason, sequence.num_cached)

    def _expire(self, now: float) -> list[Event]:
        """End what is past its deadline, or has waited too long for its adapter."""
        events = []
        for id in self._alarms.due(now, self._sequences):
            sequence = self._sequences.get(id)
            if sequence is None:
                continue
            if now >= sequence.deadline_at:
                events.append(self._fail(sequence, too_late(sequence)))
            elif sequence.cache_slot is None and sequence.adapter is not None:
                limit = self.config.adapter_timeout_s
                if self.adapters.is_loaded(sequence.adapter):
                    self._alarms.set(now + limit, id)
                elif now - sequence.waiting_since >= limit:
                    message = f"The adapter was not loaded within {limit:g} s. Retry in a moment."
                    events.append(self._fail(sequence, Overloaded(message, retry_after_s=5.0)))
        return events

    def _fail(self, sequence: Sequence, error: TuneloomError) -> Event:
        self._end(sequence, is_clean=False)
        return sequence.id, error

    def _end(self, sequence: Sequence, *, is_clean: bool) -> None:
        """Give back all that a sequence holds."""
        del self._sequences[sequence.id]
        self._scheduler.remove(sequence)
        self._prefix.close(sequence.chain, is_clean=is_clean)
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
