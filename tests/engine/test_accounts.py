from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_scheduler import adapter, sequence
from tuneloom.engine.accounts import Accounts
from tuneloom.engine.sequence import Sequence


def numbered(id: int, **more) -> Sequence:
    made = sequence(str(id), 5, **more)
    made.number = id
    return made


def test_a_pause_earns_no_credit():
    accounts = Accounts()
    busy, idle = numbered(1, owner="busy"), numbered(2, owner="idle")
    accounts.enter(busy)
    accounts.get("busy").served = 500
    accounts.enter(idle)
    assert accounts.get("idle").served == 500


def test_who_comes_when_nobody_is_left_starts_where_the_last_one_ended():
    accounts = Accounts()
    first = numbered(1, owner="first")
    accounts.enter(first)
    accounts.get("first").served = 300
    accounts.leave(first)
    accounts.enter(numbered(2, owner="second"))
    assert accounts.get("second").served == 300


def test_who_was_served_more_than_others_is_remembered_while_away():
    accounts = Accounts()
    stays, goes = numbered(1, owner="stays"), numbered(2, owner="goes")
    accounts.enter(stays)
    accounts.enter(goes)
    accounts.get("goes").served = 900
    accounts.leave(goes)
    accounts.enter(numbered(3, owner="goes"))
    assert accounts.get("goes").served == 900


def test_accounts_that_say_nothing_any_more_are_forgotten():
    accounts = Accounts()
    accounts.enter(numbered(0, owner="stays"))
    for i in range(1, 5000):
        each = numbered(i, owner=f"o{i}")
        accounts.enter(each)
        accounts.get(each.owner).served += 1
        accounts.leave(each)
        accounts.get("stays").served = float(i)
    assert len(list(accounts)) < 1100


@given(st.lists(st.tuples(st.sampled_from(["add", "drop", "take", "charge"]), st.integers(0, 9)), max_size=80))
@settings(max_examples=100, deadline=None)
def test_turns_go_to_the_lowest_counter_and_heads_are_the_first_that_wait(moves: list[tuple[str, int]]):
    accounts, waiting, number = Accounts(), [], 0
    for move, at in moves:
        if move == "add":
            number += 1
            key = [None, "x", "y"][at % 3]
            each = numbered(number, owner="abcd"[at % 4], priority=at % 2, adapter=adapter(key) if key else None)
            accounts.enter(each)
            waiting.append(each)
        elif move == "drop" and waiting:
            accounts.leave(waiting.pop(at % len(waiting)))
        elif move == "charge" and waiting:
            accounts.get(waiting[at % len(waiting)].owner).served += at
        elif move == "take" and waiting:
            account = accounts.take()
            assert account is not None
            assert account.served == min(accounts.get(each.owner).served for each in waiting)
            own = [each for each in waiting if each.owner == account.owner]
            first = {}
            for each in sorted(own, key=lambda each: (-each.request.priority, each.number)):
                first.setdefault(each.adapter_key, each)
            assert account.heads() == list(first.values())
            accounts.list(account)
        assert accounts.num_active == len({each.owner for each in waiting})
