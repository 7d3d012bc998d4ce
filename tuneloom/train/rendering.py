"""A trained row held against what serving makes of the same conversation, token by token. No files, no engine.

What counts is that generation begins where learning began: the ids before each learned answer are those that a request
with the messages before it has, and the answer ends with a token that ends generation, learned too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tuneloom.errors import InvalidRequest
from tuneloom.rows import Conversation, Pair, Text
from tuneloom.train.render import Example


class Serving(Protocol):
    """What serving does with text: `engine.text.Codec`."""

    stop_ids: frozenset[int]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]: ...

    def encode_text(self, text: str) -> list[int]: ...

    def encode_training(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], list[bool]]: ...


class Difference(Exception):
    """The first place where training and serving part. `trained` and `served` are token ids, None beyond an end."""

    def __init__(self, at: int, trained: int | None, served: int | None, what: str) -> None:
        super().__init__(what)
        self.at, self.trained, self.served, self.what = at, trained, served, what


@dataclass
class Tally:
    """What was compared. `rewritten`: answers that the template renders otherwise once more follows them, which are
    not learned for that reason.
    """

    rows: int = 0
    made_up: int = 0
    answers: int = 0
    rewritten: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def sentence(self) -> str:
        kinds = ", ".join(f"{count} with {kind}" for kind, count in sorted(self.kinds.items()))
        text = (
            f"Rendering equals serving: {self.rows} rows ({kinds}) and {self.made_up} made-up conversations, "
            f"{self.answers} answers with the tokens before them and the token that ends them"
        )
        rewritten = f"; {self.rewritten} answers are not learned, since the template rewrites them"
        return text + (rewritten if self.rewritten else "")


def compare(
    row: Conversation | Pair | Text,
    trained: Example,
    serving: Serving,
    tally: Tally,
    *,
    limit: int,
    learn_all: bool = False,
) -> None:
    """Count what of a row is the same for both. A row of `limit` tokens may have been cut at its end.

    `learn_all`: training learns what comes before answers too.

    Raises:
        Difference: something is not the same.
    """
    try:
        whole, prompts = _served(row, trained.ids, serving)
    except InvalidRequest as error:
        raise Difference(0, trained.ids[0], None, f"serving refuses it: {error.message}") from error
    _check_same(trained.ids, whole, limit)
    starts = {len(prompt) for prompt in prompts if _is_prefix(prompt, whole) and len(prompt) < len(trained.ids)}
    for start in sorted(starts):
        _check_answer(trained, start, serving.stop_ids, limit)
    if not learn_all and (strange := set(_stretches(trained.learned)) - starts):
        at = min(strange)
        raise Difference(at, trained.ids[at], whole[at], "training learns from here on, and no answer begins here")
    tally.answers += len(starts)
    tally.rewritten += sum(not _is_prefix(prompt, whole) for prompt in prompts)


def _served(
    row: Conversation | Pair | Text, trained: Sequence[int], serving: Serving
) -> tuple[list[int], list[list[int]]]:
    """The ids of a whole row, and those before each answer that is to be learned, as serving makes them."""
    if isinstance(row, Conversation):
        whole, _ = serving.encode_training(row.messages, row.tools)
        answers = [at for at, m in enumerate(row.messages) if m["role"] == "assistant" and m.get("weight") != 0]
        return whole, [serving.encode_chat(row.messages[:at], row.tools) for at in answers if at]
    if isinstance(row, Pair):
        prompt = serving.encode_text(row.prompt)
        # A completion is generated behind its prompt, and may be cut into tokens in any way.
        return [*prompt, *trained[len(prompt) :]], [prompt]
    # Any token that ends generation may end a text.
    return [*serving.encode_text(row.text), trained[-1]], [serving.encode_text("")]


def _check_answer(trained: Example, start: int, stop_ids: frozenset[int], limit: int) -> None:
    """From `start` on all is learned, up to a token that ends generation."""
    for at in range(start, len(trained.ids)):
        is_end = trained.ids[at] in stop_ids
        if not trained.learned[at]:
            what = "the token that ends the answer is not learned" if is_end else "a token of the answer is not learned"
            raise Difference(at, trained.ids[at], trained.ids[at], what)
        if is_end:
            return
    if len(trained.ids) < limit:
        raise Difference(len(trained.ids), None, min(stop_ids, default=None), "no token ends the answer")


def _check_same(trained: Sequence[int], whole: Sequence[int], limit: int) -> None:
    """Raises Difference unless both are the same, or `trained` is cut at the limit."""
    at = _shared(trained, whole)
    if at < len(trained) or at < min(len(whole), limit):
        ids = [side[at] if at < len(side) else None for side in (trained, whole)]
        raise Difference(at, *ids, "the tokens differ")


def _stretches(learned: Sequence[bool]) -> list[int]:
    """Where learning begins."""
    return [at for at, (before, now) in enumerate(zip([False, *learned], learned, strict=False)) if now and not before]


def _is_prefix(short: Sequence[int], long: Sequence[int]) -> bool:
    return len(short) <= len(long) and list(long[: len(short)]) == list(short)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
