"""What there is to say of a job's files before it trains: sizes, what is cut, what repeats, what two files share.

Numbers only: no files, no codec. A row costs 24 bytes, 32 where there are rows for validation, and while repeated rows
are looked for about 17 more.
"""

import hashlib
from array import array
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from tuneloom.train.reader import RowReader
from tuneloom.train.render import Example, Rendered

MAX_PAIRS = 10
_NO_PROMPT = 0


@dataclass(frozen=True)
class Totals:
    """Rows together. `longest` is the longest sequence; a pair of answers is two, and `tokens` counts both."""

    rows: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0


NOTHING = Totals()


@dataclass(frozen=True)
class FileReport:
    """One file for one base. The first counts are of the rows that are learned, as they are after a cut.

    `tokens_p50` and its like are of the longest sequence of each row. `problem_count` counts what is wrong,
    `long_rows` the rows above the limit, cut or refused, and `lost_tokens` what of them is or would be cut.
    `duplicates` are lines, each with the first line that is the same; `duplicate_rows` counts all. `rewritten_answers`
    are not learned, since the chat template renders them otherwise once more follows.
    """

    filename: str
    format: str | None
    rows: int
    tokens: int
    learned_tokens: int
    tokens_p50: int
    tokens_p95: int
    tokens_max: int
    limit: int
    problem_count: int
    long_rows: int
    lost_tokens: int
    unlearnable_rows: int
    duplicate_rows: int
    duplicates: tuple[tuple[int, int], ...]
    rewritten_answers: int

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "duplicates": [list(pair) for pair in self.duplicates]}


@dataclass(frozen=True)
class Overlap:
    """What validation and training share: rows of validation that are in training too, `pairs` being the first of
    them as lines (validation, training), and rows whose prompt is there with another answer only.
    """

    rows: int
    prompts: int
    pairs: tuple[tuple[int, int], ...]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "pairs": [list(pair) for pair in self.pairs]}


@dataclass(frozen=True)
class Note:
    """A sentence for the job's history, with its numbers."""

    level: Literal["info", "warn"]
    message: str
    data: dict[str, Any]


class Tally:
    """Counts the rows of one file. Rows are the same if their tokens are, and what is learned of them.

    `has_overlap`: another file's rows are held against these, by their prompts too.
    """

    def __init__(self, *, has_overlap: bool = True) -> None:
        self._has_overlap = has_overlap
        self._lines, self._longest = array("I"), array("I")
        self._tokens, self._learned = array("I"), array("I")
        self._rows, self._prompts = array("Q"), array("Q")

    def add(self, line: int, example: Rendered) -> None:
        parts = example.parts
        self._lines.append(line)
        self._longest.append(max(len(part.ids) for part in parts))
        self._tokens.append(sum(len(part.ids) for part in parts))
        self._learned.append(sum(part.num_learned for part in parts))
        self._rows.append(_row_hash(parts))
        if self._has_overlap:
            self._prompts.append(_prompt_hash(example if isinstance(example, Example) else example.chosen))

    @property
    def num_rows(self) -> int:
        return len(self._lines)

    @property
    def lengths(self) -> np.ndarray:
        """Of each row, its longest sequence (num_rows,)."""
        return _view(self._longest)

    def totals(self, rows: np.ndarray | None = None) -> Totals:
        """Of all rows, or of those that are True in `rows` (num_rows,)."""
        tokens, learned, longest = (_view(column) for column in (self._tokens, self._learned, self._longest))
        if rows is not None:
            tokens, learned, longest = tokens[rows], learned[rows], longest[rows]
        return Totals(
            rows=len(tokens),
            tokens=int(tokens.sum(dtype=np.int64)),
            learned_tokens=int(learned.sum(dtype=np.int64)),
            longest=int(longest.max(initial=0)),
        )

    def report(self, filename: str, reader: RowReader) -> FileReport:
        """The file's report; `reader` has been read to its end."""
        totals = self.totals()
        p50, p95 = self._percentiles(50, 95)
        repeated, pairs = self._duplicates()
        return FileReport(
            filename=filename,
            format=reader.scan.format,
            rows=totals.rows,
            tokens=totals.tokens,
            learned_tokens=totals.learned_tokens,
            tokens_p50=p50,
            tokens_p95=p95,
            tokens_max=totals.longest,
            limit=reader.limit,
            problem_count=reader.scan.problem_count,
            long_rows=reader.long_rows,
            lost_tokens=reader.lost_tokens,
            unlearnable_rows=reader.unlearnable_rows,
            duplicate_rows=repeated,
            duplicates=pairs,
            rewritten_answers=reader.missed_answers,
        )

    def select(self, rows: np.ndarray) -> "Tally":
        """The rows that are True in `rows` (num_rows,)."""
        part = Tally()
        for name, column in vars(self).items():
            if isinstance(column, array) and column:
                vars(part)[name] = array(column.typecode, _view(column)[rows].tobytes())
        return part

    def _percentiles(self, *shares: int) -> list[int]:
        """The least length that so many of a hundred rows do not exceed."""
        if not self.num_rows:
            return [0] * len(shares)
        return [int(length) for length in np.percentile(_view(self._longest), shares, method="inverted_cdf")]

    def _duplicates(self) -> tuple[int, tuple[tuple[int, int], ...]]:
        hashes = _view(self._rows)
        # Millions of short rows have to fit: nothing is held longer, or wider, than it has to be.
        order = np.argsort(hashes, kind="stable").astype(np.uint32)
        ordered = hashes[order]
        is_repeat = np.zeros(len(order), dtype=np.bool_)
        is_repeat[1:] = ordered[1:] == ordered[:-1]
        del ordered
        repeats = order[is_repeat]
        count = len(repeats)
        if count > MAX_PAIRS:
            repeats = np.partition(repeats, MAX_PAIRS)[:MAX_PAIRS]
        shown = np.sort(repeats)
        firsts = [int(np.argmax(hashes == hashes[row])) for row in shown]
        return count, _pairs(self._lines, shown, self._lines, firsts)

    def overlap(self, training: "Tally") -> Overlap:
        """What this file, the validation file, shares with that."""
        rows, of_training = _view(self._rows), _view(training._rows)
        is_shared = np.isin(rows, of_training)
        prompts = _view(self._prompts)
        has_prompt = (prompts != _NO_PROMPT) & np.isin(prompts, _view(training._prompts))
        shown = np.flatnonzero(is_shared)[:MAX_PAIRS]
        partners = [int(np.flatnonzero(of_training == rows[row])[0]) for row in shown]
        return Overlap(
            rows=int(is_shared.sum()),
            prompts=int((has_prompt & ~is_shared).sum()),
            pairs=_pairs(self._lines, shown, training._lines, partners),
        )


