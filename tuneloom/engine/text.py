"""Text to token ids and back, for serving and training alike: one chat template, one way to encode it. No torch.

Training and serving must see the same ids for the same conversation. So a rendered conversation is cut right after each
generation prompt and the pieces are encoded one by one: no token ever spans the point where an answer begins, and the
ids before an answer are the same whether the answer is to be generated or is already there.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloom.domain import DEFAULT_CONTEXT_LENGTH
from tuneloom.engine.tool_grammar import Tokens
from tuneloom.engine.tools import CallFormat, ToolUse, find_tool_use
from tuneloom.engine.vocabulary import Vocabulary
from tuneloom.errors import InvalidRequest

_PROBE = "tuneloomprobe"


class Codec:
    """The tokenizer and chat template of one base. Thread-safe; holds no state of a request.

    `stop_ids`: ids that end an answer. `context_length` and `vocab_size` are the model's own. `call_format`: how the
    base writes calls of tools; `marks`: its tokens that are marks.
    """

    def __init__(self, tokenizer: Any, config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
        """`tokenizer` is a transformers fast tokenizer; the mappings are `config.json`, `generation_config.json`."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._vocabulary = Vocabulary(self._backend)
        text_config = config.get("text_config", config)
        self.context_length: int = text_config.get("max_position_embeddings") or DEFAULT_CONTEXT_LENGTH
        self.vocab_size: int = text_config["vocab_size"]
        self._bos_id = self._default_bos()
        self._tool_use: ToolUse | None = None
        self._cut_after = self._find_cut()
        end_of_turn = self._find_end_of_turn()
        self.stop_ids = frozenset(
            [
                *_as_ids(config.get("eos_token_id")),
                *_as_ids(text_config.get("eos_token_id")),
                *_as_ids(generation.get("eos_token_id")),
                *_as_ids(tokenizer.eos_token_id),
                *_as_ids(end_of_turn),
            ]
        )
        self._tool_use = find_tool_use(
            self._apply, str(tokenizer.chat_template), [self.token_text(id)[0] for id in self.stop_ids]
        )
        self.call_format: CallFormat = self._tool_use.format
        marks = self._vocabulary.marks
        self.marks = Tokens(marks, frozenset(marks.values()) - self.stop_ids)

    @classmethod
    def load(cls, folder: Path) -> "Codec":
        """Read the tokenizer and configs in `folder`; nothing is downloaded and no code of the base is run."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise InvalidRequest(f"The base in {folder.name} has no fast tokenizer. Add its `tokenizer.json`.")
        generation = folder / "generation_config.json"
        return cls(
            tokenizer,
            json.loads((folder / "config.json").read_text(encoding="utf-8")),
            json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {},
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The ids of a conversation up to where the assistant's next answer begins.

        Raises:
            InvalidRequest: the template refuses the messages; it says why.
        """
        return self._encode(self._render(_plain(messages), tools, wants_answer=True))

    def encode_text(self, text: str) -> list[int]:
        """The ids of plain text, with the special tokens that the tokenizer adds by default, BOS once."""
        return self._without_second_bos(self._backend.encode(text, add_special_tokens=True).ids)

    def encode_training(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation, and which of them are learned.

        Learned are the text of each assistant message and the token that ends its turn, unless the message has
        `weight` 0. The ids before a learned answer equal `encode_chat` of the messages before it. A template may
        rewrite earlier turns when later ones follow (drop their reasoning, say); answers for which the ids would
        differ are not learned.

        Raises:
            InvalidRequest: no answer can be learned for that reason, or the template refuses the messages.
        """
        (encoded,) = self.encode_training_batch([(messages, tools)])
        if isinstance(encoded, InvalidRequest):
            raise encoded
        return encoded

    def encode_training_batch(
        self, conversations: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]]
    ) -> list[tuple[list[int], list[bool]] | InvalidRequest]:
        """`encode_training` of each `(messages, tools)`, or what it raises; the pieces of all are encoded at once."""
        drafts = [self._draft(messages, tools) for messages, tools in conversations]
        texts = [text for draft in drafts if isinstance(draft, _Draft) for text in draft.texts]
        known = self._encode_pieces({piece for text in texts for piece in _cut(text, self._cut_after)})
        return [self._label(draft, known) if isinstance(draft, _Draft) else draft for draft in drafts]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_text` of each, all at once."""
        return [self._without_second_bos(found.ids) for found in self._backend.encode_batch_fast(list(texts))]

    def _draft(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> "_Draft | InvalidRequest":
        wanted = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and m.get("weight", 1) != 0]
        try:
            plain = _plain(messages)
            text = self._render(plain, tools, wants_answer=False)
            answers = []
            for i in wanted:
                before = self._render(plain[:i], tools, wants_answer=True) if i else None
                if before is not None and text.startswith(before):
                    is_last = i + 1 == len(plain)
                    after = text if is_last else self._render(plain[: i + 1], tools, wants_answer=False)
                    answers.append((before, after))
        except InvalidRequest as error:
            return error
        return _Draft(text, bool(wanted), answers)

    def _label(self, draft: "_Draft", known: Mapping[str, list[int]]) -> tuple[list[int], list[bool]] | InvalidRequest:
        text, ids = draft.text, self._encode(draft.text, known)
        mask = [False] * len(ids)
        for before, after in draft.answers:
            start = self._stable_length(text, ids, before, known)
            if start is not None:
                end = self._answer_end(ids, start, self._stable_length(text, ids, after, known))
                mask[start:end] = [True] * (end - start)
        if draft.wants_answers and not any(mask):
            return InvalidRequest(
                "The base's chat template renders these messages so that no answer follows from what comes before it. "
                "Start the conversation with a user message, and check the order of roles.",
                param="messages",
            )
        return ids, mask

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._vocabulary.decode(ids)

    def token_text(self, id: int) -> tuple[str, bytes]:
        """A token as text and as raw bytes; a special token is its name."""
        data = self._vocabulary.token_bytes(id)
        return data.decode("utf-8", "replace"), data

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    def _encode(self, text: str, known: Mapping[str, list[int]] | None = None) -> list[int]:
        """Ids of rendered text, its pieces from `known` if given.

        The template is the authority on special tokens, but for a BOS that it forgot.
        """
        ids: list[int] = []
        for piece in _cut(text, self._cut_after):
            ids += known[piece] if known else self._backend.encode(piece, add_special_tokens=False).ids
        if self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids.insert(0, self._bos_id)
        return ids

    def _encode_pieces(self, pieces: Collection[str]) -> dict[str, list[int]]:
        encoded = self._backend.encode_batch_fast(list(pieces), add_special_tokens=False)
        return {piece: found.ids for piece, found in zip(pieces, encoded, strict=True)}

    def _without_second_bos(self, ids: list[int]) -> list[int]:
        return ids[1:] if self._bos_id is not None and ids[:2] == [self._bos_id] * 2 else ids

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]], *, wants_answer: bool
    ) -> str:
        if not messages:
            raise InvalidRequest("`messages` is empty. Send at least one message.", param="messages")
        if self._tool_use is not None:
            messages, tools = self._tool_use.prepare(messages, tools)
        return self._apply(messages, tools, wants_answer)

    def _apply(self, messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]], wants_answer: bool) -> str:
        """What the chat template itself makes of messages and tools."""
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise InvalidRequest(
                "This base has no chat template. Use /v1/completions, or an instruction-tuned base.", param="messages"
            )
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=wants_answer,
                tokenize=False,
            )
        except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            # Templates refuse by `raise_exception` and stumble over what they do not expect.
            raise InvalidRequest(
                f"The base's chat template refuses these messages: {error}", param="messages"
            ) from error

    def _stable_length(self, text: str, ids: list[int], prefix: str, known: Mapping[str, list[int]]) -> int | None:
        """How many of `ids` encode `prefix`, or None if it is no prefix of `text`, as text or as ids."""
        if not text.startswith(prefix):
            return None
        prefix_ids = self._encode(prefix, known)
        return len(prefix_ids) if ids[: len(prefix_ids)] == prefix_ids else None

    def _answer_end(self, ids: list[int], start: int, after: int | None) -> int:
        """The end of the answer at `start`: behind its end-of-turn token; what follows that in the turn is layout."""
        limit = len(ids) if after is None else after
        return next((at + 1 for at in range(start, limit) if ids[at] in self.stop_ids), limit)

    def _default_bos(self) -> int | None:
        """The BOS id if the tokenizer puts it before plain text."""
        bos = self._tokenizer.bos_token_id
        return bos if bos is not None and bos in self._backend.encode("", add_special_tokens=True).ids else None

    def _find_cut(self) -> str:
        """The generation prompt, after which rendered text is cut; empty where cutting would change the meaning."""
        alone = self._backend.encode("a", add_special_tokens=False).ids
        # Vocabularies that put a space before each piece of text would add one at each cut.
        if self._vocabulary.strips_leading_space and self._vocabulary.token_bytes(alone[0]).startswith(b" "):
            return ""
        without = self._probe(wants_answer=False)
        wanted = self._probe(wants_answer=True)
        return wanted.removeprefix(without) if wanted.startswith(without) else ""

    def _find_end_of_turn(self) -> int | None:
        """The special token that the template writes right after an answer."""
        tail = self._probe({"role": "assistant", "content": _PROBE}, wants_answer=False).rpartition(_PROBE)[2]
        ids = self._backend.encode(tail, add_special_tokens=False).ids if tail else []
        return ids[0] if ids and ids[0] in self._vocabulary.special_ids else None

    def _probe(self, *more: dict[str, Any], wants_answer: bool) -> str:
        if not self._tokenizer.chat_template:
            return ""
        try:
            return self._render([{"role": "user", "content": "a"}, *more], (), wants_answer=wants_answer)
        except InvalidRequest:
            return ""


