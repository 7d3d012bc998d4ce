import json
import shutil
from pathlib import Path

import pytest

from tests.control.conftest import BASE, PEPPER
from tuneloom import bases
from tuneloom.control import models
from tuneloom.control.context import ApiContext
from tuneloom.control.layout import at_hand, import_layout
from tuneloom.errors import InvalidRequest
from tuneloom.store import open_blobs
from tuneloom.store.peft_folder import WEIGHTS_FILE

LEFT_OUT = "`training_config.json` is not a JSON object and was left out"


@pytest.fixture
def context(api, tmp_path, tiny_base) -> ApiContext:
    bases.add_folder(api.settings.bases_dir, tiny_base, BASE)
    return ApiContext(api.settings, api.store, PEPPER, lambda: None)


@pytest.fixture
def bucket(tmp_path) -> Path:
    return tmp_path / "bucket"


def add(bucket: Path, name: str, number: int, adapter: Path, config: dict | str | None = None) -> Path:
    folder = bucket / "models" / name / f"v{number}"
    shutil.copytree(adapter, folder / "adapter")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "training_config.json").write_text(text)
    return folder


def run(context: ApiContext, bucket: Path, **base_map: str) -> dict[str, tuple[str, str | None]]:
    return {each.found: (each.result, each.added_as) for each in import_layout(context, "ada", bucket, base_map)}


def active(context: ApiContext, name: str = "bot") -> int | None:
    return models.get_model(context.store.records, "ada", name).value.active


def test_versions_keep_their_numbers_and_the_highest_is_active(context, bucket, tiny_adapters):
    for number, adapter in zip((10, 2, 1), tiny_adapters, strict=False):
        add(bucket, "bot", number, adapter, {"base_model": BASE})
    add(bucket, "other", 4, tiny_adapters[0], {"base_model": BASE})

    assert run(context, bucket) == {
        "bot/v1": ("added", "bot@v1"),
        "bot/v2": ("added", "bot@v2"),
        "bot/v10": ("added", "bot@v10"),
        "other/v4": ("added", "other@v4"),
    }
    assert (active(context), active(context, "other")) == (10, 4)


def test_a_version_that_is_marked_active_is_the_one_that_is_called(context, bucket, tiny_adapters):
    add(bucket, "bot", 1, tiny_adapters[0], {"base_model": BASE, "active": True})
    add(bucket, "bot", 2, tiny_adapters[1], {"base_model": BASE, "active": False})
    run(context, bucket / "models")
    assert active(context) == 1


def test_importing_twice_adds_what_is_new_and_leaves_the_rest(context, bucket, tiny_adapters):
    add(bucket, "bot", 1, tiny_adapters[0], {"base_model": BASE})
    broken = add(bucket, "bot", 2, tiny_adapters[1], {"base_model": BASE})
    weights = broken / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    add(bucket, "bot", 3, tiny_adapters[2], {"base_model": BASE})
    assert [result for result, _ in run(context, bucket).values()] == ["added", "refused", "added"]
    models.rollback(context.store.records, "ada", "bot")
    blobs = context.store.blobs.list("imports")

    again = run(context, bucket)

    assert [result for result, _ in again.values()] == ["present", "refused", "present"]
    assert again["bot/v3"] == ("present", "bot@v3")
    assert active(context) == 1 and context.store.blobs.list("imports") == blobs
    weights.write_bytes(whole)
    # A number below the highest is never used again: `bot@v2` may have been another adapter.
    assert run(context, bucket)["bot/v2"] == ("added", "bot@v4")
    assert active(context) == 1


def test_an_import_that_was_cut_off_is_completed_with_the_right_version_active(context, bucket, tiny_adapters):
    add(bucket, "bot", 1, tiny_adapters[0], {"base_model": BASE})
    run(context, bucket)
    add(bucket, "bot", 2, tiny_adapters[1], {"base_model": BASE})
    add(bucket, "bot", 3, tiny_adapters[2], {"base_model": BASE})
    run(context, bucket)
    assert active(context) == 3


@pytest.mark.parametrize("named", ["/home/ada/checkpoints/tiny", "google/tiny", None])
def test_a_base_of_another_name_is_mapped(context, bucket, tiny_adapters, named):
    folder = add(bucket, "bot", 1, tiny_adapters[0], {"base_model": "google/tiny"})
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": named}))

    (refused,) = import_layout(context, "ada", bucket, {})
    assert refused.result == "refused" and "--base-map google/tiny=ID" in refused.note
    (added,) = import_layout(context, "ada", bucket, {"google/tiny": BASE})
    assert (added.result, added.base) == ("added", BASE)
    assert import_layout(context, "ada", bucket, {"google/tiny": BASE})[0].result == "present"


def test_settings_come_under_our_names_and_what_is_unknown_is_told(context, bucket, tiny_adapters):
    config = {
        "model_name": BASE,
        "lora_config": {"r": 4, "lora_alpha": 8, "bias": "none"},
        "num_epochs": 3,
        "learning_rate": 2e-4,
        "final_loss": 0.5,
        "eval_loss": "nan",
        "user_id": "u1",
    }
    add(bucket, "bot", 1, tiny_adapters[0], config)

    (imported,) = import_layout(context, "ada", bucket, {})

    assert imported.settings == {"rank": 4, "alpha": 8, "n_epochs": 3, "learning_rate": 2e-4}
    assert imported.unknown == {"bias": "none", "user_id": "u1"}
    assert models.list_versions(context.store.records, "ada")[0].metrics == {"train_loss": 0.5}


