"""Each way in which a model could be served otherwise than it was trained ends the job, and no other way does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.train.conftest import BASE_ID, Lab, colour_rows
from tuneloom.bases import get_base
from tuneloom.config import BaseSettings, EngineSettings
from tuneloom.domain import Job, JobError, TrainOptions
from tuneloom.engine.memory import Room, measure_room
from tuneloom.rows import Scan
from tuneloom.store.artifacts import Manifest, read_manifest
from tuneloom.train import models
from tuneloom.train.attempt import run_attempt
from tuneloom.train.data import Tokens, load_tokens, save_tokens, tokens_name
from tuneloom.train.folders import run_folder
from tuneloom.train.render import Renderer
from tuneloom.train.sample import SCORED_PLACES, SCORED_TOKENS, pick_rows, pick_scored

FAST = {"n_epochs": 1}


@pytest.fixture
def lab(lab: Lab) -> Lab:
    """Its base is served in fp32 whatever the machine is good at."""
    bases = (BaseSettings(id=BASE_ID, engine=EngineSettings(dtype="fp32")),)
    lab.settings = lab.settings.model_copy(update={"bases": bases})
    return lab


def failure(lab: Lab, job: Job) -> JobError:
    """Run the job, which fails and leaves no manifest."""
    assert run_attempt(lab.settings, job.id, 1) == "failed"
    assert read_manifest(lab.store.blobs, job.artifacts) is None
    error = lab.progress(job.id).error
    assert error is not None
    return error


def published(lab: Lab, job: Job) -> Manifest:
    assert run_attempt(lab.settings, job.id, 1) == "published", lab.progress(job.id).error
    manifest = read_manifest(lab.store.blobs, job.artifacts)
    assert manifest is not None
    return manifest


def keep_tokens(lab: Lab, job: Job, change: Callable[[Tokens], None] = lambda tokens: None) -> None:
    """What a job's check leaves for its run, changed."""
    base, file = get_base(lab.settings.bases_dir, BASE_ID), lab.store.records.files.get(job.spec.training_file).value
    folder = run_folder(lab.settings, job.id)
    tokens = load_tokens(lab.store, file, base, job.spec, folder, lambda: Renderer.load(base.path))
    assert isinstance(tokens, Tokens)
    tokens = Tokens(tokens.ids.copy(), tokens.learned.copy(), tokens.offsets.copy())
    change(tokens)
    save_tokens(tokens, folder / tokens_name(file, base, job.spec))


def on_save(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """Change each adapter folder as soon as it is written."""
    save = models.save_adapter

    def saved(model: Any, folder: Path, base_id: str) -> None:
        save(model, folder, base_id)
        change(folder)

    monkeypatch.setattr(models, "save_adapter", saved)


def test_a_run_tells_what_was_compared_and_its_version_keeps_it(lab: Lab) -> None:
    rows = colour_rows(24)
    rows[3]["messages"].insert(0, {"role": "system", "content": "Answer with a colour."})
    rows[5]["messages"] *= 2
    job = lab.add_job(rows, **FAST)

    manifest = published(lab, job)

    found = manifest.fidelity
    assert found is not None and (found.precision, found.rows) == ("fp32", 16)
    assert found.tokens >= 32 and 0 <= found.mean_difference <= found.max_difference < 1e-3 < found.tolerance
    assert {setting.name for setting in manifest.settings} >= {"n_epochs", "precision", "rank"}
    told = [event.message for event in lab.events(job.id)]
    first = next(text for text in told if text.startswith("Rendering equals serving"))
    assert "1 with a system message" in first and "1 with several turns" in first and "6 made-up" in first
    last = next(text for text in told if text.startswith("The engine agrees with the trainer"))
    assert f"{found.tokens} learned tokens of 16 rows" in last


def test_a_template_that_changed_after_the_check_is_found(lab: Lab) -> None:
    job = lab.add_job(**FAST)
    keep_tokens(lab, job)
    folder = get_base(lab.settings.bases_dir, BASE_ID).path
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "!<|im_end|>"))

    error = failure(lab, job)

    assert error.code == "fidelity_rendering"
    assert error.message.startswith("Line 1 of `rows.jsonl`")
    assert "'<|im_end|>' (2), serving '!'" in error.message
    assert lab.steps(job.id) == []


def test_a_stop_token_that_is_not_learned_is_found(lab: Lab) -> None:
    job = lab.add_job(**FAST)

    def forget_stops(tokens: Tokens) -> None:
        tokens.learned[tokens.ids == 2] = False

    keep_tokens(lab, job, forget_stops)
    error = failure(lab, job)
    assert error.code == "fidelity_rendering"
    assert "the token that ends the answer is not learned" in error.message and "'<|im_end|>' (2)" in error.message


def test_a_wrong_alpha_in_the_saved_config_is_found(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 16.0}))

    on_save(monkeypatch, change)
    error = failure(lab, lab.add_job(**FAST))
    assert error.code == "fidelity_logprobs"
    assert "row 1 as it is trained, token " in error.message and "in the trainer and" in error.message


