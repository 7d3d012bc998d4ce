"""Rows to token ids and what of them is learned, by the one codec that serving uses too. No files, no model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuneloom.engine.text import Codec
from tuneloom.rows import Conversation, Pair, Row


@dataclass(frozen=True)
class Example:
    """A row as token ids; `learned[i]` says that `ids[i]` is to be predicted from the ids before it."""

    ids: list[int]
    learned: list[bool]

    @property
    def num_answers(self) -> int:
        """Stretches of learned tokens, one for each answer."""
        return sum(now and not before for before, now in zip([False, *self.learned], self.learned, strict=False))


class Renderer:
    """Rendering for one base. With `learn_all` every token is learned, whatever the row's format.

    A conversation ends as the chat template ends it; plain text ends with the base's own end-of-text token, which is
    learned. The ids of a `prompt` are those that serving makes of it.
    """

    def __init__(self, codec: Codec, end_id: int, *, learn_all: bool = False) -> None:
        self.context_length = codec.context_length
        self._codec = codec
        self._end_id = end_id
        self._learn_all = learn_all
        self._prefix = codec.encode_text("")

    @classmethod
    def load(cls, folder: Path, *, learn_all: bool = False) -> "Renderer":
        codec = Codec.load(folder)
        return cls(codec, _end_of_text(folder) or min(codec.stop_ids), learn_all=learn_all)

    def render(self, row: Row) -> Example:
        """The row's example.

        Raises:
            InvalidRequest: the chat template refuses the row; the message says why.
        """
        if isinstance(row, Conversation):
            example = Example(*self._codec.encode_training(row.messages, row.tools))
        elif isinstance(row, Pair):
            example = self._pair(row)
        else:
            ids = [*self._codec.encode_text(row.text), self._end_id]
            example = Example(ids, _after(ids, len(self._prefix)))
        return Example(example.ids, _after(example.ids, len(self._prefix))) if self._learn_all else example

    def _pair(self, row: Pair) -> Example:
        prompt = self._codec.encode_text(row.prompt)
        whole = self._codec.encode_text(row.prompt + row.completion)
        # Where a token spans the border, the completion is encoded alone: the prompt stays what serving makes of it.
        if whole[: len(prompt)] == prompt:
            completion = whole[len(prompt) :]
        else:
            completion = self._codec.encode_text(row.completion)[len(self._prefix) :]
        ids = [*prompt, *completion, self._end_id]
        return Example(ids, _after(ids, len(prompt)))


def _after(ids: Sequence[int], start: int) -> list[bool]:
    return [index >= start for index in range(len(ids))]


def _end_of_text(folder: Path) -> int | None:
    """The first end-of-sequence id that the base's configs name."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            end = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if end is not None:
                return end[0] if isinstance(end, list) else end
    return None
