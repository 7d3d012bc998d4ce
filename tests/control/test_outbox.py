"""What ends a job, makes a version or activates one is told once to each endpoint that wants it, in the same commit."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.control.conftest import add_job
from tests.control.test_models import add_version
from tests.control.test_reconcile_faults import ACTIONS, World
from tuneloom.control import deletion, jobs, models, outbox
from tuneloom.control.jobs import TRANSITIONS, apply
from tuneloom.control.writer import JobWriter
from tuneloom.domain import EVENT_TYPES, TERMINAL, Hyperparameters, JobError, WebhookDelivery, WebhookEndpoint
from tuneloom.store import Store
from tuneloom.store.base import StoreConflict

JOB_EVENTS = tuple(type for type in EVENT_TYPES if type.startswith("fine_tuning."))
EVENTS = {
    jobs.Published: jobs.Published(1.0, "ft:x", "ada:bot:v1", (), 10, Hyperparameters()),
    jobs.Failed: jobs.Failed(1.0, JobError(code="boom", message="It broke.")),
    jobs.Cancelled: jobs.Cancelled(1.0),
}
ENDING = [
    (event, state)
    for event, allowed in TRANSITIONS.items()
    for state, after in allowed.items()
    if after in TERMINAL and state not in TERMINAL
]


def add_endpoint(store: Store, id: str = "we_1", owner: str = "ada", types=EVENT_TYPES, **fields) -> WebhookEndpoint:
    endpoint = WebhookEndpoint(
        id=id,
        owner=owner,
        url="https://example.com/hook",
        name="",
        event_types=types,
        secret="",
        secret_hint="",
        created_at=1.0,
        updated_at=1.0,
        **fields,
    )
    store.records.commit(store.records.webhook_endpoints.create(endpoint))
    return endpoint


def rows(store: Store) -> list[WebhookDelivery]:
    found = [stored.value for stored in store.records.webhook_deliveries.query()]
    return sorted(found, key=lambda row: (row.sequence, row.endpoint_id))


def test_every_way_to_end_is_tested():
    assert {event for event, _ in ENDING} == EVENTS.keys()


@pytest.mark.parametrize(("event", "state"), ENDING)
def test_each_end_is_told_once_to_each_endpoint_that_wants_it(store, event, state):
    add_endpoint(store, "we_1")
    add_endpoint(store, "we_2", types=JOB_EVENTS)
    add_endpoint(store, "we_off", disabled_at=1.0)
    add_endpoint(store, "we_other", types=("tuneloom.version.created",))
    add_endpoint(store, "we_bob", owner="bob")
    job = add_job(store, state=state)
    stored = store.records.jobs.get(job.id)
    after = apply(job, EVENTS[event])
    writer = JobWriter(store.records, lambda: 1_800_000_000.25)
    writer.commit(stored, after, [])
    with pytest.raises(StoreConflict):
        writer.commit(stored, after, [])  # the same decision again, on facts that are old by now
    first, second = rows(store)
    assert (first.endpoint_id, second.endpoint_id) == ("we_1", "we_2")
    assert first.body == second.body and first.id != second.id and first.event_id == second.event_id
    assert (first.state, first.next_at, first.owner) == ("pending", 1_800_000_000.25, "ada")
    body = json.loads(first.body)
    told = body["data"].pop("tuneloom")
    assert body == {
        "object": "event",
        "id": first.event_id,
        "type": f"fine_tuning.job.{after.state}",
        "created_at": 1_800_000_000,
        "data": {"id": job.id, "sequence": 1_800_000_000_250_000},
    }
    assert told["model"] == job.spec.base
    if after.state == "succeeded":
        assert (told["version"], told["fine_tuned_model"]) == ("bot@v1", "ft:x")
    if after.state == "failed":
        assert told["error"] == {"code": "boom", "message": "It broke.", "param": None}


def test_what_does_not_end_a_job_is_not_told(store):
    add_endpoint(store)
    job = add_job(store, state="running", attempt=1, attempt_open=True)
    writer = JobWriter(store.records, lambda: 2.0)
    writer.commit(store.records.jobs.get(job.id), apply(job, jobs.Paused()), [])
    stored = store.records.jobs.get(job.id)
    writer.commit(stored, apply(stored.value, jobs.Cancelled(2.0)), [])
    stored = store.records.jobs.get(job.id)
    writer.commit(stored, apply(stored.value, jobs.Closed()), [])
    assert [row.type for row in rows(store)] == ["fine_tuning.job.cancelled"]


def test_a_cancel_by_the_api_is_told_once(api):
    add_endpoint(api.store)
    job = api.create_job()
    path = f"/v1/fine_tuning/jobs/{job['id']}/cancel"
    assert api.post(path).status_code == 200
    assert api.post(path).status_code == 409
    assert api.post(path, headers={"x-stainless-retry-count": "1"}).status_code == 200
    (row,) = rows(api.store)
    assert (row.type, json.loads(row.body)["data"]["id"]) == ("fine_tuning.job.cancelled", job["id"])


def test_versions_are_told_when_they_come_and_when_they_answer(store):
    add_endpoint(store, types=("tuneloom.version.created", "tuneloom.version.activated"))
    add_version(store)
    add_version(store)
    models.activate(store.records, "ada", "bot", 2)
    models.activate(store.records, "ada", "bot", 2)
    models.rollback(store.records, "ada", "bot")
    deletion.delete(store, "ada", "bot@v1")
    told = [(row.type.rpartition(".")[2], json.loads(row.body)["data"]) for row in rows(store)]
    assert sorted((kind, data["id"]) for kind, data in told) == [
        ("activated", "bot@v1"),
        ("activated", "bot@v1"),
        ("activated", "bot@v2"),
        ("activated", "bot@v2"),
        ("created", "bot@v1"),
        ("created", "bot@v2"),
    ]
    assert told[-1] == (
        "activated",
        {"id": "bot@v2", "model": "bot", "version": 2, "previous_version": 1, "sequence": told[-1][1]["sequence"]},
    )


def test_a_body_that_is_too_large_names_the_thing_alone(store):
    endpoint = add_endpoint(store)
    row = outbox.delivery(endpoint, "tuneloom.draft.failed", {"id": "draft_1", "why": "ü" * 10_000}, 2.0)
    assert json.loads(row.body)["data"] == {"id": "draft_1", "sequence": 2_000_000}
    row = outbox.delivery(endpoint, "tuneloom.draft.failed", {"id": "draft_1", "why": "ü" * 9_000}, 2.0)
    assert len(json.loads(row.body)["data"]["why"]) == 9_000 and len(row.body.encode()) < 20_000


def test_ids_of_events_sort_by_time(store):
    endpoint = add_endpoint(store)
    ids = [outbox.delivery(endpoint, "x", {"id": "x"}, 1.8e9 + i * 2e-6).event_id for i in range(50)]
    assert ids == sorted(ids) and len(set(ids)) == 50


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(actions=ACTIONS)
def test_whatever_happens_to_control_each_end_is_told_once(actions):
    """Crashes around every commit, restarts, lost attempts, cancels: one row for each job and endpoint, none before."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for id in ("we_1", "we_2"):
            add_endpoint(world.store, id)
        for action, n in actions:
            world.do(action, n)
            assert_told(world)
        world.settle()
        assert_told(world)
        versions = [json.loads(row.body)["data"]["id"] for row in rows(world.store) if row.type.endswith("created")]
        made = [stored.value.pinned_name for stored in world.store.records.versions.query()]
        assert sorted(versions) == sorted(made * 2)
        world.store.close()


def assert_told(world: World) -> None:
    ended = {(job.id, f"fine_tuning.job.{job.state}") for job in world.jobs() if job.is_terminal}
    # The owner's own cancels are the API's to tell; here they are written without it.
    ended = {(id, type) for id, type in ended if id not in world.cancelled}
    told = [row for row in rows(world.store) if row.type in JOB_EVENTS]
    seen = sorted((row.endpoint_id, json.loads(row.body)["data"]["id"], row.type) for row in told)
    assert seen == sorted((endpoint, id, type) for endpoint in ("we_1", "we_2") for id, type in ended)
