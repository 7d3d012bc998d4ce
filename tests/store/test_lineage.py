"""A signed lineage: it holds as it was written, and no byte of it can be another."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloom.config import Settings, read_signing_key
from tuneloom.domain import Fidelity, Hyperparameters, JobSpec, Setting, TrainOptions
from tuneloom.errors import InvalidRequest
from tuneloom.store.lineage import (
    AdapterFacts,
    BaseFacts,
    CodeFacts,
    FileFacts,
    HardwareFacts,
    Lineage,
    LineageBroken,
    OrderFacts,
    key_id,
    public_key_of,
    public_pem,
    read_signed,
    sign,
)

LINEAGE = Lineage(
    kind="version",
    job_id="ftjob-1",
    created_at=1764000000.25,
    method="supervised",
    seed=7,
    spec=JobSpec(
        base="tiny/llama",
        training_file="file-1",
        suffix="colours",
        seed=7,
        options=TrainOptions(rank=4, alpha=16, target_modules=("q_proj", "v_proj")),
        metadata={"team": "Łódź 🙂"},
    ),
    resolved=Hyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=1),
    settings=(
        Setting(name="target_modules", value=("q_proj", "v_proj"), reason="as asked"),
        Setting(name="learning_rate", value=5e-4, reason="the default"),
        Setting(name="packing", value=False, reason="the default"),
    ),
    base=BaseFacts(id="tiny/llama", sha256="a" * 64, files={}, tokenizer_sha256="b" * 64, template_sha256="c" * 64),
    training_file=FileFacts(id="file-1", filename="rows.jsonl", sha256="d" * 64, size_bytes=1000),
    validation_file=None,
    order=OrderFacts(rows=24, epochs=2, seed=7, sha256="e" * 64),
    parent_sha256=None,
    steps=12,
    metrics={"step": 12, "train_loss": 1.25},
    fidelity=Fidelity(rows=16, tokens=40, mean_difference=1e-7, max_difference=3e-6, tolerance=0.01, precision="fp32"),
    packages={"torch": "2.13.0"},
    code=CodeFacts(commit=None, sources_sha256="f" * 64),
    hardware=HardwareFacts(machine="x86_64", cpu="a CPU", cpu_class="AVX512", cpu_flags_sha256="0" * 64, threads=1),
    adapter=AdapterFacts(sha256="1" * 64, files={"adapter_config.json": "2" * 64}, rank=4, size_bytes=100),
)


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return read_signing_key(Settings(home=tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def raw(pem: bytes) -> bytes:
    return sign(LINEAGE, pem)


def test_what_was_signed_is_read_with_its_signer(raw: bytes, pem: bytes) -> None:
    signed = read_signed(raw)
    assert signed.lineage.spec.options.target_modules == ("q_proj", "v_proj")
    assert signed.lineage.model_dump(mode="json") == LINEAGE.model_validate_json(LINEAGE.model_dump_json()).model_dump(
        mode="json"
    )
    assert signed.public_key == public_key_of(pem) == public_key_of(public_pem(signed.public_key))
    assert signed.key_id == key_id(signed.public_key)
    assert sign(LINEAGE, pem) == raw, "the same facts and key give the same bytes"


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_changed_byte_anywhere_is_found(raw: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(raw) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != raw[at]))
    with pytest.raises(LineageBroken):
        read_signed(raw[:at] + bytes([byte]) + raw[at + 1 :])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_byte_more_or_less_is_found(raw: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(raw)))
    more = data.draw(st.binary(max_size=3))
    changed = raw[:at] + more + raw[at + (0 if more else 1) :]
    if changed != raw:
        with pytest.raises(LineageBroken):
            read_signed(changed)


def test_every_hexadecimal_digit_counts_in_its_case(raw: bytes) -> None:
    document = json.loads(raw)
    for field in ("signature", "public_key"):
        with pytest.raises(LineageBroken):
            read_signed(raw.replace(document[field].encode(), document[field].upper().encode()))


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b"nothing", b"\xff", b'{"lineage":1}', b"[" * 100_000, b'{"signature":5}']
)
def test_what_is_no_lineage_is_said_to_be_none(raw: bytes) -> None:
    with pytest.raises(LineageBroken):
        read_signed(raw)


def test_a_document_under_another_key_names_that_key(raw: bytes, tmp_path: Path) -> None:
    other = sign(LINEAGE, read_signing_key(Settings(home=tmp_path)))
    assert read_signed(other).key_id != read_signed(raw).key_id


def test_the_key_is_made_once_and_for_its_user_only(tmp_path: Path) -> None:
    home = Settings(home=tmp_path)
    first = read_signing_key(home)
    assert read_signing_key(home) == first
    assert (tmp_path / "signing-key.pem").stat().st_mode & 0o777 == 0o600
    elsewhere = Settings(home=tmp_path / "other", signing_key=tmp_path / "signing-key.pem")
    assert read_signing_key(elsewhere) == first
    with pytest.raises(InvalidRequest, match="signing_key"):
        read_signing_key(Settings(home=tmp_path, signing_key=tmp_path / "gone.pem"))
    with pytest.raises(InvalidRequest, match="signing key"):
        sign(LINEAGE, b"no key")
