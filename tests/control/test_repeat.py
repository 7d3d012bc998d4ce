import time
from dataclasses import replace

import pytest

from tuneloom.control.repeat import KEY_LIFE_S, RETRY_WINDOW_S, Request, create_once
from tuneloom.domain import Model, Repeat
from tuneloom.errors import Unprocessable


class Creator:
    """Creates a numbered object a call, and counts."""

    def __init__(self, store) -> None:
        self.store = store
        self.made = 0
        self.before_commit = lambda: None

    def __call__(self, request: Request) -> str:
        return create_once(self.store.records, request, self._make, lambda id: id)

    def _make(self):
        self.made += 1
        id = f"object-{len(self.store.records.models.query()) + 1}"
        self.before_commit()
        model = Model(id=id, owner="ada", name=id, base="b", created_at=1.0)
        return id, id, [self.store.records.models.create(model)]


def request(**fields: object) -> Request:
    return replace(Request("ada", "POST /v1/x", "hash", time.time()), **fields)


@pytest.fixture
def create(store) -> Creator:
    return Creator(store)


def test_two_first_tries_make_two_objects(create):
    assert create(request()) != create(request())


def test_a_retry_finds_what_its_first_try_made(create):
    assert create(request()) == create(request(retry_count=1)) == create(request(retry_count=2))


def test_a_retry_whose_first_try_never_came_through_creates(create):
    assert create(request(retry_count=1)) == "object-1"


@pytest.mark.parametrize("other", [{"owner": "bob"}, {"route": "POST /v1/y"}, {"body_sha256": "else"}])
def test_a_retry_finds_nothing_of_another_owner_route_or_body(create, other):
    assert create(request()) != create(request(retry_count=1, **other))


def test_a_retry_does_not_find_an_old_create(create):
    first = create(request())
    late = request(retry_count=1, arrived_at=time.time() + RETRY_WINDOW_S + 1)
    assert create(late) != first


def test_a_first_try_that_was_overtaken_by_its_retry_answers_the_same_object(create):
    first = request()
    overtaken = []

    def retry_arrives() -> None:
        create.before_commit = lambda: None
        overtaken.append(create(request(retry_count=1)))

    create.before_commit = retry_arrives
    assert create(first) == overtaken[0] == "object-1"


def test_a_retry_that_was_overtaken_by_its_first_try_answers_the_same_object(create):
    first = []

    def first_commits() -> None:
        create.before_commit = lambda: None
        first.append(create(request(arrived_at=time.time() - 5)))

    create.before_commit = first_commits
    assert create(request(retry_count=1)) == first[0] == "object-1"


def test_two_alike_first_tries_at_once_are_two_objects(create):
    other = []

    def another_user() -> None:
        create.before_commit = lambda: None
        other.append(create(request()))

    create.before_commit = another_user
    assert create(request()) != other[0]


def test_an_idempotency_key_answers_the_same_and_refuses_another_body(create):
    first = create(request(key="k"))
    assert create(request(key="k")) == first
    with pytest.raises(Unprocessable):
        create(request(key="k", body_sha256="else"))
    assert create(request(key="k", owner="bob")) != first


def test_an_idempotency_key_is_forgotten_after_two_days(create, store):
    asked = request(key="k")
    first = create(asked)
    stored = store.records.repeats.get(asked.row_id)
    old = Repeat.model_validate({**stored.value.model_dump(), "created_at": time.time() - KEY_LIFE_S - 1})
    store.records.commit(store.records.repeats.replace(stored, old))
    assert create(request(key="k", body_sha256="else")) != first
