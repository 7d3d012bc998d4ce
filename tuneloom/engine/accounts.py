"""Who has been served how much, who waits, and whose turn it is. Counts tokens; knows no cache, adapter or clock.

Each owner has a counter of the tokens that were computed for it. The waiting owner with the lowest counter is next. An
owner that comes back after a pause starts at the lowest counter of those that are active, so a pause earns no credit.

Source: virtual token counters, Sheng et al. 2024, "Fairness in Serving Large Language Models", algorithm 2.
"""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from tuneloom.engine.sequence import Sequence

# Counters of absent owners that still matter are kept; beyond this many the others are swept out.
_SWEEP_ABOVE = 1024

Need = tuple[str | None, str | None]
Place = tuple[int, int, Sequence]


@dataclass(eq=False)
class Account:
    """One owner: its counter `served`, and its sequences.

    Waiting ones are kept by adapter and grammar, so that one that is not ready is passed over at once however many
    wait for it.
    """

    owner: str
    served: float = 0.0
    running: dict[Sequence, None] = field(default_factory=dict)
    waiting: dict[Sequence, None] = field(default_factory=dict)
    is_listed: bool = False
    is_ranked: bool = False
    _groups: dict[Need, list[Place]] = field(default_factory=dict)
    _num_places: int = 0

    @property
    def is_active(self) -> bool:
        return bool(self.running or self.waiting)

    def put(self, sequence: Sequence) -> None:
        self.waiting[sequence] = None
        heapq.heappush(self._groups.setdefault(_need(sequence), []), _place(sequence))
        self._num_places += 1

    def drop(self, sequence: Sequence) -> None:
        """Take out a waiting sequence. Its place goes when it comes up, or when half of all places are such."""
        del self.waiting[sequence]
        if self._num_places > 2 * len(self.waiting) + 16:
            self._rebuild()
        else:
            self._clear_head(_need(sequence))

    def heads(self) -> list[Sequence]:
        """The first of each adapter and grammar, in the order of priority and arrival."""
        return [group[0][2] for group in sorted(self._groups.values(), key=lambda group: group[0][:2])]

    def _clear_head(self, need: Need) -> None:
        group = self._groups[need]
        while group and group[0][2] not in self.waiting:
            heapq.heappop(group)
            self._num_places -= 1
        if not group:
            del self._groups[need]

    def _rebuild(self) -> None:
        self._groups = {}
        for sequence in self.waiting:
            self._groups.setdefault(_need(sequence), []).append(_place(sequence))
        for group in self._groups.values():
            heapq.heapify(group)
        self._num_places = len(self.waiting)


class Accounts:
    """The accounts of all owners. Waiting ones form a heap by counter, parked ones are left out of it."""

    def __init__(self) -> None:
        self._all: dict[str, Account] = {}
        self._numbers = itertools.count()
        # Counters only grow, so an entry may be too low but never too high; it is corrected when it comes up.
        # Among equals, those of which nothing runs come first.
        self._turns: list[tuple[float, bool, int, Account]] = []
        self._actives: list[tuple[float, int, Account]] = []
        self._parked: dict[Account, None] = {}
        self._floor = 0.0
        self.num_active = 0

    def __iter__(self) -> Iterator[Account]:
        return iter(self._all.values())

    def get(self, owner: str) -> Account:
        return self._all[owner]

    def enter(self, sequence: Sequence) -> None:
        """A sequence waits."""
        account = self._all.get(sequence.owner)
        if account is None:
            account = self._all[sequence.owner] = Account(sequence.owner)
        if not account.is_active:
            account.served = max(account.served, self.floor())
            self.num_active += 1
            if not account.is_ranked:
                account.is_ranked = True
                heapq.heappush(self._actives, (account.served, next(self._numbers), account))
        account.put(sequence)
        self._parked.pop(account, None)
        self.list(account)

    def is_waiting(self, sequence: Sequence) -> bool:
        account = self._all.get(sequence.owner)
        return account is not None and sequence in account.waiting

    def start(self, account: Account, sequence: Sequence) -> None:
        """A waiting sequence runs."""
        account.running[sequence] = None
        account.drop(sequence)

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended, wherever it was."""
        account = self._all[sequence.owner]
        if sequence in account.running:
            del account.running[sequence]
        else:
            account.drop(sequence)
        if not account.is_active:
            self._close(account)

    def floor(self) -> float:
        """The lowest counter of an active owner, or that of the last one that left."""
        while self._actives:
            served, _, account = self._actives[0]
            if not account.is_active:
                heapq.heappop(self._actives)
                account.is_ranked = False
            elif served < account.served:
                heapq.heapreplace(self._actives, (account.served, next(self._numbers), account))
            else:
                return served
        return self._floor

    def list(self, account: Account) -> None:
        """Let a waiting account have its turn."""
        if account.waiting and not account.is_listed:
            account.is_listed = True
            self._push(account)

    def take(self) -> Account | None:
        """The waiting account with the lowest counter, out of the heap until it is listed or parked."""
        while self._turns:
            served, _, _, account = heapq.heappop(self._turns)
            if account.waiting and served < account.served:
                self._push(account)
                continue
            account.is_listed = False
            if account.waiting:
                return account
        return None

    def park(self, account: Account) -> None:
        """Leave an account out until `unpark` or until a sequence of it comes."""
        self._parked[account] = None

    def unpark(self) -> None:
        parked, self._parked = self._parked, {}
        for account in parked:
            self.list(account)

    def _push(self, account: Account) -> None:
        heapq.heappush(self._turns, (account.served, bool(account.running), next(self._numbers), account))

    def _close(self, account: Account) -> None:
        self.num_active -= 1
        self._parked.pop(account, None)
        if not self.num_active:
            self._floor = max(self._floor, account.served)
        if account.served <= self.floor():
            self._forget(account)
        if len(self._all) > 2 * self.num_active + _SWEEP_ABOVE:
            floor = self.floor()
            for each in [each for each in self._all.values() if not each.is_active and each.served <= floor]:
                self._forget(each)

    def _forget(self, account: Account) -> None:
        """A counter at the floor says no more than a new one would."""
        self._all.pop(account.owner, None)


def _place(sequence: Sequence) -> Place:
    return -sequence.request.priority, sequence.number, sequence


def _need(sequence: Sequence) -> Need:
    return sequence.adapter_key, sequence.request.grammar
