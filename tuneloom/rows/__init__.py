"""What a training row may be, and a streaming check of a file of them. Pure Python: no tokens, no model, no store.

A file is JSON Lines in UTF-8, one format throughout, told by the first row:

    messages                        OpenAI chat, with `tools` or `functions`; `weight: 0` on an answer: not learned
    prompt, completion              two strings: plain text, the completion learned; or two lists of chat messages
    instruction, input?, output     one user turn (instruction, blank line, input) and one answer
    input, output                   one user turn and one answer
    text                            plain text, learned whole
    conversations                   ShareGPT: `from` and `value`

and for DPO

    input, preferred_output, non_preferred_output     OpenAI's; also `preferred_completion`, `non_preferred_completion`
    prompt, chosen, rejected                          TRL's: three strings, or three lists of chat messages

Other files become JSON Lines by `to_json_lines`: CSV with such columns, and JSON arrays.

Each row becomes a `Conversation`, a `Pair`, a `Text` or a `Preference`. Problems carry their line; the first
`MAX_PROBLEMS` are kept and the rest counted. Memory is bounded by the longest line allowed.
"""

from tuneloom.rows.convert import InvalidRows, to_json_lines
from tuneloom.rows.edit import Appended, Edit, NewRow
from tuneloom.rows.export import ExportFormat, export, plan_export
from tuneloom.rows.formats import Conversation, Method, Pair, Preference, Row, Text
from tuneloom.rows.raw import RawRow, RowPage, SeenRow, raw_rows, read_page
from tuneloom.rows.scan import MAX_LINE_BYTES, MAX_PROBLEMS, Problem, Scan

__all__ = [
    "MAX_LINE_BYTES",
    "MAX_PROBLEMS",
    "Appended",
    "Conversation",
    "Edit",
    "ExportFormat",
    "InvalidRows",
    "Method",
    "NewRow",
    "Pair",
    "Preference",
    "Problem",
    "RawRow",
    "Row",
    "RowPage",
    "Scan",
    "SeenRow",
    "Text",
    "export",
    "plan_export",
    "raw_rows",
    "read_page",
    "to_json_lines",
]
