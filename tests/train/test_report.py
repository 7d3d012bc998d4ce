import tracemalloc

import numpy as np
import pytest

from tuneloom.rows import Scan
from tuneloom.train.reader import RowReader
from tuneloom.train.render import Example, PreferenceExample
from tuneloom.train.report import MAX_PAIRS, FileReport, Tally, Totals, notes_of, notes_of_overlap

LIMIT = 100


def example(prompt: int, answer: int, *, length: int = 10, learned: int = 4) -> Example:
    """A row of `length` tokens of which the last `learned` are learned."""
    ids = [prompt] * (length - learned) + [answer] * learned
    return Example(ids, [False] * (length - learned) + [True] * learned, length - learned)


def tally(*rows: tuple[int, Example | PreferenceExample]) -> Tally:
    made = Tally()
    for line, row in rows:
        made.add(line, row)
    return made


def report(made: Tally, **counts: int) -> FileReport:
    reader = RowReader(Scan(), None, LIMIT)  # type: ignore[arg-type]
    vars(reader).update(counts)
    return made.report("rows.jsonl", reader)


def test_every_number_of_the_report_is_that_of_the_rows() -> None:
    made = tally(*((line, example(line, 1, length=line, learned=2)) for line in range(5, 105)))
    found = report(made, long_rows=4, lost_tokens=99, unlearnable_rows=3, missed_answers=2)
    assert (found.rows, found.tokens, found.learned_tokens) == (100, sum(range(5, 105)), 200)
    # 50 of the lengths 5..104 are at most 54, 95 at most 99.
    assert (found.tokens_p50, found.tokens_p95, found.tokens_max) == (54, 99, 104)
    assert (found.long_rows, found.lost_tokens, found.unlearnable_rows) == (4, 99, 3)
    assert (found.rewritten_answers, found.limit, found.duplicate_rows) == (2, LIMIT, 0)


def test_an_empty_file_has_a_report_of_zeros() -> None:
    found = report(Tally())
    assert (found.rows, found.tokens, found.tokens_p95, found.duplicates) == (0, 0, 0, ())
    assert Tally().overlap(Tally()).rows == 0


def test_repeated_rows_are_told_with_the_first_line_that_is_the_same() -> None:
    a, b, c = example(1, 1), example(1, 2), example(2, 1)
    found = report(tally((1, a), (3, b), (4, a), (7, c), (8, b), (9, a)))
    assert found.duplicate_rows == 3
    assert found.duplicates == ((4, 1), (8, 3), (9, 1))
    many = report(tally(*((line, a) for line in range(1, 100))))
    assert (many.duplicate_rows, len(many.duplicates)) == (98, MAX_PAIRS)
    assert many.duplicates[0] == (2, 1)


def test_rows_that_learn_something_else_are_not_the_same() -> None:
    ids = [1, 2, 3, 4]
    rows = [Example(ids, [False, False, True, True]), Example(ids, [False, False, False, True])]
    assert report(tally(*enumerate(rows))).duplicate_rows == 0
    good, bad = example(1, 1), example(1, 2)
    pairs = [PreferenceExample(good, bad), PreferenceExample(bad, good), PreferenceExample(good, bad)]
    assert report(tally(*enumerate(pairs))).duplicates == ((2, 0),)


def test_a_pair_counts_the_tokens_of_both_and_the_length_of_the_longer() -> None:
    pair = PreferenceExample(example(1, 1, length=12, learned=3), example(1, 2, length=14, learned=5))
    assert tally((1, pair)).totals() == Totals(rows=1, tokens=26, learned_tokens=8, longest=14)


def test_validation_rows_that_are_trained_on_and_prompts_with_another_answer_are_counted_apart() -> None:
    training = tally((1, example(1, 1)), (2, example(2, 1)), (4, example(3, 1)))
    validation = tally((1, example(2, 1)), (2, example(9, 1)), (3, example(1, 5)), (6, example(3, 1)))
    overlap = validation.overlap(training)
    assert (overlap.rows, overlap.prompts) == (2, 1)
    assert overlap.pairs == ((1, 2), (6, 4))
    messages = [note.message for note in notes_of_overlap(overlap)]
    assert messages[0].startswith("2 validation rows are among the training rows too (line 1 = 2, line 6 = 4)")
    assert messages[1] == "1 validation row has the prompt of a training row, with another answer"


def test_plain_text_has_no_prompt_to_share() -> None:
    one, other = (Example([1, word], [True, True]) for word in (5, 6))
    overlap = tally((1, one)).overlap(tally((1, other)))
    assert (overlap.rows, overlap.prompts) == (0, 0)
    assert notes_of_overlap(overlap) == []


def test_the_prompt_of_an_answer_is_all_that_comes_before_the_last_one() -> None:
    # The same first turn is no shared prompt; the same turns up to the last answer are.
    one = Example([1, 7, 2, 8], [False, True, False, True], 3)
    other_start, other_end = Example([1, 9, 2, 8], [False, True, False, True], 3), Example([1, 7, 2, 9], one.learned, 3)
    assert tally((1, other_start)).overlap(tally((1, one))).prompts == 0
    assert tally((1, other_end)).overlap(tally((1, one))).prompts == 1


def test_totals_and_overlap_are_those_of_the_rows_that_are_chosen() -> None:
    made = tally((1, example(1, 1)), (2, example(2, 1, length=20)), (5, example(1, 1)))
    rows = np.array([False, True, True])
    assert made.select(rows).totals() == Totals(2, 30, 8, 20)
    assert made.select(~rows).overlap(made.select(rows)).pairs == ((1, 5),)


def test_the_history_has_a_line_of_sizes_and_a_warning_for_each_thing_that_is_odd() -> None:
    made = tally((1, example(1, 1)), (2, example(1, 1)))
    plain, *warnings = notes_of("Training file", report(made, long_rows=3, lost_tokens=1234, missed_answers=2))
    assert plain.level == "info"
    assert plain.message == "Training file: 2 rows, 20 tokens (p50 10, p95 10, max 10), 8 learned"
    assert plain.data["tokens_p95"] == 10
    assert [(note.level, note.message) for note in warnings] == [
        ("warn", "Training file: 3 rows are longer than 100 tokens and cut at the end; 1,234 tokens are lost"),
        ("warn", "Training file: 1 row repeats an earlier one (line 2 = 1)"),
        (
            "warn",
            "Training file: 2 answers are not learned, since the base's chat template rewrites them when later turns "
            "follow",
        ),
    ]
    assert warnings[0].data == {"long_rows": 3, "lost_tokens": 1234, "limit": 100}
    assert warnings[1].data == {"duplicate_rows": 1, "duplicates": [[2, 1]]}


@pytest.mark.parametrize("count", [50_000])
def test_a_row_costs_a_few_bytes_however_long_it_is(count: int) -> None:
    rows = [example(number, 1, length=200) for number in range(16)]
    tracemalloc.start()
    try:
        made = tally(*((line, rows[line % 16]) for line in range(count)))
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        found = report(made)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.duplicate_rows == count - 16
    # 32 bytes a row, and what arrays keep in reserve.
    assert 32 * count <= held < 40 * count + 100_000
    assert peak - held < 70 * count
