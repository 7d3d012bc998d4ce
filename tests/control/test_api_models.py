import io
import json
import zipfile

import pytest

from tests.control.conftest import BASE, assert_error
from tests.control.test_models import add_version
from tuneloom import bases
from tuneloom.control import deletion
from tuneloom.domain import Checkpoint

OURS = "/v1/tuneloom/models"


def test_bases_aliases_and_all_names_of_the_owner_are_listed(api):
    first = add_version(api.store, "bot")
    second = add_version(api.store, "bot")
    add_version(api.store, "theirs", owner="bob")
    listed = api.get("/v1/models", key="ada:inference").json()
    assert listed["object"] == "list"
    names = [model["id"] for model in listed["data"]]
    assert names == [BASE, "gpt-4o-mini-2024-07-18", "bot", "bot@v1", first.ft_name, "bot@v2", second.ft_name]
    assert all(model["object"] == "model" and isinstance(model["created"], int) for model in listed["data"])


def test_a_model_without_an_active_version_is_not_listed_or_found(api):
    add_version(api.store)
    deletion.delete(api.store, "ada", "bot@v1")
    assert "bot" not in [model["id"] for model in api.get("/v1/models").json()["data"]]
    assert_error(api.get("/v1/models/bot"), 404, "model")


def test_any_name_can_be_retrieved_with_its_slashes_encoded_or_not(api):
    version = add_version(api.store)
    checkpoint = Checkpoint(
        id="ftckpt_1",
        owner="ada",
        job_id="ftjob-1",
        base=BASE,
        step=2,
        name=version.ft_name + ":ckpt-step-2",
        created_at=1.0,
        adapter=version.adapter,
    )
    api.store.records.commit(api.store.records.checkpoints.create(checkpoint))
    for name in (BASE, "gpt-4o-mini-2024-07-18", "bot", "bot@v1", version.ft_name, checkpoint.name):
        for path in (name, name.replace("/", "%2F")):
            found = api.get(f"/v1/models/{path}", key="ada:inference").json()
            assert (found["id"], found["root"]) == (name, BASE)


def test_a_base_is_not_deleted_and_a_tuned_model_is(api):
    version = add_version(api.store)
    assert_error(api.delete(f"/v1/models/{BASE}"), 403, "model", "base model")
    assert_error(api.delete("/v1/models/bot", key="ada:inference"), 403, None, "`training`")
    path = version.ft_name.replace("/", "%2F")
    assert api.delete(f"/v1/models/{path}").json() == {"id": version.ft_name, "object": "model", "deleted": True}
    assert api.delete("/v1/models/bot").status_code == 200
    assert_error(api.delete("/v1/models/bot"), 404, "model")


def test_versions_are_activated_and_rolled_back(api):
    add_version(api.store)
    add_version(api.store)
    assert api.post(f"{OURS}/bot/activate", json={"version": 2}).json()["active"] == 2
    assert [v["active"] for v in api.get(f"{OURS}/bot").json()["versions"]] == [False, True]
    assert api.post(f"{OURS}/bot/rollback").json()["active"] == 1
    assert_error(api.post(f"{OURS}/bot/rollback"), 409, None, "no version before")
    assert_error(api.post(f"{OURS}/bot/activate", json={"version": 9}), 404, "model", "bot@v9")
    assert_error(api.post(f"{OURS}/bot/activate", json={"version": "2"}), 400, "version", "integer")
    assert [model["id"] for model in api.get(OURS).json()["data"]] == ["bot"]


def test_a_retried_rollback_goes_back_once(api):
    for _ in range(3):
        add_version(api.store)
    api.post(f"{OURS}/bot/activate", json={"version": 3})
    answers = [
        api.post(f"{OURS}/bot/rollback", headers={"x-stainless-retry-count": str(retry)}).json()["active"]
        for retry in (0, 1, 2)
    ]
    assert answers == [2, 2, 2]
    assert api.post(f"{OURS}/bot/rollback").json()["active"] == 1


@pytest.fixture
def with_base(api, tiny_base):
    bases.add_folder(api.settings.bases_dir, tiny_base, BASE)
    return api


