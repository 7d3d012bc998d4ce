"""Text of answers as it grows: whole characters, up to the first stop string. No templates, no encoding."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuneloom.engine.text import Codec


class TextStream:
    """Text of one growing answer. Deltas joined equal `codec.decode` of all ids, up to the first stop string.

    A character is never split, and text that may turn out to be the start of a stop string is held back until it is
    known. The stop string that is complete first wins; it is not part of the text.
    """

    def __init__(self, codec: "Codec", stop: tuple[str, ...] = (), *, shown: frozenset[int] = frozenset()) -> None:
        """`shown`: special tokens that are text here, by their names."""
        self._decoder = codec.vocabulary.decoder(shown)
        self._stops = StopStrings(stop)

    def push(self, ids: Iterable[int], final: bool = False) -> tuple[str, bool]:
        """New text from `ids`, and whether a stop string has ended it. `final` flushes what is held back."""
        return self._stops.push(self._decoder.push(ids, final=final), final=final)


class StopStrings:
    """Ends growing text before the first stop string."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self._is_stopped = False

    def push(self, text: str, *, final: bool = False) -> tuple[str, bool]:
        """New text, and whether a stop string has ended it."""
        if self._is_stopped:
            return "", True
        text = self._held + text
        cut = self._first_stop(text)
        if cut is not None:
            self._held, self._is_stopped = "", True
            return text[:cut], True
        keep = 0 if final else self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _first_stop(self, text: str) -> int | None:
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins some stop string."""
        longest = min(max((len(stop) for stop in self._stop), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
