"""What a training row may be, and a streaming check of a file of them. Pure Python: no tokens, no model, no store.

A file is JSON Lines in UTF-8, one format throughout, told by the first row:

    messages                        OpenAI chat, with `tools` or `functions`; `weight: 0` on an answer: not learned
    prompt, completion              two strings: plain text, the completion learned; or two lists of chat messages
    instruction, input?, output     one user turn (instruction, blank line, input) and one answer
    input, output                   one user turn and one answer
    text                            plain text, learned whole

Each row becomes a `Conversation`, a `Pair` or a `Text`. Problems carry their line; the first `MAX_PROBLEMS` are kept
and the rest counted. Memory is bounded by the longest line allowed.
"""

from tuneloom.rows.formats import Conversation, Pair, Row, Text
from tuneloom.rows.scan import MAX_LINE_BYTES, MAX_PROBLEMS, Problem, Scan

__all__ = ["MAX_LINE_BYTES", "MAX_PROBLEMS", "Conversation", "Pair", "Problem", "Row", "Scan", "Text"]