def send_adapter(api, folder, *, config=None, weights=None, **form):
    files = {
        "config": ("adapter_config.json", config or (folder / "adapter_config.json").read_bytes()),
        "weights": ("adapter_model.safetensors", weights or (folder / "adapter_model.safetensors").read_bytes()),
    }
    return api.post(f"{OURS}/import", files=files, data={"name": "bot", **form})


def test_an_adapter_goes_in_and_comes_out_as_plain_peft_reads_it(with_base, tiny_adapters, tmp_path):
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    api = with_base
    imported = send_adapter(api, tiny_adapters[0])
    assert imported.status_code == 200, imported.text
    assert (imported.json()["id"], imported.json()["version"]) == ("bot@v1", 1)
    archive = api.get(f"{OURS}/bot/adapter", key="ada:inference")
    assert archive.headers["content-disposition"] == 'attachment; filename="bot.zip"'
    with zipfile.ZipFile(io.BytesIO(archive.content)) as bundle:
        assert sorted(bundle.namelist()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        bundle.extractall(tmp_path / "out")
    assert PeftConfig.from_pretrained(str(tmp_path / "out")).base_model_name_or_path == BASE
    ours = load_peft_weights(str(tmp_path / "out"), device="cpu")
    theirs = load_peft_weights(str(tiny_adapters[0]), device="cpu")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    ft_name = api.get(f"{OURS}/bot").json()["versions"][0]["fine_tuned_model"]
    assert api.get(f"{OURS}/{ft_name.replace('/', '%2F')}/adapter").status_code == 200
    told = [stored.value for stored in api.store.records.audit_entries.query(order_by="created_at")]
    assert [(entry.action, entry.target.name) for entry in told[-2:]] == [("model.version.downloaded", "bot@v1")] * 2


def test_the_lineage_goes_out_with_the_adapter_and_is_told(with_base, tiny_adapters):
    api = with_base
    for folder in tiny_adapters[:2]:
        send_adapter(api, folder)
    version = api.store.records.versions.get("ada:bot:v2").value
    api.store.blobs.write(f"{version.adapter.uri}/lineage.json", b"{}")

    shown = api.get(f"{OURS}/bot").json()["versions"]
    assert [(row["lineage"], row["fidelity"]) for row in shown] == [(False, None), (True, None)]
    for name, has_lineage in (("bot@v1", False), ("bot@v2", True)):
        with zipfile.ZipFile(io.BytesIO(api.get(f"{OURS}/{name}/adapter").content)) as bundle:
            assert ("lineage.json" in bundle.namelist()) == has_lineage
    api.delete("/v1/models/bot")
    assert api.store.blobs.list("imports") == []


def test_an_import_is_safe_to_repeat(with_base, tiny_adapters):
    api = with_base
    api.client.headers["x-stainless-retry-count"] = "1"
    assert [send_adapter(api, tiny_adapters[0]).json()["version"] for _ in range(2)] == [1, 1]


def test_an_adapter_that_may_not_come_in_says_why(with_base, tiny_adapters):
    api, folder = with_base, tiny_adapters[0]
    assert_error(send_adapter(api, folder, name="../x"), 400, "name", "lower-case")
    assert_error(send_adapter(api, folder, name="gpt-4o-mini-2024-07-18"), 400, "name", "base model")
    assert_error(send_adapter(api, folder, base="no/base"), 404, "base", "no/base")
    assert_error(send_adapter(api, folder, force="yes"), 400, "force", "Unknown")
    other = json.loads((folder / "adapter_config.json").read_text())
    rejected = send_adapter(api, folder, config=json.dumps({**other, "use_dora": True}).encode())
    assert rejected.status_code == 400
    assert rejected.json()["error"]["code"] == "adapter_rejected"
    assert send_adapter(api, folder, weights=b"no safetensors").status_code == 400
    one = {"weights": ("adapter_model.safetensors", b"x")}
    assert_error(api.post(f"{OURS}/import", files=one, data={"name": "bot"}), 400, "file", "adapter_config.json")
    bad = {"weights": ("pytorch_model.bin", b"x")}
    assert_error(api.post(f"{OURS}/import", files=bad, data={"name": "bot"}), 400, "file", "pytorch_model.bin")
    assert api.store.records.models.query() == []
    assert api.store.blobs.list("imports") == []
