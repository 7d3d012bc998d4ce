"""Which tokens a grammar allows next, for each answer that follows one. Compiling and masks run off the step thread.

    matcher = grammars.open(grammar, stop_ids) ... is_ready -> forbidden_V() -> advance(token) -> forbidden_V() ...

The library gives up the interpreter lock while it works, so that masks are ready when the forward pass is.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tuneloom.errors import InvalidRequest, TuneloomError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_COMPILED = 64
# Of the library's default 250,000: a state takes 1 to 2 kB, and each answer has its own.
_MAX_LEXER_STATES = 50_000
_MASK_THREADS = max(1, min(8, len(os.sched_getaffinity(0)) // 2))


class Grammars:
    """The compiled grammars of one base, the last used ones kept. Used by one thread."""

    def __init__(self, base_path: Path, vocab_size: int, wake: Callable[[], None] = lambda: None) -> None:
        """`vocab_size` is the model's; `wake` is called from another thread when a grammar is compiled."""
        self._base_path, self._vocab_size, self._wake = base_path, vocab_size, wake
        self._compiler = ThreadPoolExecutor(1, "grammar-compile")
        self._masks = ThreadPoolExecutor(_MASK_THREADS, "grammar-mask")
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None

    def open(self, grammar: str, stop_ids: frozenset[int]) -> "Matcher":
        """Follow `grammar` from its start; `stop_ids` are allowed where it may end."""
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiled[grammar] = self._compiler.submit(self._compile, grammar)
            compiled.add_done_callback(lambda _: self._wake())
            if len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return Matcher(compiled, stop_ids, self._vocab_size, self._masks)

    def close(self) -> None:
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._masks.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: str) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self._base_path, self._vocab_size)
        limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise InvalidRequest(
                f"The form of the answer cannot be enforced: {matcher.get_error()[:300]}. Change that part of it.",
                param="response_format",
            )
        return matcher


class Matcher:
    """Where one answer stands in its grammar. `is_complete`: nothing may follow but a stop id."""

    def __init__(
        self, compiled: "Future[LLMatcher]", stop_ids: frozenset[int], vocab_size: int, pool: ThreadPoolExecutor
    ) -> None:
        self._compiled, self._pool = compiled, pool
        self._stop_ids, self._vocab_size = stop_ids, vocab_size
        self._matcher: LLMatcher | None = None
        self._mask: Future[NDArray[np.bool_]] | None = None
        self.is_complete = False

    @property
    def is_ready(self) -> bool:
        """Whether the grammar is compiled; the first time that it is, its first mask is begun.

        Raises:
            InvalidRequest: it cannot be compiled.
        """
        if self._matcher is None and self._compiled.done():
            self._matcher = self._compiled.result().deep_copy()
            self._mask = self._pool.submit(self._compute, self._matcher)
        return self._matcher is not None

    def forbidden_V(self) -> NDArray[np.bool_]:
        """The tokens that may not come next. Waits for the mask.

        Raises:
            TuneloomError: the grammar has met a limit, or allows nothing.
        """
        assert self._mask is not None
        return self._mask.result()

    def advance(self, token_id: int) -> None:
        """Take note of the next token of the answer; the mask behind it is begun."""
        if token_id in self._stop_ids:
            return
        assert self._matcher is not None
        # A failure shows in the next mask.
        self._matcher.consume_token(token_id)
        # Asked for here only: a matcher must not be touched while its mask is made.
        self.is_complete = self._matcher.is_stopped() and not self._matcher.is_error()
        if not self.is_complete:
            self._mask = self._pool.submit(self._compute, self._matcher)

    def _compute(self, matcher: "LLMatcher") -> NDArray[np.bool_]:
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise TuneloomError(
                f"The form of the answer could not be followed: {matcher.get_error()[:300]}. Ask for a simpler one.",
                code="grammar_error",
            )
        forbidden_V = np.ones(self._vocab_size, np.bool_)
        known = np.unpackbits(bits, bitorder="little", count=min(self._vocab_size, 8 * len(bits)))
        forbidden_V[: len(known)] = known == 0
        if matcher.is_accepting():
            forbidden_V[[id for id in self._stop_ids if id < self._vocab_size]] = False
        if forbidden_V.all():
            raise TuneloomError(
                "The form of the answer allows no token of this base. Ask for another form.", code="grammar_error"
            )
        return forbidden_V


def _load_tokenizer(base_path: Path, vocab_size: int) -> "LLTokenizer":
    """The tokenizer of a base; ids without a token are never allowed."""
    from llguidance import LLTokenizer
    from transformers import AutoTokenizer

    # Not `tokenizer.json` itself: other files of the base may add tokens.
    backend = AutoTokenizer.from_pretrained(base_path, local_files_only=True, trust_remote_code=False).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    num_ids = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    try:
        return LLTokenizer(backend.to_str(), n_vocab=max(vocab_size, num_ids))
    except ValueError as error:
        raise InvalidRequest(
            f"The form of an answer cannot be enforced on this base: its tokenizer is not supported ({error}).",
            param="response_format",
        ) from error