def test_a_perturbed_weight_is_found(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        name = next(name for name in weights if "layers.0.mlp.down_proj.lora_B" in name)
        weights[name][0] += 0.5
        save_file(weights, path, metadata={"format": "pt"})

    on_save(monkeypatch, change)
    assert failure(lab, lab.add_job(**FAST)).code == "fidelity_logprobs"


def test_a_shift_of_all_tokens_within_the_tolerance_is_found_by_its_mean(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneloom.train import agreement

    serve = agreement._serve

    def shifted(*arguments: Any) -> tuple[list[list[float]], str]:
        scores, precision = serve(*arguments)
        return [[score - 0.9 * agreement.TOLERANCE["fp32"] for score in row] for row in scores], precision

    monkeypatch.setattr(agreement, "_serve", shifted)
    error = failure(lab, lab.add_job(**FAST))
    assert error.code == "fidelity_logprobs" and "the mean difference is 0.009" in error.message


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_run_is_compared_with_the_base_as_it_is_served(lab: Lab, quantization: str) -> None:
    options = TrainOptions(rank=4, learning_rate=5e-3, precision="fp32", quantization=quantization)
    found = published(lab, lab.add_job(options=options, **FAST)).fidelity
    assert found is not None and found.precision == quantization
    assert 1e-3 < found.max_difference < found.tolerance


@pytest.mark.parametrize(("precision", "least", "most"), [("bf16", 1e-4, 0.5), ("fp16", 1e-5, 0.05)])
def test_16_bits_are_compared_within_their_own_tolerance(lab: Lab, precision: Any, least: float, most: float) -> None:
    options = TrainOptions(rank=4, learning_rate=5e-3, precision=precision)
    found = published(lab, lab.add_job(options=options, **FAST)).fidelity
    assert found is not None and found.precision == precision and least < found.max_difference < most


def test_rows_that_are_held_out_or_cut_are_no_difference(lab: Lab) -> None:
    rows = colour_rows(24)
    for row in rows[::5]:
        row["messages"][1]["content"] = "red green blue " * 20
    options = TrainOptions(rank=4, precision="fp32", validation_share=0.25, long_rows="cut", max_length=48)
    job = lab.add_job(rows, options=options, **FAST)
    assert published(lab, job).fidelity is not None


def test_what_a_coarse_precision_hides_is_found_in_the_files(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 8.0001}))

    on_save(monkeypatch, change)
    options = TrainOptions(rank=4, learning_rate=5e-3, precision="bf16", quantization="nf4")
    error = failure(lab, lab.add_job(options=options, **FAST))
    assert error.code == "fidelity_adapter" and "`lora_B` of `model.layers.0." in error.message


def test_preferences_are_compared_on_both_of_their_answers(lab: Lab) -> None:
    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = [
        {
            "input": {"messages": row["messages"][:1]},
            "preferred_output": row["messages"][1:],
            "non_preferred_output": answer("perhaps"),
        }
        for row in colour_rows(12)
    ]
    job = lab.add_job(rows, **FAST)
    lab.change_job(job.id, spec=job.spec.model_copy(update={"method": "dpo"}))

    found = published(lab, job).fidelity

    assert found is not None and found.rows == 16 and found.max_difference < 1e-3
    told = [event.message for event in lab.events(job.id)]
    assert any("Rendering equals serving" in text and "with one turn" in text for text in told)


@pytest.mark.parametrize("how", ["does not fit", "bytes are too many"])
def test_without_room_for_the_base_as_it_is_served_the_engine_takes_the_trainers_precision(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    looks: list[str] = []

    def measure(kind: str) -> Room:
        looks.append(kind)
        if len(looks) == 1 and how == "bytes are too many":
            raise MemoryError(how)
        return Room("the host", 1000) if len(looks) == 1 else measure_room(kind)

    monkeypatch.setattr("tuneloom.engine.assembly.measure_room", measure)
    job = lab.add_job(options=TrainOptions(rank=4, precision="fp32", quantization="nf4"), **FAST)

    made = published(lab, job)

    assert made.fidelity is not None and (made.fidelity.precision, made.fidelity.rows) == ("nf4", 16)
    assert made.fidelity_note is not None
    assert "With an engine in nf4" in made.fidelity_note and how in made.fidelity_note
    assert [event.message for event in lab.events(job.id) if event.level == "warn"] == [made.fidelity_note]


def test_a_machine_without_room_for_any_engine_says_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloom.engine.assembly.measure_room", lambda _: Room("the host", 1000))
    job = lab.add_job(**FAST)

    made = published(lab, job)

    assert made.fidelity is None and made.fidelity_note is not None
    (event,) = [event for event in lab.events(job.id) if event.level == "warn"]
    assert "ot compared with an engine" in event.message and "does not fit" in event.message
    assert event.message == made.fidelity_note


def test_the_rows_looked_at_are_the_same_each_time_and_of_each_kind(lab: Lab) -> None:
    rows = colour_rows(400)
    rows[377]["messages"].insert(0, {"role": "system", "content": "Answer with a colour."})
    file = lab.add_file(rows)

    def pick() -> list[int]:
        with lab.store.blobs.open(file.blob) as source:
            return [picked.line for picked in pick_rows(Scan(method=None).rows(source))]

    assert pick() == pick()
    assert {1, 2, 3, 378} <= set(pick()) and len(pick()) <= 12


def test_rows_to_score_come_from_all_over_and_keep_to_their_budget() -> None:
    lengths = np.full(1000, 700)
    lengths[500] = 50
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(offsets[-1]) % 500
    learned = np.ones(offsets[-1], dtype=np.bool_)
    picked = pick_scored(Tokens(ids, learned, offsets))
    assert sum(len(row.ids) for row in picked) <= SCORED_TOKENS
    assert all(1 <= place <= len(row.ids) - 1 for row in picked for place in row.places)
    assert max(len(row.places) for row in picked) <= SCORED_PLACES
    assert (picked[0].number, picked[-1].number) == (0, 999)
    long = Tokens(ids[:50_000], learned[:50_000] & (np.arange(50_000) > 49_990), np.array([0, 50_000]))
    assert len(pick_scored(long)) == 1