def notes_of(name: str, report: FileReport) -> list[Note]:
    """What the history of a job says of a good file; `name` begins the sentences."""
    data = report.as_json()
    notes = [
        Note(
            "info",
            f"{name}: {report.rows:,} rows, {report.tokens:,} tokens (p50 {report.tokens_p50:,}, "
            f"p95 {report.tokens_p95:,}, max {report.tokens_max:,}), {report.learned_tokens:,} learned",
            data,
        )
    ]
    if report.long_rows:
        lost = {"long_rows": report.long_rows, "lost_tokens": report.lost_tokens, "limit": report.limit}
        text = f"{_are(report.long_rows, 'row')} longer than {report.limit:,} tokens and cut at the end"
        notes.append(Note("warn", f"{name}: {text}; {_are(report.lost_tokens, 'token')} lost", lost))
    if report.duplicate_rows:
        repeated = {"duplicate_rows": report.duplicate_rows, "duplicates": data["duplicates"]}
        text = f"{_count(report.duplicate_rows, 'row')} {'repeats' if report.duplicate_rows == 1 else 'repeat'}"
        notes.append(Note("warn", f"{name}: {text} an earlier one ({_lines(report.duplicates)})", repeated))
    if report.rewritten_answers:
        text = f"{_are(report.rewritten_answers, 'answer')} not learned, since the base's chat template rewrites them"
        notes.append(
            Note(
                "warn",
                f"{name}: {text} when later turns follow",
                {"rewritten_answers": report.rewritten_answers},
            )
        )
    return notes


def notes_of_overlap(overlap: Overlap) -> list[Note]:
    notes = []
    if overlap.rows:
        text = f"{_are(overlap.rows, 'validation row')} among the training rows too ({_lines(overlap.pairs)})"
        data = {"rows": overlap.rows, "pairs": overlap.as_json()["pairs"]}
        notes.append(Note("warn", f"{text}; the validation loss tells less", data))
    if overlap.prompts:
        verb = "has" if overlap.prompts == 1 else "have"
        text = f"{_count(overlap.prompts, 'validation row')} {verb} the prompt of a training row, with another answer"
        notes.append(Note("warn", text, {"prompts": overlap.prompts}))
    return notes


def _row_hash(parts: tuple[Example, ...]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part.ids).to_bytes(8, "little"))
        digest.update(array("i", part.ids))
        digest.update(bytes(part.learned))
    return int.from_bytes(digest.digest(), "little")


def _prompt_hash(example: Example) -> int:
    if not example.prompt_length:
        return _NO_PROMPT
    prompt = array("i", example.ids[: example.prompt_length])
    return int.from_bytes(hashlib.blake2b(prompt, digest_size=8).digest(), "little") or 1


def _view(column: "array[int]") -> np.ndarray:
    """The numbers of an array without a copy; it must not grow while they are in use."""
    return np.frombuffer(column, dtype=column.typecode) if column else np.empty(0, dtype=column.typecode)


def _pairs(lines: Any, rows: Any, other_lines: Any, other_rows: Any) -> tuple[tuple[int, int], ...]:
    return tuple((lines[row], other_lines[other]) for row, other in zip(rows, other_rows, strict=True))


def _lines(pairs: tuple[tuple[int, int], ...]) -> str:
    shown = ", ".join(f"line {line} = {first}" for line, first in pairs[:3])
    return f"{shown}{', ...' if len(pairs) > 3 else ''}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _are(number: int, noun: str) -> str:
    return f"{_count(number, noun)} {'is' if number == 1 else 'are'}"
