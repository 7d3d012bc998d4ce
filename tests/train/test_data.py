import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import CHATML
from tests.train.conftest import Lab, colour_rows
from tuneloom.bases import get_base
from tuneloom.domain import JobSpec, TrainOptions
from tuneloom.errors import InvalidFile
from tuneloom.rows import Scan
from tuneloom.train import data
from tuneloom.train import reader as reader_module
from tuneloom.train.data import (
    PreferenceTokens,
    Tokens,
    TokensBuilder,
    held_out,
    load_tokens,
    read_tokens,
    save_tokens,
    split,
)
from tuneloom.train.reader import RowReader
from tuneloom.train.render import Example, PreferenceExample, Renderer


@pytest.fixture(scope="module")
def renderer(tiny_base: Path) -> Renderer:
    return Renderer.load(tiny_base)


def as_file(rows: list[dict[str, Any]]) -> io.BytesIO:
    return io.BytesIO("\n".join(map(json.dumps, rows)).encode())


def reader(renderer: Renderer, limit: int = 512, *, cut: bool = False, method: Any = "supervised") -> RowReader:
    return RowReader(Scan(method=method), renderer, limit, cut=cut)


def turn(question: str, answer: str) -> dict[str, Any]:
    return {"input": question, "output": answer}


def preference(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def sample_tokens(rows: int = 20) -> Tokens:
    builder = TokensBuilder()
    for row in range(rows):
        builder.add(Example(list(range(row, row + 3 + row % 4)), [False] * 2 + [True] * (1 + row % 4)))
    return builder.build()


def row_of(tokens: Tokens, row: int) -> tuple[list[int], list[bool]]:
    span = slice(tokens.offsets[row], tokens.offsets[row + 1])
    return tokens.ids[span].tolist(), tokens.learned[span].tolist()


def test_rows_in_batches_are_the_rows_one_by_one(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*colour_rows(30), {"messages": [{"role": "assistant", "content": "no"}]}, *colour_rows(5)]
    together, alone = reader(renderer), reader(renderer)
    batched = list(together.examples(as_file(rows)))
    monkeypatch.setattr(reader_module, "BATCH_ROWS", 1)
    assert list(alone.examples(as_file(rows))) == batched
    assert [line for line, _ in batched] == [*range(1, 31), *range(32, 37)]
    assert together.scan.problems == alone.scan.problems and together.scan.problems[0].line == 31


def test_problems_are_in_the_order_of_lines_whichever_stage_finds_them(renderer: Renderer) -> None:
    rows = [turn("red " * 600, "no"), {"x": 1}, turn("red " * 600, "no")]
    reading = reader(renderer)
    assert list(reading.examples(as_file(rows))) == []
    assert [problem.line for problem in reading.scan.problems] == [1, 2, 3]


def test_a_long_row_is_named_and_what_a_cut_would_lose_is_counted(renderer: Renderer) -> None:
    rows = [turn("red", "no"), turn("red", "yes " * 40)]
    whole = len(renderer.render_batch([row for _, row in Scan().rows(as_file(rows))])[1].ids)  # type: ignore[union-attr]
    reading = reader(renderer, 24)
    assert [line for line, _ in reading.examples(as_file(rows))] == [1]
    assert (reading.long_rows, reading.lost_tokens) == (1, whole - 24)
    (problem,) = reading.scan.problems
    assert problem.line == 2 and f"{whole} tokens; the limit is 24" in problem.message
    assert '`long_rows` to "cut"' in problem.message


def test_a_long_row_is_cut_at_its_end_and_the_lost_tokens_counted(renderer: Renderer) -> None:
    rows = [turn("red", "no"), turn("red", "yes " * 40)]
    whole = [example for _, example in reader(renderer).examples(as_file(rows))]
    reading = reader(renderer, 24, cut=True)
    short = [example for _, example in reading.examples(as_file(rows))]
    assert short[0] == whole[0]
    assert isinstance(short[1], Example) and isinstance(whole[1], Example)
    assert (short[1].ids, short[1].learned) == (whole[1].ids[:24], whole[1].learned[:24])
    assert (reading.long_rows, reading.lost_tokens) == (1, len(whole[1].ids) - 24)
    assert reading.scan.problem_count == 0


def test_a_cut_that_leaves_nothing_to_learn_is_refused_by_name(renderer: Renderer) -> None:
    reading = reader(renderer, 24, cut=True)
    assert list(reading.examples(as_file([turn("red " * 40, "no")]))) == []
    (problem,) = reading.scan.problems
    assert problem.line == 1 and "nothing that is learned is among the first 24" in problem.message
    assert reading.unlearnable_rows == 1


def test_answers_that_the_template_rewrites_are_counted_and_not_learned(tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    # Of questions before the last one only the length is shown, so that what came before the first answer changes.
    last_question = (
        "{% set seen = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set seen.last = loop.index %}{% endif %}{% endfor %}"
    )
    shown = "{{ m['content'] | length if m['role'] == 'user' and loop.index < seen.last else m['content'] }}"
    (base / "chat_template.jinja").write_text(last_question + CHATML.replace("{{ m['content'] }}", shown))
    rewriting = Renderer.load(base)
    first, last = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
    user = {"role": "user", "content": "red?"}
    rows = [{"messages": [user, first, user, last]}, {"messages": [user, {**first, "weight": 0}, user, last]}]
    reading = reader(rewriting)
    examples = [example for _, example in reading.examples(as_file(rows))]
    assert reading.missed_answers == 1
    assert [example.num_answers for example in examples if isinstance(example, Example)] == [1, 1]
    plain = reader(Renderer.load(tiny_base))
    assert len(list(plain.examples(as_file(rows)))) == 2 and plain.missed_answers == 0


def test_preferences_are_cut_on_both_sides_and_refused_where_they_become_the_same(renderer: Renderer) -> None:
    rows = [preference("red", " yes" * 40, " no"), preference("red", " yes" * 40 + " no", " yes" * 40 + " up")]
    reading = reader(renderer, 24, cut=True, method="dpo")
    ((line, example),) = reading.examples(as_file(rows))
    assert line == 1 and isinstance(example, PreferenceExample)
    assert len(example.chosen.ids) == 24 and len(example.rejected.ids) < 24
    (problem,) = reading.scan.problems
    assert problem.line == 2 and "Both answers are the same in their first 24 tokens" in problem.message


def test_rows_are_selected_with_all_that_belongs_to_them() -> None:
    tokens = sample_tokens()
    rows = np.zeros(20, dtype=np.bool_)
    rows[[3, 4, 17]] = True
    some = tokens.select(rows)
    assert some.num_rows == 3
    assert [row_of(some, index) for index in range(3)] == [row_of(tokens, row) for row in (3, 4, 17)]
    assert tokens.select(~rows).num_rows == 17


def test_what_is_held_out_depends_on_seed_and_number_of_rows_alone() -> None:
    rows = held_out(200, 0.1, seed=3)
    assert rows.sum() == 20
    assert (rows == held_out(200, 0.1, seed=3)).all()
    assert (rows != held_out(200, 0.1, seed=4)).any()
    # Written down: a rerun in years must hold out the same rows.
    assert np.flatnonzero(held_out(12, 0.25, seed=7)).tolist() == [2, 9, 10]
    assert [int(held_out(count, 0.01, seed=1).sum()) for count in (2, 10, 50)] == [1, 1, 1]
    assert held_out(3, 0.5, seed=1).sum() == 2


def test_a_share_splits_the_rows_into_two_parts_that_share_none() -> None:
    tokens = sample_tokens()
    spec = JobSpec(base="b", training_file="f", seed=5, options=TrainOptions(validation_share=0.2))
    training, validation = split(tokens, spec)
    assert validation is not None and (training.num_rows, validation.num_rows) == (16, 4)
    parts = [row_of(part, row) for part in (training, validation) for row in range(part.num_rows)]
    assert sorted(parts) == sorted(row_of(tokens, row) for row in range(20))
    assert split(tokens, spec.model_copy(update={"options": TrainOptions()})) == (tokens, None)
    with pytest.raises(InvalidFile, match="one row"):
        split(sample_tokens(1), spec)


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_tokens_are_kept_and_found_again_and_made_anew_where_they_matter(lab: Lab, method: Any) -> None:
    rows = (
        [preference(f"say {n}", f" yes {n} left right up", " no") for n in range(3)]
        if method == "dpo"
        else colour_rows(3)
    )
    file, base = lab.add_file(rows), get_base(lab.settings.bases_dir, "tiny/llama")
    spec = JobSpec(base=base.id, training_file=file.id, seed=1, method=method)
    folder = lab.settings.home / "runs" / "x"
    renderers: list[int] = []

    def renderer() -> Renderer:
        renderers.append(1)
        return Renderer.load(base.path)

    first, again = (load_tokens(lab.store, file, base, spec, folder, renderer) for _ in range(2))
    assert len(renderers) == 1 and isinstance(first, PreferenceTokens if method == "dpo" else Tokens)
    assert same(first, again) and first.num_rows == 3
    limit = int(first.lengths.max()) - 1
    cut = spec.model_copy(update={"options": TrainOptions(long_rows="cut", max_length=limit)})
    short = load_tokens(lab.store, file, base, cut, folder, renderer)
    assert len(renderers) == 2 and short.lengths.max() == limit


def test_pairs_keep_their_prompts_and_lengths(renderer: Renderer, tmp_path: Path) -> None:
    rows = [preference("red", " yes yes up", " no"), preference("red green", " up", " no maybe")]
    builder = data.PreferenceBuilder()
    examples = [example for _, example in reader(renderer, method="dpo").examples(as_file(rows))]
    for example in examples:
        assert isinstance(example, PreferenceExample)
        builder.add(example)
    tokens = builder.build()
    for row, example in enumerate(examples):
        assert isinstance(example, PreferenceExample)
        assert row_of(tokens.chosen, row) == (example.chosen.ids, example.chosen.learned)
        assert row_of(tokens.rejected, row) == (example.rejected.ids, example.rejected.learned)
        assert tokens.prompt_lengths[row] == example.prompt_length
        assert tokens.lengths[row] == max(len(example.chosen.ids), len(example.rejected.ids))
    save_tokens(tokens, tmp_path / "tokens.npz")
    assert same(read_tokens(tmp_path / "tokens.npz"), tokens)
    second = tokens.select(np.array([False, True]))
    assert row_of(second.rejected, 0) == row_of(tokens.rejected, 1)
    assert second.prompt_lengths.tolist() == [tokens.prompt_lengths[1]]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, PreferenceTokens):
        parts = ((first.chosen, second.chosen), (first.rejected, second.rejected))
        return (first.prompt_lengths == second.prompt_lengths).all() and all(same(*pair) for pair in parts)
    return all((getattr(first, name) == getattr(second, name)).all() for name in ("ids", "learned", "offsets"))
