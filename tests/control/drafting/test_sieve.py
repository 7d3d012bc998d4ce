"""Which rows are new, and which are in the language that was asked for."""

import itertools
import random

import pytest

from tests.control.drafting.model import WORDS
from tuneloom.control.drafting.duplicates import Seen
from tuneloom.control.drafting.language import LANGUAGES, _identifier, is_other_than


def text_of(seed: int, words: int) -> list[str]:
    return random.Random(seed).choices(WORDS + [f"{word}s" for word in WORDS], k=words)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I reset my password?", "how do i  RESET my password"),
        ("A ﬁne café", "a fine cafe\u0301"),
        ("パスワードをリセット。", "パスワードをリセット"),
        ("!!!", "!!!"),
        ("in\u200bvisible\ufeff", "invisible"),
        ("well-known", "well known"),
        ("नमस्ते, दुनिया!", "नमस्ते दुनिया"),
    ],
)
def test_case_spaces_punctuation_and_forms_make_no_new_text(one: str, other: str):
    seen = Seen(0.8)
    assert seen.add(one) is None
    assert seen.add(other) == "exact_duplicate"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2 + 2?", "What is 2 - 2?"),
        ("Is x > 1?", "Is x < 1?"),
        ("a degree of -5", "a degree of 5"),
        ("I write C++", "I write C"),
        ("I write C#", "I write C"),
        ("it costs $5", "it costs €5"),
        ("50% off", "50 off"),
        ("👍", "👎"),
        # Words that differ in a vowel sign.
        ("कि", "की"),
        ("பணம்", "பாணம்"),
        ("টাকা", "টাকি"),
    ],
)
def test_signs_of_sums_and_of_vowels_make_a_new_text(one: str, other: str):
    seen = Seen(None)
    assert seen.add(one) is None
    assert seen.add(other) is None


def test_numbers_and_words_make_a_new_text():
    seen = Seen(0.8)
    texts = [
        "What is 2 + 2? 4",
        "What is 2 + 3? 5",
        "Was ist 2 + 2? 4",
        "!!!",
        "???",
        "東京はどこですか",
        "大阪はどこですか",
    ]
    assert [seen.add(text) for text in texts] == [None] * len(texts)


@pytest.mark.parametrize("similarity", [0.6, 0.8, 0.95])
def test_texts_are_near_exactly_where_their_word_pairs_are(similarity: float):
    """MinHash only chooses what is compared: against a comparison of all pairs, it misses almost nothing."""
    rng, missed, pairs = random.Random(5), 0, 0
    for seed in range(150):
        base = text_of(seed, 200)
        changed = list(base)
        for _ in range(rng.randrange(0, 40)):
            changed[rng.randrange(len(changed))] = f"new{rng.randrange(10**6)}"
        one, two = (set(itertools.pairwise(text)) for text in (base, changed))
        is_near = changed != base and len(one & two) >= similarity * len(one | two)
        seen = Seen(similarity)
        for other in range(5):
            seen.add(" ".join(text_of(1000 + other, 200)))
        seen.add(" ".join(base))
        found = seen.add(" ".join(changed)) == "near_duplicate"
        assert not (found and not is_near)
        missed += is_near and not found
        pairs += is_near
    assert pairs > 5 and missed <= pairs * 0.05


def test_languages_are_those_that_the_library_knows():
    assert LANGUAGES.keys() <= set(_identifier().labels)


@pytest.mark.parametrize(
    ("wanted", "text", "is_other"),
    [
        ("en", "Restart the router and wait until the green light is on again.", False),
        ("en", "Starten Sie den Router neu und warten Sie, bis die Lampe leuchtet.", True),
        ("de", "Starten Sie den Router neu und warten Sie, bis die Lampe leuchtet.", False),
        ("ja", "ルーターを再起動して、緑のランプが再び点灯するまでお待ちください。", False),
        ("en", "ルーターを再起動して、緑のランプが再び点灯するまでお待ちください。", True),
        ("fr", "42 + 17 = 59; x = 3", False),
        ("fr", "Rebooting now", False),
    ],
)
def test_only_what_is_surely_another_language_counts_as_one(wanted: str, text: str, is_other: bool):
    assert is_other_than(wanted, text) is is_other


def test_a_thousand_rows_are_sifted_in_seconds():
    seen = Seen(0.8)
    assert [seen.add(" ".join(text_of(seed, 200))) for seed in range(1000)] == [None] * 1000
