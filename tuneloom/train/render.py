"""Rows to token ids and what of them is learned, by the one codec that serving uses too. No files, no model."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuneloom.bases.catalogue import read_manifest
from tuneloom.engine.text import Codec
from tuneloom.errors import InvalidRequest, TuneloomError
from tuneloom.rows import Conversation, Pair, Preference, Row, Text
from tuneloom.train.failure import BaseUnreadable, is_out_of_memory


@dataclass(frozen=True)
class Example:
    """A row as token ids; `learned[i]` says that `ids[i]` is to be predicted from the ids before it.

    `prompt_length` counts the ids before the last answer; 0 where the row is plain text without a prompt.
    """

    ids: list[int]
    learned: list[bool]
    prompt_length: int = 0

    @property
    def parts(self) -> tuple["Example", ...]:
        """The sequences that are forwarded for the row."""
        return (self,)

    @property
    def num_answers(self) -> int:
        """Stretches of learned tokens, one for each answer."""
        return bytes([0, *self.learned]).count(b"\0\1")

    @property
    def num_learned(self) -> int:
        """Tokens that are predicted; the first of a row never is, since nothing comes before it."""
        return sum(self.learned[1:])

    def cut(self, limit: int) -> "Example":
        """Its first `limit` tokens."""
        if len(self.ids) <= limit:
            return self
        return Example(self.ids[:limit], self.learned[:limit], min(self.prompt_length, limit))


@dataclass(frozen=True)
class PreferenceExample:
    """A prompt with the answer to prefer and with the other, both as whole rows; learned are the answers alone.

    Both begin with the ids of the prompt as serving makes them.
    """

    chosen: Example
    rejected: Example

    @property
    def parts(self) -> tuple[Example, ...]:
        """The sequences that are forwarded for the row."""
        return self.chosen, self.rejected

    @property
    def prompt_length(self) -> int:
        return self.chosen.prompt_length

    @property
    def prompt(self) -> list[int]:
        return self.chosen.ids[: self.prompt_length]

    def cut(self, limit: int) -> "PreferenceExample":
        """Both rows with their first `limit` tokens."""
        return PreferenceExample(self.chosen.cut(limit), self.rejected.cut(limit))


Rendered = Example | PreferenceExample


class Renderer:
    """Rendering for one base. With `learn_all` every token is learned, whatever the row's format; not of preferences.

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
        """Raises BaseUnreadable if the tokenizer or a config of the base in `folder` does not load."""
        try:
            codec = Codec.load(folder)
            end_id = _end_of_text(folder) or min(codec.stop_ids)
        except Exception as error:
            if isinstance(error, TuneloomError) or is_out_of_memory(error):
                raise
            # The tokenizer's library raises plain `Exception`.
            manifest = read_manifest(folder)
            name = manifest.id if manifest else folder.name
            raise BaseUnreadable.of(name, f"{type(error).__name__}: {error}".replace(str(folder), name)) from error
        return cls(codec, end_id, learn_all=learn_all)

    def render(self, row: Conversation | Pair | Text) -> Example:
        """The row's example.

        Raises:
            InvalidRequest: the chat template refuses the row; the message says why.
        """
        (example,) = self.render_batch([row])
        if isinstance(example, InvalidRequest):
            raise example
        assert isinstance(example, Example)
        return example

    def render_preference(self, row: Preference) -> PreferenceExample:
        """The row's two examples. Raises like `render`."""
        (example,) = self.render_batch([row])
        if isinstance(example, InvalidRequest):
            raise example
        assert isinstance(example, PreferenceExample)
        return example

    def render_batch(self, rows: Sequence[Row]) -> list[Rendered | InvalidRequest]:
        """The example of each row, or what is wrong with it; faster than one by one, with the same ids."""
        parts = [part for row in rows for part in (row.answered() if isinstance(row, Preference) else (row,))]
        examples = iter(self._examples(parts))
        return [
            _preference(next(examples), next(examples)) if isinstance(row, Preference) else self._all(next(examples))
            for row in rows
        ]

    def _examples(self, rows: Sequence[Conversation | Pair | Text]) -> list[Example | InvalidRequest]:
        chats = [row for row in rows if isinstance(row, Conversation)]
        answers = iter(self._codec.encode_training_batch([(chat.messages, chat.tools) for chat in chats]))
        texts = [text for row in rows if not isinstance(row, Conversation) for text in _texts(row)]
        ids = iter(self._codec.encode_texts(texts))
        examples: list[Example | InvalidRequest] = []
        for row in rows:
            if isinstance(row, Pair):
                examples.append(self._pair(row, ids))
            elif isinstance(row, Text):
                whole = [*next(ids), self._end_id]
                examples.append(Example(whole, _after(whole, len(self._prefix))))
            else:
                found = next(answers)
                examples.append(found if isinstance(found, InvalidRequest) else Example(*found, _last_start(found[1])))
        return examples

    def _pair(self, row: Pair, encoded: Iterator[list[int]]) -> Example:
        prompt, whole = next(encoded), next(encoded)
        # Where a token spans the border, the completion is encoded alone: the prompt stays what serving makes of it.
        if whole[: len(prompt)] == prompt:
            completion = whole[len(prompt) :]
        else:
            completion = self._codec.encode_text(row.completion)[len(self._prefix) :]
        ids = [*prompt, *completion, self._end_id]
        return Example(ids, _after(ids, len(prompt)), len(prompt))

    def _all(self, example: Example | InvalidRequest) -> Example | InvalidRequest:
        if isinstance(example, InvalidRequest) or not self._learn_all:
            return example
        return Example(example.ids, _after(example.ids, len(self._prefix)), example.prompt_length)


def _texts(row: Pair | Text) -> list[str]:
    """What of a plain row is encoded, in the order in which it is taken."""
    return [row.prompt, row.prompt + row.completion] if isinstance(row, Pair) else [row.text]


def _preference(chosen: Example | InvalidRequest, rejected: Example | InvalidRequest) -> Rendered | InvalidRequest:
    for answered in (chosen, rejected):
        if isinstance(answered, InvalidRequest):
            return answered
    assert isinstance(chosen, Example) and isinstance(rejected, Example)
    assert chosen.ids[: chosen.prompt_length] == rejected.ids[: rejected.prompt_length]
    return PreferenceExample(chosen, rejected)


def _after(ids: Sequence[int], start: int) -> list[bool]:
    return [False] * min(start, len(ids)) + [True] * (len(ids) - start)


def _last_start(learned: Sequence[bool]) -> int:
    """Where the last stretch of learned tokens begins."""
    marks = bytes(learned)
    return marks.rfind(0, 0, max(0, marks.rfind(1))) + 1


def _end_of_text(folder: Path) -> int | None:
    """The first end-of-sequence id that the base's configs name."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            end = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if end is not None:
                return end[0] if isinstance(end, list) else end
    return None
