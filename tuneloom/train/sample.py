"""Which rows of a job the fidelity checks look at: the same in every process, each kind that the file has among them.

Knows no codec and no model.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tuneloom.rows import Conversation, Pair, Preference, Row, Text
from tuneloom.train.data import PreferenceTokens, Tokens

# Rows at the start of a file that are looked through for kinds, of which so many are taken each.
SCANNED_ROWS = 2000
ROWS_OF_A_KIND = 3
SPREAD_ROWS = 8
# What goes through both models at the end of a run: a few seconds of a small base on two cores.
SCORED_ROWS = 16
SCORED_TOKENS = 4096
SCORED_PLACES = 128

USER = {"role": "user", "content": "What is the weather in Łódź?"}
SYSTEM = {"role": "system", "content": "Answer in one line.\n\n  Keep the spaces."}
ANSWER = {"role": "assistant", "content": "Rain, 7 °C 🙂"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call000001", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Łódź"}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call000001", "content": '{"rain": true}'}
# Conversations that every base is tried with, by kind; a template may refuse a kind.
MADE_UP = {
    "one turn": Conversation((USER, ANSWER)),
    "a system message": Conversation((SYSTEM, USER, ANSWER)),
    "several turns": Conversation((USER, ANSWER, USER, ANSWER, {"role": "user", "content": "?"}, ANSWER)),
    "all of these": Conversation((SYSTEM, USER, ANSWER, USER, ANSWER)),
    "tools": Conversation((SYSTEM, USER, ANSWER), (TOOL,)),
    "a tool's call": Conversation((USER, CALL, RESULT, ANSWER), (TOOL,)),
}


@dataclass(frozen=True)
class Picked:
    """A row of a file: its line, its number among the file's rows from 0, and what it is."""

    line: int
    number: int
    row: Row


def kinds_of(row: Conversation | Pair | Text) -> frozenset[str]:
    """What of a row may be rendered in its own way."""
    if not isinstance(row, Conversation):
        return frozenset({"plain text"})
    roles = Counter(message["role"] for message in row.messages)
    found = {
        "a system message": roles["system"] + roles["developer"] > 0,
        "several turns": roles["assistant"] > 1,
        "tools": bool(row.tools),
        "a tool's call": any(message.get("tool_calls") for message in row.messages),
    }
    return frozenset(kind for kind, is_there in found.items() if is_there) or frozenset({"one turn"})


def pick_rows(rows: Iterable[tuple[int, Row]]) -> list[Picked]:
    """A few rows of each kind, and a few from all over the first `SCANNED_ROWS`, in order."""
    seen = Counter[str]()
    chosen: dict[int, Picked] = {}
    spread: list[Picked] = []
    dice = random.Random(0)
    for number, (line, row) in enumerate(rows):
        if number == SCANNED_ROWS:
            break
        picked = Picked(line, number, row)
        kinds = {kind for part in parts_of(row) for kind in kinds_of(part)}
        if any(seen[kind] < ROWS_OF_A_KIND for kind in kinds):
            chosen[number] = picked
        seen.update(kinds)
        # A reservoir: each row has the same chance to be in it.
        if len(spread) < SPREAD_ROWS:
            spread.append(picked)
        elif (place := dice.randrange(number + 1)) < SPREAD_ROWS:
            spread[place] = picked
    chosen |= {picked.number: picked for picked in spread}
    return [chosen[number] for number in sorted(chosen)]


def parts_of(row: Row) -> Iterator[Conversation | Pair | Text]:
    """What of a row is rendered on its own: both answers of a preference."""
    if isinstance(row, Preference):
        yield from row.answered()
    else:
        yield row


@dataclass(frozen=True)
class Scored:
    """A trained row, counted from 0, and the places of learned tokens whose log-probabilities are compared."""

    number: int
    ids: tuple[int, ...]
    places: tuple[int, ...]


def pick_scored(tokens: Tokens | PreferenceTokens) -> tuple[Scored, ...]:
    """Rows from all over the data, both sides of pairs; about `SCORED_TOKENS`, and at least one of each side."""
    if isinstance(tokens, PreferenceTokens):
        half = (SCORED_ROWS // 2, SCORED_TOKENS // 2)
        return (*_pick(tokens.chosen, *half), *_pick(tokens.rejected, *half))
    return _pick(tokens, SCORED_ROWS, SCORED_TOKENS)


def _pick(tokens: Tokens, count: int, room: int) -> tuple[Scored, ...]:
    picked: list[Scored] = []
    numbers = np.unique(np.linspace(0, tokens.num_rows - 1, min(tokens.num_rows, count)).astype(np.int64))
    for number in sorted(numbers.tolist(), key=lambda number: (int(tokens.lengths[number]), number)):
        row = slice(tokens.offsets[number], tokens.offsets[number + 1])
        places = np.flatnonzero(tokens.learned[row])
        places = places[places > 0][:SCORED_PLACES]
        # Nothing behind the last place is needed.
        ids = tokens.ids[row][: int(places[-1]) + 1]
        if picked and len(ids) > room:
            break
        room -= len(ids)
        picked.append(Scored(number, tuple(ids.tolist()), tuple(places.tolist())))
    return tuple(sorted(picked, key=lambda scored: scored.number))