@dataclass(frozen=True)
class _Draft:
    """A rendered conversation; of each answer that may be learned, the text before it and up to its end."""

    text: str
    wants_answers: bool
    answers: list[tuple[str, str]]

    @property
    def texts(self) -> list[str]:
        return [self.text, *(text for answer in self.answers for text in answer)]


def _cut(text: str, after: str) -> list[str]:
    """`text` in pieces, cut behind each occurrence of `after`."""
    if not after:
        return [text]
    *pieces, last = text.split(after)
    return [piece + after for piece in pieces] + ([last] if last else [])


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: text content, `system` for `developer`, tool arguments as objects."""
    return [_plain_message(message) for message in messages]


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in message.items() if key != "weight" and value is not None}
    content = message.get("content")
    plain["content"] = content if isinstance(content, str) else "".join(map(_part_text, content or ()))
    if plain.get("role") == "developer":
        plain["role"] = "system"
    if calls := plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _part_text(part: Mapping[str, Any]) -> str:
    if part.get("type", "text") != "text":
        raise InvalidRequest(f"Content of type `{part['type']}` is not supported. Send text.", param="messages")
    return part["text"]


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    given = call.get("function", {})
    # Templates write a call in the order of its keys, and a grammar makes it in this one.
    function = {key: given[key] for key in ("name", "arguments") if key in given}
    if isinstance(function.get("arguments"), str):
        try:
            # Clients send nothing for a call without arguments.
            function["arguments"] = json.loads(function["arguments"].strip() or "{}")
        except ValueError as error:
            raise InvalidRequest("The `arguments` of a tool call are not JSON.", param="messages") from error
    return {**call, "function": function}


def _as_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
