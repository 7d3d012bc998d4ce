"""Decides what each step computes: which sequences run, and how many tokens of each. Integers only, no tensors.

- Every running sequence that decodes gets its token in each step; only owners that are ahead of others may sit one out
  (`pace`). What the step has left goes to prompts, in chunks, within a time that keeps the answers flowing.
- Places and prompt tokens go to the owner that was served least (`accounts`); within one owner to the highest priority,
  then to the earliest. A deadline ends a sequence, it does not move it up.
- One whose adapter is not ready lets others pass. One for which the cache has no room does not: small ones would keep a
  large one waiting for ever.
- Of prompts that begin alike one goes on; the others wait for the tokens that it computes for all of them.
- When the cache is full, running ones are preempted: they wait again and are computed anew later, answer included.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tuneloom.engine.accounts import Account, Accounts
from tuneloom.engine.adapter_turns import AdapterTurns
from tuneloom.engine.pace import Load, Pace, StepCost
from tuneloom.engine.sequence import Sequence
from tuneloom.engine.work import Limits, Outcome, Resources, Work

# Prefill goes on by at least this many tokens a step, however many sequences decode.
LEAST_PREFILL = 16
# Sequences that are not ready are passed over up to this many in a plan; the next goes on behind them.
_MOST_FAILURES = 256
# Outcomes after which others have their turn.
_PASSING = (Outcome.COMPILING, Outcome.LOADING, Outcome.NO_SLOT)


@dataclass
class Scheduler:
    """The queues and the running set."""

    limits: Limits
    resources: Resources
    cost: StepCost = field(default_factory=StepCost)
    running: dict[Sequence, None] = field(default_factory=dict)
    num_waiting: int = 0
    waiting_tokens: int = 0
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.accounts = Accounts()
        self._pace = Pace(self.cost)
        self._turns = AdapterTurns()
        self._num_added = 0
        self._has_news = False
        self._num_failures = 0

    def add(self, sequence: Sequence) -> None:
        self._num_added += 1
        sequence.number = self._num_added
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; one that neither waits nor runs is fine."""
        if sequence in self.running:
            self._stop(sequence)
        elif self.accounts.is_waiting(sequence):
            self._count_waiting(sequence, -1)
        else:
            return
        self.accounts.leave(sequence)

    def news(self) -> None:
        """Adapters that were not ready may be: one was loaded, or a slot given back."""
        self._has_news = True

    def plan(self, now: float) -> Work:
        """The work of the next step; admits waiting sequences, and preempts running ones where the cache is full."""
        self._make_room(now)
        if self.num_waiting:
            self._admit_waiting(now)
        resting = self._resting()
        awake = [sequence for sequence in self.running if sequence.owner not in resting]
        decoding = sorted((s for s in awake if s.is_decoding), key=lambda s: s.cache_slot or 0)
        prefilling = self._share_out(awake, self._prefill_budget(len(decoding)))
        return Work(decoding, prefilling, resting)

    def done(self, work: Work, elapsed_ms: float) -> None:
        """A planned step was computed: charge it, and learn from its time. To be called before any of it is removed."""
        for sequence in work.decoding:
            self.accounts.get(sequence.owner).served += self.limits.decode_weight
        self.cost.observe(len(work.decoding), work.num_prefill, elapsed_ms)
        if self.accounts.num_active > 1:
            self._pace.observe(_loads_of(work), work.resting, self.accounts.num_active, elapsed_ms)

    def _make_room(self, now: float) -> None:
        """Room in the cache for the next token of each that decodes; preempts until there is."""
        for sequence in [sequence for sequence in self.running if sequence.is_decoding]:
            while sequence in self.running and not self.resources.extend(sequence):
                self._preempt(self._victim(), now)

    def _victim(self) -> Sequence:
        """Of the owner that holds most of the cache, the lowest priority, then the latest."""
        held = _held(self.running)
        latest = {sequence.owner: sequence.number for sequence in sorted(self.running, key=lambda s: s.number)}
        return _last(self.accounts.get(max(held, key=lambda owner: (held[owner], latest[owner]))))

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self.num_preemptions += 1
        self.resources.take_back(sequence)
        self._stop(sequence)
        sequence.waiting_since = now
        self._wait(sequence)
        del self.accounts.get(sequence.owner).running[sequence]

    def _prefill_budget(self, num_decoding: int) -> int:
        """Prompt tokens of a step: what is left of its tokens, and of its time if answers wait for it."""
        left = self.limits.max_step_tokens - num_decoding
        if num_decoding:
            left = int(min(left, self.cost.prompt_tokens_within(self.limits.max_step_ms, num_decoding)))
        return max(left, min(LEAST_PREFILL, self.limits.max_step_tokens))

    def _share_out(self, awake: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
        """Chunks of prompts: first those of the owner that was served least."""
        chunks: list[tuple[Sequence, int]] = []
        for sequence in sorted((s for s in awake if not s.is_decoding), key=self._rank):
            if budget <= 0:
                break
            if self.resources.goes_on(sequence):
                count = min(budget, sequence.num_pending)
                chunks.append((sequence, count))
                budget -= count
        return chunks

    def _rank(self, sequence: Sequence) -> tuple[float, int, int]:
        return self.accounts.get(sequence.owner).served, -sequence.request.priority, sequence.number

    def _resting(self) -> frozenset[str]:
        """Owners whose sequences sit the next step out."""
        if self.accounts.num_active < 2:
            return frozenset()
        rows, prompt = Counter[str](), Counter[str]()
        for sequence in self.running:
            if sequence.is_decoding:
                rows[sequence.owner] += 1
            else:
                prompt[sequence.owner] += sequence.num_pending
        budget = self._prefill_budget(rows.total())
        loads = {owner: Load(rows[owner], min(prompt[owner], budget)) for owner in rows | prompt}
        return self._pace.resting(loads, self.accounts.num_active)

    def _admit_waiting(self, now: float) -> None:
        """Give places to waiting sequences, as far as the step has tokens for their prompts."""
        self._turns.begin(now)
        self._begin_round()
        prefilling = [sequence for sequence in self.running if not sequence.is_decoding]
        left = self._prefill_budget(len(self.running) - len(prefilling)) - sum(s.num_pending for s in prefilling)
        most = min((self.accounts.get(s.owner).served for s in prefilling), default=0.0)
        while (account := self.accounts.take()) is not None:
            # A newcomer does not wait for the prompts of those that were served more.
            outcome = self._admit_one(account, now) if left > 0 or account.served < most else Outcome.NO_ROOM
            if outcome is Outcome.ADMITTED:
                admitted = next(reversed(self.running))
                left -= admitted.num_pending
                most = min(most, account.served)
            if outcome in _PASSING:
                self.accounts.park(account)
            else:
                self.accounts.list(account)
            if outcome is Outcome.NO_ROOM or self._num_failures >= _MOST_FAILURES:
                return

    def _begin_round(self) -> None:
        """Give another chance to those that were passed over, on news or after a while.

        A round that was cut short is ended first: news at every step must not keep its last ones from their chance.
        """
        is_cut = self._num_failures >= _MOST_FAILURES
        self._num_failures = 0
        if not is_cut and (self._has_news or not self.running or self._turns.is_time_to_ask()):
            self._has_news = False
            self._turns.ask_again()
            self.accounts.unpark()

    def _admit_one(self, account: Account, now: float) -> Outcome:
        """Run the first sequence of the account whose adapter is ready; `LOADING` if there is none."""
        for sequence in account.heads():
            if not self._turns.may_try(sequence.adapter_key):
                continue
            outcome = self._try(sequence, account, now)
            if outcome is Outcome.ADMITTED:
                self._start(sequence, account)
            elif outcome is Outcome.REFUSED:
                self.remove(sequence)
            if outcome not in _PASSING:
                return outcome
            self._num_failures += 1
            if outcome is not Outcome.COMPILING:
                self._turns.not_ready(sequence.adapter_key, now, is_loaded=outcome is Outcome.NO_SLOT)
            if self._num_failures >= _MOST_FAILURES:
                return Outcome.NO_ROOM
        return Outcome.LOADING

    def _try(self, sequence: Sequence, account: Account, now: float) -> Outcome:
        """Admit a sequence, if need be in place of one of an owner that holds more than its share."""
        while True:
            has_place = len(self.running) < self.limits.max_running
            outcome = self.resources.admit(sequence) if has_place else Outcome.NO_ROOM
            victim = None
            if outcome is Outcome.NO_ROOM and not account.running:
                if not self.resources.is_ready(sequence):
                    return Outcome.LOADING
                victim = self._one_to_yield(sequence) if has_place else self._one_to_give_its_place()
            if victim is None:
                return outcome
            self._preempt(victim, now)

    def _one_to_give_its_place(self) -> Sequence | None:
        """The last of an owner that has more than its share of the places, for an owner that has none."""
        places = Counter(sequence.owner for sequence in self.running)
        owner, count = places.most_common(1)[0]
        share = self.limits.max_running / self.accounts.num_active
        return _last(self.accounts.get(owner)) if count > max(1, share) else None

    def _one_to_yield(self, sequence: Sequence) -> Sequence | None:
        """The last of an owner that has more than its share of the cache, for one that needs no more than its own."""
        held = _held(self.running)
        share = self.limits.cache_tokens / self.accounts.num_active
        if not held or sequence.num_tokens > share:
            return None
        owner, tokens = held.most_common(1)[0]
        return _last(self.accounts.get(owner)) if tokens > share else None

    def _start(self, sequence: Sequence, account: Account) -> None:
        """Count an admitted sequence as running, and charge for its prompt and for what was loaded for it."""
        self._count_waiting(sequence, -1)
        self.accounts.start(account, sequence)
        self.running[sequence] = None
        self._turns.started(sequence.adapter_key)
        fresh = max(0, sequence.num_tokens - max(sequence.num_computed, sequence.num_charged))
        sequence.num_charged = sequence.num_tokens
        account.served += fresh + sequence.load_bytes / self.limits.adapter_bytes_per_token
        sequence.load_bytes = 0

    def _stop(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self._turns.ended(sequence.adapter_key)
        self.news()

    def _wait(self, sequence: Sequence) -> None:
        self.accounts.enter(sequence)
        self._count_waiting(sequence, 1)

    def _count_waiting(self, sequence: Sequence, change: int) -> None:
        self.num_waiting += change
        # Not what is pending: one that was just admitted may have found some of its tokens computed.
        self.waiting_tokens += change * sequence.num_tokens
        if change > 0:
            self._turns.entered(sequence.adapter_key)
        else:
            self._turns.gone(sequence.adapter_key)


def _held(running: Iterable[Sequence]) -> Counter[str]:
    """Tokens by owner."""
    held = Counter[str]()
    for sequence in running:
        held[sequence.owner] += sequence.num_tokens
    return held


def _last(account: Account) -> Sequence:
    """Of what runs of an owner, the lowest priority, then the latest."""
    return max(account.running, key=lambda sequence: (-sequence.request.priority, sequence.number))


def _loads_of(work: Work) -> dict[str, Load]:
    rows = Counter(sequence.owner for sequence in work.decoding)
    prompt = Counter[str]()
    for sequence, count in work.prefilling:
        prompt[sequence.owner] += count
    return {owner: Load(rows[owner], prompt[owner]) for owner in rows | prompt}
