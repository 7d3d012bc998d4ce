"""Processes die without warning; jobs end once and truly, streams end in an error event, the service comes back."""

import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import (
    BASE,
    Home,
    all_events,
    rows_jsonl,
    start_job,
    steps_of,
    wait_for,
    wait_for_job,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

REPLICA = {
    "control": ("ServeReplica:control",),
    "ingress": ("ServeReplica:gateway",),
    "base": ("ServeReplica:base-",),
    "driver": ("-m", "tuneloom.train"),
    "worker": ("RayTrainWorker",),
}
EPOCHS, ROWS = 16, 100
TOTAL_STEPS = EPOCHS * ROWS // 4


def answers(home: Home) -> bool:
    reply = home.client(max_retries=0).chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "hello"}], max_tokens=2
    )
    return bool(reply.choices)


def is_ready(home: Home) -> bool:
    return httpx.get(f"{home.state.api_url}/readyz", timeout=5).status_code == 200


def check_ended_well(client: openai.OpenAI, job_id: str, suffix: str) -> None:
    """Succeeded once: one Version, each step reported once, every file still there."""
    job = wait_for_job(client, job_id, "succeeded", timeout_s=300)
    assert steps_of(all_events(client, job_id)) == list(range(1, TOTAL_STEPS + 1))
    versions = [model.id for model in client.models.list() if model.id.startswith(f"{suffix}@")]
    assert versions == [f"{suffix}@v1"]
    for file_id in [job.training_file, *job.result_files]:
        assert client.files.content(file_id).read()
    assert (
        sum(event.message.startswith("The job has successfully completed") for event in all_events(client, job_id)) == 1
    )


@pytest.mark.parametrize(
    "deaths",
    [
        [(1, "worker"), (80, "driver"), (160, "control"), (240, "ingress")],
        [(1, "ingress"), (80, "control"), (160, "worker"), (240, "driver")],
    ],
    ids=lambda deaths: "-".join(victim for _, victim in deaths),
)
def test_a_job_survives_the_death_of_each_process_at_several_points(home: Home, deaths: list[tuple[int, str]]) -> None:
    client = home.client(max_retries=8)
    suffix = f"dies-{deaths[0][1]}"
    job = start_job(client, rows_jsonl(ROWS), suffix=suffix, epochs=EPOCHS, checkpoint_every_steps=25)
    for step, victim in deaths:
        wait_for(f"step {step}", functools.partial(has_reached, client, job.id, step), 240, 0.1)
        home.kill(*REPLICA[victim])

    check_ended_well(client, job.id, suffix)
    wait_for("an answer", lambda: answers(home), 60)


def num_steps(client: openai.OpenAI, job_id: str) -> int:
    """The last step that the job's events tell of."""
    newest = client.fine_tuning.jobs.list_events(job_id, limit=20).data
    return max(steps_of(newest), default=0)


def has_reached(client: openai.OpenAI, job_id: str, step: int) -> bool:
    return num_steps(client, job_id) >= step


def stream(home: Home, tokens: int = 400) -> Iterator[Any]:
    return iter(
        home.client(max_retries=0).chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": "rain"}],
            max_tokens=tokens,
            temperature=1.5,
            logit_bias={"2": -100},
            stream=True,
        )
    )


def is_back(home: Home) -> None:
    """The service answers, and says so, within a minute."""
    wait_for("an answer", lambda: answers(home), 60)
    wait_for("ready", lambda: is_ready(home), 60)


@pytest.mark.parametrize("victim", ["base", "ingress"])
def test_streams_of_a_killed_replica_end_in_an_error_event_and_it_is_back_within_60_s(home: Home, victim: str) -> None:
    is_back(home)
    # So long that none is over before the kill.
    streams = [stream(home, tokens=7000) for _ in range(4)]
    for open_stream, after_chunks in zip(streams, (1, 1, 10, 10), strict=True):
        for _ in range(after_chunks):
            next(open_stream)

    home.kill(*REPLICA[victim])

    for open_stream in streams:
        with pytest.raises(openai.APIError) as error:
            for _ in open_stream:
                pass
        assert not isinstance(error.value, openai.APIConnectionError), "the stream broke without an error event"
    is_back(home)


def test_streams_do_not_notice_the_death_of_control_and_it_is_back_within_60_s(home: Home) -> None:
    is_back(home)
    streams = [stream(home) for _ in range(4)]
    for open_stream in streams:
        next(open_stream)

    home.kill(*REPLICA["control"])

    for open_stream in streams:
        assert [chunk.choices[0].finish_reason for chunk in open_stream][-1] == "length"
    is_back(home)


def test_a_closed_stream_frees_its_place(home: Home) -> None:
    wait_for("an answer", lambda: answers(home), 60)
    for _ in range(3):
        streams = [stream(home, tokens=450) for _ in range(16)]
        for open_stream in streams:
            next(open_stream)
        for open_stream in streams:
            open_stream.close()
        del streams
        # Sixteen fill every place: the next is answered only if they were freed.
        started = time.monotonic()
        assert answers(home)
        assert time.monotonic() - started < 30


def test_no_request_waits_for_another_to_finish(home: Home) -> None:
    long = stream(home, tokens=450)
    next(long)
    done = threading.Event()

    def drain() -> None:
        for _ in long:
            pass
        done.set()

    threading.Thread(target=drain, daemon=True).start()
    assert answers(home)
    assert not done.is_set()
    assert done.wait(120)
