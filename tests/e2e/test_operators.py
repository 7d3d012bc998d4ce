"""What operators see and do, on the cluster, through the command line as they would."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import BASE, Home, wait_for
from tests.tiny import make_adapter

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def ask(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "rain"}], max_tokens=4, temperature=0
    )
    return answer.choices[0].message.content or ""


def look(home: Home) -> dict[str, Any]:
    (base,) = json.loads(home.run("status", "--bases", "--json"))
    return base


def tiers(home: Home) -> dict[str, tuple[str, bool]]:
    """Where the adapters are, and whether they are pinned, by their model."""
    return {
        model["name"]: (each["tier"], each["pinned"]) for each in look(home)["adapters"] for model in each["models"]
    }


def test_an_operator_prewarms_pins_and_unloads_and_sees_it(home: Home, client: openai.OpenAI, tmp_path: Path) -> None:
    for number in (1, 2):
        folder = make_adapter(tmp_path / f"op{number}", home.path / "source", seed=500 + number, base_id=BASE)
        home.run("models", "import", str(folder), "--name", f"op{number}")

    assert "ok" in home.run("models", "prewarm", "op1")
    assert tiers(home)["op1@v1"] == ("host", False)
    home.run("models", "pin", "op1@v1")
    home.run("models", "prewarm", "op2")
    first = ask(client, "op1"), ask(client, "op2")
    wait_for(
        "both in slots", lambda: {"op1@v1": ("slot", True), "op2@v1": ("slot", False)}.items() <= tiers(home).items()
    )

    (replica,) = look(home)["replicas"]
    assert replica["status"] == "ok" and replica["tokens_generated"] > 0 and replica["step_ms"] > 0
    assert replica["details"]["mode"] == "batched" and replica["details"]["memory"]["items"]
    assert {"slot", "host", "disk"} == replica["tiers"].keys()
    assert replica["tiers"]["disk"]["count"] >= 2 and replica["tiers"]["slot"]["size_bytes"] > 0
    table = home.run("status", "--bases")
    assert "op1@v1" in table and "batched" in table and "pinned on all replicas" in table

    home.run("models", "unload", "op2")
    assert "op2@v1" not in tiers(home)
    assert "pinned" in json.dumps(unload(home, "op1").json())
    home.run("models", "unpin", "op1")
    home.run("models", "unload", "op1")
    assert not {"op1@v1", "op2@v1"} & tiers(home).keys()
    assert (ask(client, "op1"), ask(client, "op2")) == first


def test_a_replica_that_starts_later_knows_the_pins(home: Home, client: openai.OpenAI, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "kept", home.path / "source", seed=503, base_id=BASE)
    home.run("models", "import", str(folder), "--name", "kept")
    home.run("models", "pin", "kept")
    (before,) = (replica["id"] for replica in look(home)["replicas"])
    home.kill("ray::ServeReplica:base-", "Base")
    wait_for("a new replica", lambda: [r for r in look(home)["replicas"] if r["status"] == "ok" and r["id"] != before])
    wait_for("the pin", lambda: tiers(home).get("kept@v1", ("none", False)) in (("host", True), ("slot", True)), 30)
    home.run("models", "unpin", "kept")


def unload(home: Home, model: str) -> httpx.Response:
    answer = httpx.post(
        f"{home.url}/tuneloom/bases/{BASE}/unload",
        json={"model": model},
        headers={"Authorization": f"Bearer {home.admin_key}"},
        timeout=60,
    )
    assert answer.status_code == 409
    return answer
