"""One pass over a file of rows: those that can be learned as examples, and what is wrong with the others. No arrays."""

from collections.abc import Iterator
from typing import BinaryIO

from tuneloom.errors import InvalidRequest
from tuneloom.rows import Conversation, Preference, Row, Scan
from tuneloom.train.render import Example, PreferenceExample, Rendered, Renderer

# Rows that are rendered together.
BATCH_ROWS = 64
BATCH_CHARACTERS = 256 << 10


class RowReader:
    """One pass over a file: the rows that can be learned as examples; `scan` holds what is wrong with the others.

    A row above `limit` tokens is a problem, or with `cut` loses what is beyond. `lost_tokens` are those that cutting
    takes, or would take; `missed_answers` those that the chat template renders so that they cannot be learned (see
    `Codec.encode_training`).
    """

    def __init__(self, scan: Scan, renderer: Renderer, limit: int, *, cut: bool = False) -> None:
        self.scan = scan
        self.long_rows = self.lost_tokens = self.unlearnable_rows = self.missed_answers = 0
        self._renderer = renderer
        self.limit = limit
        self._cut = cut

    def examples(self, file: BinaryIO) -> Iterator[tuple[int, Rendered]]:
        """Good rows with their line numbers, in order."""
        for batch in _batches(self.scan.rows(file)):
            rendered = self._renderer.render_batch([row for _, row in batch])
            for (line, row), example in zip(batch, rendered, strict=True):
                if isinstance(example, InvalidRequest):
                    self.scan.add(line, example.message)
                elif (fitting := self._fit(line, example)) is not None:
                    self.missed_answers += _missed_answers(row, example)
                    yield line, fitting
        # A batch is scanned before it is rendered, so that problems of both kinds come out of order.
        self.scan.problems.sort(key=lambda problem: (problem.line is None, problem.line or 0))

    def _fit(self, line: int, example: Rendered) -> Rendered | None:
        """The example within the limit; None, and a problem, if it cannot be learned."""
        length = max(len(part.ids) for part in example.parts)
        fitting = example
        if length > self.limit:
            self.long_rows += 1
            self.lost_tokens += sum(max(0, len(part.ids) - self.limit) for part in example.parts)
            if not self._cut:
                self.scan.add(
                    line,
                    f"The row has {length:,} tokens; the limit is {self.limit:,}. Shorten or split it, or set "
                    '`long_rows` to "cut".',
                )
                return None
            fitting = example.cut(self.limit)
        is_pair_alike = isinstance(fitting, PreferenceExample) and fitting.chosen.ids == fitting.rejected.ids
        if not is_pair_alike and all(any(part.learned[1:]) for part in fitting.parts):
            return fitting
        self.unlearnable_rows += 1
        if is_pair_alike:
            where = f" in their first {self.limit:,} tokens, to which they are cut" if length > self.limit else ""
            self.scan.add(line, f"Both answers are the same{where}: there is nothing to prefer.")
        elif length > self.limit:
            self.scan.add(
                line,
                f"The row has {length:,} tokens, and nothing that is learned is among the first {self.limit:,}, to "
                "which it is cut. Shorten what comes before its answer.",
            )
        else:
            self.scan.add(line, "The row has no token to learn.")
        return None


def _batches(rows: Iterator[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    batch: list[tuple[int, Row]] = []
    characters = 0
    for line, row in rows:
        batch.append((line, row))
        characters += _characters(row)
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(row: Row) -> int:
    """About how long a row is."""
    if isinstance(row, Preference):
        return sum(_characters(part) for part in row.answered())
    if isinstance(row, Conversation):
        return sum(len(message["content"]) for message in row.messages)
    return sum(map(len, vars(row).values()))


def _missed_answers(row: Row, example: Rendered) -> int:
    if not isinstance(row, Conversation) or not isinstance(example, Example):
        return 0
    wanted = sum(m["role"] == "assistant" and m.get("weight") != 0 for m in row.messages)
    return max(0, wanted - example.num_answers)
