"""Texts that are the same, or nearly so, among those seen before."""

import functools
import hashlib
import itertools
import re
import unicodedata
from typing import Literal

from rensa import RMinHash, RMinHashLSH

# 32 bands of 4 rows: a pair of similarity 0.6 is found with probability 0.99, one of 0.8 almost surely.
PERMUTATIONS, BANDS, SEED = 128, 32, 1
MIN_SIMILARITY = 0.6

# Of scripts that put no spaces between words each character counts: Thai, Lao, Khmer, Burmese, Chinese, Japanese.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
# What is not seen: soft hyphens, joiners, marks of direction, forms of emoji.
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")


class Seen:
    """Texts that were let in. `similarity` is that of sets of word pairs (Jaccard); None lets alike texts in.

    Which pairs are compared comes from MinHash with locality-sensitive hashing (Broder 1997); the comparison is exact.
    """

    def __init__(self, similarity: float | None) -> None:
        self._similarity = similarity
        self._exact: set[bytes] = set()
        self._shingles: list[frozenset[str]] = []
        self._index = RMinHashLSH(MIN_SIMILARITY, PERMUTATIONS, BANDS)

    def add(self, text: str) -> Literal["exact_duplicate", "near_duplicate"] | None:
        """None if the text is new, and it is seen from then on; else what it is."""
        words = _words(text)
        digest = hashlib.sha256(" ".join(words).encode()).digest() if words else text.strip().encode()
        if digest in self._exact:
            return "exact_duplicate"
        if self._similarity is not None and self._is_near(words):
            return "near_duplicate"
        self._exact.add(digest)
        return None

    def _is_near(self, words: list[str]) -> bool:
        assert self._similarity is not None
        shingles = frozenset(map(" ".join, itertools.pairwise(words))) or frozenset(words)
        if not shingles:
            return False
        sketch = RMinHash(PERMUTATIONS, SEED)
        sketch.update(list(shingles))
        for key in self._index.query(sketch):
            other = self._shingles[key]
            common = len(shingles & other)
            if common >= self._similarity * (len(shingles) + len(other) - common):
                return True
        self._index.insert(len(self._shingles), sketch)
        self._shingles.append(shingles)
        return False


def _words(text: str) -> list[str]:
    """What counts of a text: not its case, spaces, punctuation or forms of characters, but what is said by signs."""
    return _word().findall(_INVISIBLE.sub("", unicodedata.normalize("NFKC", text).casefold()))


@functools.cache
def _word() -> re.Pattern[str]:
    """Words with their vowel signs and accents, which `\\w` leaves out; signs of sums, money, emoji; `-5`, `5%`, C#."""
    marks, signs = _class("M"), _class("Sm", "Sc", "So")
    # The first comes before the marks among it.
    return re.compile(rf"[{_UNSPACED}]|(?:[^\W{_UNSPACED}]+|[{marks}]+)+|[{signs}^]|[-*/](?=\s?\d)|(?<=\d)%|(?<=\w)#")


def _class(*categories: str) -> str:
    """The characters of some categories of Unicode, as what stands between the brackets of a pattern."""
    codes = [code for code in range(0x20000) if unicodedata.category(chr(code)).startswith(categories)]
    runs = itertools.groupby(enumerate(codes), key=lambda pair: pair[1] - pair[0])
    spans = [[code for _, code in run] for _, run in runs]
    return "".join(f"\\U{span[0]:08x}-\\U{span[-1]:08x}" for span in spans)
