"""Which rows are kept: within the bounds of length, in the language that was asked for, and new."""

from collections.abc import Iterable
from typing import Any

from tuneloom.control.drafting import shapes
from tuneloom.control.drafting.duplicates import Seen
from tuneloom.control.drafting.language import is_other_than
from tuneloom.domain import DraftSpec


class Sieve:
    """One for each drafter, and one for all rows of a draft at its end. `seeds` are rows that are not to come again."""

    def __init__(self, spec: DraftSpec, seeds: Iterable[dict[str, Any]]) -> None:
        self._spec = spec
        self._seen = Seen(spec.similarity)
        for row in seeds:
            self._seen.add(shapes.text_of(row))

    def reason(self, row: dict[str, Any]) -> str | None:
        """Why the row is dropped; None keeps it, and those like it are dropped from then on."""
        text = shapes.text_of(row)
        return self._length(text) or self._language(text) or self._seen.add(text)

    def is_new(self, row: dict[str, Any]) -> str | None:
        """As `reason`, for a row that has the right length and language."""
        return self._seen.add(shapes.text_of(row))

    def _length(self, text: str) -> str | None:
        length = self._spec.length
        words = len(text.split())
        for size, low, high in (
            (len(text), length.min_chars, length.max_chars),
            (words, length.min_words, length.max_words),
        ):
            if low is not None and size < low:
                return "too_short"
            if high is not None and size > high:
                return "too_long"
        return None

    def _language(self, text: str) -> str | None:
        wanted = self._spec.language
        return "wrong_language" if wanted is not None and is_other_than(wanted, text) else None
