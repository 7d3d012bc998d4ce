"""The bytes that each token stands for, whatever the tokenizer's scheme. No templates, no encoding.

Decoding is defined here as: join the tokens' bytes, read them as UTF-8. That makes it incremental by construction, and
equal to the tokenizer's own `decode` for all valid text.
"""

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any

from tuneloom.errors import InvalidRequest

# A token that stands for no text but for its own name.
MARK = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")

_SPACE = "\u2581"


class Vocabulary:
    """Token id -> bytes, for byte-level BPE and for sentencepiece-style vocabularies with byte fallback."""

    def __init__(self, backend: Any) -> None:
        """`backend` is a `tokenizers.Tokenizer`. `marks`: ids of tokens such as `<|im_end|>` and `[INST]`.

        Raises:
            InvalidRequest: it writes tokens in a scheme that is not known.
        """
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.marks = {token.content: id for id, token in added.items() if MARK.fullmatch(token.content)}
        steps = _decoder_steps(backend)
        kinds = [step["type"] for step in steps]
        self._is_byte_level = "ByteLevel" in kinds
        if not self._is_byte_level and "ByteFallback" not in kinds and "Metaspace" not in kinds:
            raise InvalidRequest(
                f"The tokenizer decodes by {kinds or 'nothing'}, which is not supported. "
                "Use a base whose tokenizer is byte-level BPE or sentencepiece-like."
            )
        self.strips_leading_space = not self._is_byte_level and any(_strips(step) for step in steps)

    def token_bytes(self, id: int) -> bytes:
        """The raw bytes of a token; of a special token its name; nothing for an id without a token."""
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = self._spell(id)
        return known

    def decode(self, ids: Iterable[int]) -> str:
        decoder = self.decoder()
        return decoder.push(ids, final=True)

    def decoder(self, shown: frozenset[int] = frozenset()) -> "IncrementalDecoder":
        """`shown`: special tokens that are not skipped."""
        return IncrementalDecoder(self, self.special_ids - shown)

    def _spell(self, id: int) -> bytes:
        token = self._backend.id_to_token(id)
        if token is None:
            return b""
        if id in self.special_ids:
            return token.encode()
        if self._is_byte_level:
            # A token with a character outside the alphabet (an added one, with a space in it) stands for itself.
            known = all(char in _BYTE_OF_CHAR for char in token)
            return bytes(_BYTE_OF_CHAR[char] for char in token) if known else token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace(_SPACE, " ").encode()


class IncrementalDecoder:
    """Tokens to text as they come; special tokens are skipped; an unfinished character waits for its end."""

    def __init__(self, vocabulary: Vocabulary, skipped: frozenset[int]) -> None:
        self._vocabulary, self._skipped = vocabulary, skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_next = vocabulary.strips_leading_space

    def push(self, ids: Iterable[int], *, final: bool = False) -> str:
        vocabulary = self._vocabulary
        data = b"".join(vocabulary.token_bytes(id) for id in ids if id not in self._skipped)
        text = self._utf8.decode(data, final)
        if self._strip_next and text:
            self._strip_next = False
            text = text.removeprefix(" ")
        return text


def _decoder_steps(backend: Any) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _strips(step: dict[str, Any]) -> bool:
    if step["type"] == "Strip":
        return step["content"] == " " and step["start"] > 0
    return step["type"] == "Metaspace" and step["prepend_scheme"] != "never"


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE spells bytes (GPT-2): printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
