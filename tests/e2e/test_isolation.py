"""A wrong adapter never answers: many owners, Models and requests at once, each equal to the single-adapter truth."""

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import BASE, Home
from tests.tiny import make_adapter

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

PROMPTS = [f"{a} {b}" for a in ("rain", "fox", "blue", "hello") for b in ("sun", "left", "2", "why?")]
NEW_TOKENS = 16


class Truth:
    """Greedy answers of transformers + PEFT in fp32, one adapter and one prompt at a time."""

    def __init__(self, source: Path) -> None:
        from transformers import AutoTokenizer

        self.source = source
        self.tokenizer = AutoTokenizer.from_pretrained(source)

    def answers(self, adapter: Path | None) -> dict[str, str]:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.source)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        model.eval()
        found = {}
        for prompt in PROMPTS:
            messages = [{"role": "user", "content": prompt}]
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            found[prompt] = self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return found


def import_adapter(home: Home, key: str, name: str, folder: Path) -> None:
    files = {
        part: (part, (folder / part).read_bytes()) for part in ("adapter_config.json", "adapter_model.safetensors")
    }
    answer = httpx.post(
        f"{home.url}/tuneloom/models/import",
        data={"name": name, "base": BASE},
        files=files,
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str, stream: bool) -> str:
    request: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    request |= {"max_tokens": NEW_TOKENS, "temperature": 0}
    if not stream:
        answer = await client.chat.completions.create(**request)
        return answer.choices[0].message.content or ""
    pieces = []
    async for chunk in await client.chat.completions.create(**request, stream=True):
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    return "".join(pieces)


def test_64_mixed_requests_of_two_owners_equal_the_single_adapter_truth(home: Home, tmp_path: Path) -> None:
    source = home.path / "source"
    truth = Truth(source)
    keys = {owner: home.mint(owner) for owner in ("ada", "bob")}
    # Two of the three Models have the same name, under two owners.
    models = [("ada", "alpha"), ("bob", "alpha"), ("bob", "beta")]
    expected = {(owner, BASE): truth.answers(None) for owner in keys}
    for seed, (owner, name) in enumerate(models):
        folder = make_adapter(tmp_path / f"m{seed}", source, seed=40 + seed, rank=(4, 8, 16)[seed], base_id=BASE)
        import_adapter(home, keys[owner], name, folder)
        expected[owner, name] = truth.answers(folder)
    calls = [(*random.Random(i).choice(sorted(expected)), PROMPTS[i % len(PROMPTS)], i % 3 == 0) for i in range(192)]

    async def run() -> list[str]:
        clients = {o: openai.AsyncOpenAI(base_url=home.url, api_key=k, timeout=120) for o, k in keys.items()}
        gate = asyncio.Semaphore(64)

        async def one(owner: str, model: str, prompt: str, stream: bool) -> str:
            async with gate:
                return await ask(clients[owner], model, prompt, stream)

        return await asyncio.gather(*(one(*call) for call in calls))

    answers = asyncio.run(run())

    wrong = [
        (call, answer) for call, answer in zip(calls, answers, strict=True) if answer != expected[call[:2]][call[2]]
    ]
    assert not wrong
    foreign = home.client(keys["ada"])
    with pytest.raises(openai.NotFoundError) as error:
        foreign.chat.completions.create(model="beta", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.NotFoundError) as absent:
        foreign.chat.completions.create(model="gamma", messages=[{"role": "user", "content": "x"}])
    assert str(error.value).replace("beta", "gamma") == str(absent.value)


def test_names_that_change_under_load_never_yield_a_token_of_another_version(home: Home, tmp_path: Path) -> None:
    source = home.path / "source"
    truth = Truth(source)
    key = home.mint("cleo")
    folders = [make_adapter(tmp_path / f"v{seed}", source, seed=60 + seed, base_id=BASE) for seed in range(2)]
    expected = [truth.answers(folder) for folder in folders]
    assert all(expected[0][prompt] != expected[1][prompt] for prompt in PROMPTS)
    for folder in folders:
        import_adapter(home, key, "hot", folder)
    pinned = {1: expected[0], 2: expected[1]}

    async def run() -> int:
        client = openai.AsyncOpenAI(base_url=home.url, api_key=key, timeout=120, max_retries=0)
        http = httpx.AsyncClient(base_url=home.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        stop = asyncio.Event()
        answered = 0

        async def load(worker: int) -> None:
            nonlocal answered
            dice = random.Random(worker)
            while not stop.is_set():
                prompt = dice.choice(PROMPTS)
                name, allowed = dice.choice(
                    [
                        ("hot", expected),
                        ("hot@v1", [pinned[1]]),
                        ("hot@v2", [pinned[2]]),
                        ("gone", [pinned[1], pinned[2]]),
                    ]
                )
                try:
                    answer = await ask(client, name, prompt, dice.random() < 0.5)
                except openai.NotFoundError:
                    assert name == "gone"
                    continue
                assert answer in [answers[prompt] for answers in allowed], (name, prompt, answer)
                answered += 1

        async def swap() -> None:
            for i in range(30):
                active = await http.post("/tuneloom/models/hot/activate", json={"version": i % 2 + 1})
                assert active.status_code == 200, active.text
                prompt = PROMPTS[i % len(PROMPTS)]
                assert await ask(client, "hot", prompt, False) == pinned[i % 2 + 1][prompt]
            stop.set()

        async def recreate() -> None:
            i = 0
            while not stop.is_set():
                await asyncio.to_thread(import_adapter, home, key, "gone", folders[i % 2])
                prompt = PROMPTS[i % len(PROMPTS)]
                assert await ask(client, "gone", prompt, False) == expected[i % 2][prompt]
                await client.models.delete("gone")
                i += 1

        tasks = [asyncio.create_task(load(worker)) for worker in range(12)]
        tasks += [asyncio.create_task(swap()), asyncio.create_task(recreate())]
        try:
            await asyncio.wait_for(asyncio.gather(*tasks), 300)
        finally:
            stop.set()
            for task in tasks:
                task.cancel()
            await http.aclose()
        return answered

    assert asyncio.run(run()) > 50
