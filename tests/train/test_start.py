from pathlib import Path

import pytest

from tests.tiny import make_adapter
from tests.train.conftest import BASE_ID, Lab, colour_rows
from tuneloom.domain import JobSpec, TrainOptions
from tuneloom.errors import InvalidRequest
from tuneloom.store.artifacts import put_adapter, read_manifest
from tuneloom.train.attempt import run_attempt
from tuneloom.train.start import fetch_start, read_start


def spec_of(**more: object) -> JobSpec:
    return JobSpec(base=BASE_ID, training_file="file-1", seed=1, **more)


def test_an_adapter_tells_what_it_fixes(tmp_path: Path, tiny_base: Path) -> None:
    folder = make_adapter(
        tmp_path / "a", tiny_base, rank=4, alpha=6.0, targets=("q_proj", "up_proj"), rank_pattern={"up_proj": 8}
    )
    start = read_start(folder)
    assert (start.rank, start.alpha, start.rslora) == (8, 6.0, False)
    assert start.target_modules == ("q_proj", "up_proj")


def test_without_the_option_there_is_none(lab: Lab, tmp_path: Path) -> None:
    assert fetch_start(lab.store.blobs, spec_of(), tmp_path) is None


def test_an_adapter_that_is_gone_is_named(lab: Lab, tmp_path: Path, tiny_base: Path) -> None:
    ref = put_adapter(lab.store.blobs, "x/adapter", make_adapter(tmp_path / "a", tiny_base))
    spec = spec_of(warm_start=ref, options=TrainOptions(warm_start="mine@v3"))
    fetched = fetch_start(lab.store.blobs, spec, tmp_path / "cache")
    assert fetched is not None and fetched.rank == 4
    for blob in lab.store.blobs.list("x/adapter"):
        lab.store.blobs.delete(blob.key)
    with pytest.raises(InvalidRequest, match="`mine@v3`, is gone") as caught:
        fetch_start(lab.store.blobs, spec, tmp_path / "other")
    assert caught.value.param == "tuneloom.warm_start"


def test_a_job_trains_on_from_the_version_of_another(lab: Lab) -> None:
    first = lab.add_job(n_epochs=4)
    assert run_attempt(lab.settings, first.id, 1) == "published"
    manifest = read_manifest(lab.store.blobs, first.artifacts)
    assert manifest is not None
    options = TrainOptions(learning_rate=1e-3, precision="fp32", warm_start="colours@v1")
    job = lab.add_job(colour_rows(24), options=options, n_epochs=1)
    job = lab.change_job(job.id, spec=job.spec.model_copy(update={"warm_start": manifest.adapter}))

    assert run_attempt(lab.settings, job.id, 1) == "published", lab.progress(job.id).error

    assert lab.losses(job.id)[0] < 0.7 * lab.losses(first.id)[0]
    settings = {setting.name: setting for setting in lab.progress(job.id).settings}
    assert (settings["rank"].value, settings["rank"].reason) == (4, "that of colours@v1")


def test_a_setting_that_the_adapter_has_otherwise_is_refused(lab: Lab) -> None:
    first = lab.add_job(n_epochs=1)
    run_attempt(lab.settings, first.id, 1)
    manifest = read_manifest(lab.store.blobs, first.artifacts)
    assert manifest is not None
    job = lab.add_job(options=TrainOptions(rank=8, warm_start="colours@v1"), n_epochs=1)
    lab.change_job(job.id, spec=job.spec.model_copy(update={"warm_start": manifest.adapter}))
    assert run_attempt(lab.settings, job.id, 1) == "failed"
    error = lab.progress(job.id).error
    assert error is not None and error.param == "tuneloom.rank"
    assert error.message == "`rank` is 8, and the adapter of `warm_start` has 4. Leave it out: it comes from there."
