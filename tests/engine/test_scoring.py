"""Scores of given tokens against transformers and PEFT, and against what generating the same tokens reports."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.conftest import GREEDY, OpenCore, ref_of, request
from tests.engine.models import make_model, plain_logprobs
from tests.engine.test_serial import ONE_AT_A_TIME
from tests.tiny import make_adapter
from tuneloom.domain import AdapterRef
from tuneloom.errors import AdapterRejected, Overloaded

ROW = [(7 * at + 3) % 500 + 5 for at in range(60)]


@pytest.mark.parametrize("kv_cache", ["dense", "paged"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_scores_equal_transformers_at_each_place_across_chunks(
    open_core: OpenCore, tiny_base: Path, tiny_adapters: list[Path], kv_cache: str, with_adapter: bool
) -> None:
    core = open_core(max_step_tokens=16, kv_cache=kv_cache).core
    ref = ref_of(tiny_adapters[0]) if with_adapter else None
    places = [1, 15, 16, 17, 32, 33, 58, 59]

    expected = plain_logprobs(tiny_base, ROW[:1], ROW[1:], tiny_adapters[0] if with_adapter else None)

    assert core.score(ROW, places, ref) == pytest.approx([expected[at - 1] for at in places], abs=1e-4)
    assert core.stats().running == 0 and core.stats().kv_tokens_used == 0


def test_what_was_generated_scores_what_it_was_reported_with(open_core: OpenCore, tiny_adapters: list[Path]) -> None:
    harness, ref = open_core(max_sequences=2), ref_of(tiny_adapters[1])
    harness.core.add(request("a", ROW[:20], params=replace(GREEDY, max_tokens=6, logprobs=0), adapter=ref))
    harness.run()
    tokens = [token for output in harness.outputs["a"] for token in output.tokens]

    scores = harness.core.score([*ROW[:20], *(token.token_id for token in tokens)], list(range(20, 26)), ref)

    assert scores == pytest.approx([token.logprob for token in tokens], abs=1e-4)


def test_running_sequences_do_not_notice(open_core: OpenCore, tiny_adapters: list[Path]) -> None:
    def run(*, scores: bool) -> list[int]:
        harness = open_core(adapter_slots=2)
        harness.core.add(request("a", ROW[:10], adapter=ref_of(tiny_adapters[0])))
        while harness.core.has_sequences:
            harness.step()
            if scores:
                harness.core.score(ROW, [5, 40], ref_of(tiny_adapters[1]))
        return harness.tokens("a")

    assert run(scores=True) == run(scores=False)


def test_what_cannot_be_scored_leaves_nothing_behind(
    open_core: OpenCore, tmp_path: Path, tiny_base: Path, tiny_adapters: list[Path]
) -> None:
    core = open_core(max_sequences=1, adapter_slots=1, kv_cache_tokens=64).core
    broken = make_adapter(tmp_path / "broken", tiny_base, rank=4)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterRejected):
        core.score(ROW, [1], ref_of(broken))
    with pytest.raises(Overloaded):
        core.score(ROW * 3, [1])
    good: AdapterRef = ref_of(tiny_adapters[0])
    assert len(core.score(ROW, [1, 2], good)) == 2
    assert core.stats().kv_tokens_used == 0


@pytest.mark.parametrize("kind", ["gemma2", "falcon", "mamba2"])
def test_bases_that_cannot_share_steps_score_too(open_core: OpenCore, tmp_path: Path, kind: str) -> None:
    base = make_model(tmp_path / kind, kind, ONE_AT_A_TIME[kind][0])
    expected = plain_logprobs(base, ROW[:1], ROW[1:], None)
    core = open_core(base, max_step_tokens=16).core
    assert core.score(ROW, [3, 20, 59]) == pytest.approx([expected[at - 1] for at in (3, 20, 59)], abs=1e-3)
