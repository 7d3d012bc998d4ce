"""What a job on a real cluster did is told to whom it concerns, signed, while another receiver hangs."""

import openai

from tests.control.receivers import hangs, receiver
from tests.e2e.conftest import Home, rows_jsonl, start_job, wait_for, wait_for_job


def test_the_end_of_a_job_reaches_its_receiver_and_a_hanging_one_delays_nothing(home: Home, client: openai.OpenAI):
    with receiver() as seen, receiver(*[hangs] * 4) as stuck:
        slow = client.webhooks.create(url=stuck.url, name="slow", event_types=["fine_tuning.job.succeeded"])
        types = ["fine_tuning.job.succeeded", "tuneloom.version.created", "tuneloom.version.activated"]
        made = client.webhooks.create(url=seen.url, name="quick", event_types=types)
        job = wait_for_job(client, start_job(client, rows_jsonl(20), suffix="hooked").id, "succeeded")
        wait_for("three events", lambda: len(seen.seen) == 3, timeout_s=60)
        events = [client.webhooks.unwrap(each.body, each.headers, secret=made.signing_secret) for each in seen.seen]
        told = {event.type: event.data for event in events}
        assert told["fine_tuning.job.succeeded"].id == job.id
        assert told["fine_tuning.job.succeeded"].tuneloom["fine_tuned_model"] == job.fine_tuned_model
        assert told["tuneloom.version.created"].id == told["tuneloom.version.activated"].id == "hooked@v1"
        log = client.get(f"/tuneloom/webhooks/{made.id}/deliveries", cast_to=dict)
        assert [row["state"] for row in log["data"]] == ["delivered"] * 3
        for endpoint in (slow, made):
            assert client.webhooks.delete(endpoint.id).deleted
