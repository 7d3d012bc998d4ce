"""All processes of the installation die at once, beside another Ray of the host; `up` brings everything back.

The last that `home` goes through: it ends with `down`.
"""

import functools
import time

import pytest

from tests.e2e.conftest import Home, all_events, exports, rows_jsonl, start_job, wait_for
from tests.e2e.foreign import foreign_cluster
from tests.e2e.test_faults import EPOCHS, ROWS, answers, check_ended_well, has_reached
from tuneloom import cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_power_cuts_lose_nothing_and_down_ends_what_is_of_this_home_alone(home: Home) -> None:
    with foreign_cluster() as foreign:
        power_cuts_lose_nothing(home)
        assert foreign.is_running()
        assert answers(home)

        started = time.monotonic()
        home.run("down")
        assert time.monotonic() - started < 30
        assert not cluster.processes(home.path)
        assert foreign.is_running()
    assert home.call("status").returncode == 3
    assert home.call("env").returncode == 3
    assert "nothing was running" in home.run("down")


def power_cuts_lose_nothing(home: Home) -> None:
    client, key = home.client(max_retries=8), exports(home)["OPENAI_API_KEY"]
    kept = client.files.create(file=("kept.jsonl", rows_jsonl(10)), purpose="fine-tune")
    job = start_job(client, rows_jsonl(ROWS), suffix="power", epochs=EPOCHS, checkpoint_every_steps=25)
    for step in (1, 160):
        wait_for(f"step {step}", functools.partial(has_reached, client, job.id, step), 240, 0.1)
        seen = {event.id for event in all_events(client, job.id)}

        home.kill()
        wait_for("all dead", lambda: not home.pids(), 20)
        status = home.call("status")
        assert status.returncode == 3 and "its processes have ended" in status.stdout
        assert "admin key" not in home.run("up")

        assert exports(home)["OPENAI_API_KEY"] == key
        client = home.client(max_retries=8)
        assert client.files.content(kept.id).read() == rows_jsonl(10)
        assert seen <= {event.id for event in all_events(client, job.id)}
    check_ended_well(client, job.id, "power")
    resumed = [event.message for event in all_events(client, job.id) if "resumed at step" in event.message]
    assert any(int(message.rpartition(" ")[2]) >= 125 for message in resumed), resumed