def test_what_cannot_come_in_is_told_and_the_rest_comes_in(context, bucket, tiny_adapters, tmp_path):
    add(bucket, "bot", 1, tiny_adapters[0], "{not json")
    add(bucket, "Bad Name", 1, tiny_adapters[0])
    add(bucket, "gpt-4o-mini-2024-07-18", 1, tiny_adapters[0])
    (bucket / "models" / "empty" / "v1").mkdir(parents=True)
    pickled = add(bucket, "pickled", 1, tiny_adapters[0])
    (pickled / "adapter" / "training_args.bin").write_bytes(b"x")
    linked = add(bucket, "linked", 1, tiny_adapters[0])
    (linked / "adapter" / "adapter_config.json").unlink()
    (linked / "adapter" / "adapter_config.json").symlink_to(tiny_adapters[0] / "adapter_config.json")

    notes = {each.found: (each.result, each.note) for each in import_layout(context, "ada", bucket, {})}

    assert notes["bot/v1"][0] == "added" and "is not a JSON object" in notes["bot/v1"][1]
    for found, text in {
        "Bad Name/v1": "lower-case",
        "gpt-4o-mini-2024-07-18/v1": "base model",
        "empty/v1": "no such adapter folder",
        "pickled/v1": "may run code",
        "linked/v1": "symbolic link",
    }.items():
        assert notes[found][0] == "refused" and text in notes[found][1], notes[found]


@pytest.mark.parametrize(
    ("config", "metrics", "note"),
    [
        ('{"train_loss": 1' + "0" * 400 + ', "eval_loss": NaN}', {}, ""),
        ('{"train_loss": true, "eval_loss": 0.25}', {"valid_loss": 0.25}, ""),
        (
            '{"base_model": "\\ud800", "train_loss": 1}',
            {},
            "`training_config.json` is not a JSON object and was left out",
        ),
        ("[" * 100_000, {}, LEFT_OUT),
    ],
    ids=["numbers", "bool", "surrogate", "deep"],
)
def test_what_a_training_config_must_not_hold_costs_no_more_than_itself(
    context, bucket, tiny_adapters, config, metrics, note
):
    add(bucket, "bot", 1, tiny_adapters[0], config)
    (imported,) = import_layout(context, "ada", bucket, {})
    assert (imported.result, imported.note) == ("added", note)
    assert models.list_versions(context.store.records, "ada")[0].metrics == metrics


def test_an_adapter_under_another_name_than_a_versions_is_told(context, bucket, tiny_adapters):
    add(bucket, "bot", 1, tiny_adapters[0])
    add(bucket, "bot", 2, tiny_adapters[1]).rename(bucket / "models" / "bot" / "v02")
    add(bucket, "new", 1, tiny_adapters[1]).rename(bucket / "models" / "new" / "latest")
    (bucket / "models" / "bot" / "logs").mkdir()
    found = {each.found: (each.result, each.note) for each in import_layout(context, "ada", bucket, {})}
    assert found.keys() == {"bot/v1", "bot/v02", "new/latest"} and found["bot/v1"][0] == "added"
    assert found["bot/v02"] == found["new/latest"] and "v1, v2 and so on" in found["bot/v02"][1]


def test_a_folder_in_another_layout_is_refused(context, tmp_path):
    (tmp_path / "x" / "bot" / "vX").mkdir(parents=True)
    for folder in ("x", "nowhere"):
        with pytest.raises(InvalidRequest, match="no `NAME/vN` folders"):
            import_layout(context, "ada", tmp_path / folder, {})


def test_a_bucket_comes_in_as_a_copy_of_it_does(context, bucket, tiny_adapters, gcs_url):
    for number in (1, 2):
        folder = add(bucket, "bot", number, tiny_adapters[number], {"base_model": BASE, "lora_r": number})
        (folder / "adapter" / "optimizer.pt").write_bytes(b"not looked at")
    (add(bucket, "pickled", 1, tiny_adapters[0], {"base_model": BASE}) / "adapter" / WEIGHTS_FILE).unlink()
    blobs = open_blobs(gcs_url)
    for path in bucket.rglob("*"):
        if path.is_file():
            blobs.write(path.relative_to(bucket).as_posix(), path)
    keys = [blob.key for blob in blobs.walk()]

    for _ in range(2):
        with at_hand(gcs_url) as folder:
            found = {each.found: (each.result, each.settings) for each in import_layout(context, "ada", folder, {})}
        assert found.pop("pickled/v1")[0] == "refused"
        assert [result for result, _ in found.values()] in (["added"] * 2, ["present"] * 2)
        assert [settings["rank"] for _, settings in found.values()] == [1, 2]
        assert not folder.exists()
    assert active(context) == 2
    assert [blob.key for blob in blobs.walk()] == keys
    with at_hand(f"{gcs_url}/models") as folder:
        assert {each.result for each in import_layout(context, "ada", folder, {})} == {"present", "refused"}
    with pytest.raises(InvalidRequest, match="no `NAME/vN` folders"), at_hand(f"{gcs_url}/empty") as folder:
        import_layout(context, "ada", folder, {})


def test_a_url_without_a_bucket_is_refused():
    with pytest.raises(InvalidRequest, match="does not name a bucket"), at_hand("gs://"):
        pass
