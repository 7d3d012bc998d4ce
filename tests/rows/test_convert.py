import io
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rows.conftest import ANSWER, OTHER, USER, chat
from tuneloom.errors import InvalidFile
from tuneloom.rows import Conversation, Preference, Row, Scan, to_json_lines

ROW = '{"text": "a"}'
PAIR = "prompt,completion\n"


def convert(data: bytes | str, kind: Any, *, step: int = 1 << 20, **options: Any) -> bytes:
    raw = data.encode() if isinstance(data, str) else data
    return b"".join(to_json_lines((raw[at : at + step] for at in range(0, len(raw), step)), kind, **options))


def objects(lines: bytes) -> list[Any]:
    return [json.loads(line) for line in lines.split(b"\n")[:-1]]


def rows_of(lines: bytes) -> list[Row]:
    scan = Scan(method=None)
    rows = [row for _, row in scan.rows(io.BytesIO(lines))]
    assert scan.problems == []
    return rows


def refusal(data: bytes | str, kind: str, **options: Any) -> str:
    """What is said, and said alike when the file comes byte by byte."""
    messages = set()
    for step in (1 << 20, 1):
        with pytest.raises(InvalidFile) as caught:
            convert(data, kind, step=step, **options)
        assert (caught.value.code, caught.value.param, caught.value.status) == ("invalid_file", "file", 400)
        messages.add(caught.value.message)
    (message,) = messages
    return message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("text\na\n", [{"text": "a"}]),
        ("completion, prompt\nb,a\n", [{"prompt": "a", "completion": "b"}]),
        ("instruction,input,output\na,,b\n", [{"instruction": "a", "input": "", "output": "b"}]),
        ("instruction,output\na,b\n", [{"instruction": "a", "output": "b"}]),
        ("input,output\na,b\n", [{"input": "a", "output": "b"}]),
        ("prompt,chosen,rejected\na,b,c\n", [{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        (PAIR + 'a,"x, y\r\n""z"""\n', [{"prompt": "a", "completion": 'x, y\r\n"z"'}]),
        (PAIR + "a,b\r\n\r\nc,d", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]),
        ("\ufeff" + PAIR + "ą,🙂\n", [{"prompt": "ą", "completion": "🙂"}]),
        (PAIR + ",b\n", [{"prompt": "", "completion": "b"}]),
    ],
)
def test_the_columns_of_a_csv_file_are_the_keys_of_its_rows(data: str, expected: list[dict[str, str]]) -> None:
    assert objects(convert(data, "csv")) == expected
    assert convert(data, "csv", step=1) == convert(data, "csv")


def test_cells_may_hold_json() -> None:
    tool = {"type": "function", "function": {"name": "sum"}}
    messages = json.dumps([USER, ANSWER], indent=1).replace('"', '""')
    tools = json.dumps([tool]).replace('"', '""')
    lines = convert(f'messages,tools\n"{messages}","{tools}"\n"{messages}",\n', "csv")
    assert rows_of(lines) == [Conversation((USER, ANSWER), (tool,)), Conversation((USER, ANSWER))]
    cells = [json.dumps(cell).replace('"', '""') for cell in ({"messages": [USER]}, [ANSWER], [OTHER])]
    header = "input,preferred_output,non_preferred_output\n"
    assert rows_of(convert(header + ",".join(f'"{cell}"' for cell in cells), "csv")) == [
        Preference((USER,), ANSWER, OTHER)
    ]


def test_a_cell_may_be_wide_and_a_row_has_the_limit_of_a_line() -> None:
    wide = "x" * 3_000_000
    assert objects(convert(f"text\n{wide}\n", "csv")) == [{"text": wide}]
    assert "Row 2 (line 3): It is longer than 1,000 bytes" in refusal(
        f"text\na\n{'x' * 1001}\nb\n", "csv", max_row_bytes=1000
    )
    # What is shorter than the limit as CSV may be longer as JSON.
    assert "Row 1 (line 2): As JSON it is longer" in refusal(f"text\n{'x' * 995}\n", "csv", max_row_bytes=1000)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("", "The first line is empty"),
        ("text\n", "The file has no rows"),
        ("prompt;completion\na;b\n", "separated by `;`. Separate cells by commas"),
        ("prompt\tcompletion\na\tb\n", "Separate cells by commas"),
        ("question,answer\na,b\n", "columns are those of no format: `question`, `answer`"),
        ("text,id\na,1\n", "Unknown column beside `text`: `id`. Remove it."),
        ("input,output,instruction,x\n", "Unknown column beside `instruction,output,[input]`: `x`"),
        ("text,text\n", "the column `text` twice"),
        pytest.param(",".join(map(str, range(99_999))) + ",7\n", "the column `7` twice", id="many columns"),
        (f"[{ROW}]", "The file is JSON, not CSV"),
        (PAIR + "a,b\nc\n", "Row 2 (line 3): Cells: 1. Columns of the header: 2."),
        (PAIR + '"a\n\nb",c\n\nd,e,f\n', "Row 2 (line 6): Cells: 3. Columns"),
        (PAIR + "a,b\nc,\n", "Row 2 (line 3): `completion` is empty."),
        (PAIR + 'a,b\nc,"d\ne,f\n', "Row 2 (line 3): A quote is opened and never closed."),
        (PAIR + 'a,"b"c\n', "Row 1 (line 2): A quoted cell goes on after its closing quote"),
        ("prompt,completion\ra,b\r", "Header: A carriage return stands outside of quotes"),
        (PAIR.encode() + b"a,b\nc,\xe9\n", "Row 2 (line 3): Not UTF-8: the byte 0xe9. Save the file as `CSV UTF-8`."),
        ((PAIR + "a,b\n").encode("utf-16"), "Header: The file is UTF-16. Save it as UTF-8."),
        ((PAIR + "a,b\n").encode("utf-16-le"), "The file is UTF-16"),
        ((PAIR + "a,b\n").encode("utf-16-be"), "The file is UTF-16"),
        ("messages\n\"[{'role': 'user'}]\"\n", "Row 1 (line 2): `messages` holds Python's notation"),
        ("messages\n[1\n", "Row 1 (line 2): `messages`: Not JSON: Expecting ',' delimiter at column 3."),
        ('messages\n"[1], ""x"": 2"\n', "Row 1 (line 2): `messages`: Not JSON: Extra data"),
        ("messages\n[]\n", "Row 1 (line 2): `messages` is empty."),
        ("messages\n,\n", "Row 1 (line 2): Cells: 2. Columns of the header: 1."),
    ],
)
def test_a_wrong_csv_file_is_refused_by_row_line_and_column(data: bytes | str, reason: str) -> None:
    assert reason in refusal(data, "csv")


@pytest.mark.parametrize(
    "data",
    [
        f"[{ROW}, {ROW}]",
        f"\n [ {ROW}\r\n,\n{ROW} ] \n",
        f"\ufeff[{ROW},{ROW}]",
        json.dumps([{"text": "a"}] * 2, indent=4),
    ],
)
def test_the_elements_of_an_array_are_its_rows(data: str) -> None:
    for step in (1, 1 << 20):
        lines = convert(data, "json", step=step)
        assert objects(lines) == [{"text": "a"}] * 2
        assert lines.count(b"\n") == 2


@pytest.mark.parametrize("data", [f"{ROW}\n{ROW}\n", f"\ufeff{ROW}\r\n\n{ROW}", f"\n{ROW}", f"{ROW}\noops"])
def test_json_lines_under_the_name_of_json_stay_as_they_are(data: str) -> None:
    assert convert(data, "json", step=3) == data.encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("", "The file has no rows"),
        (" \n", "The file has no rows"),
        ("[]", "The file has no rows"),
        ("[", "The file ends before its array does"),
        (f"[{ROW}", "Row 1 (line 1): The file ends before its array does"),
        (f"[{ROW},", "The file ends before its array does"),
        (f"[{ROW},]", "Row 2 (line 1): Not JSON: Expecting value at line 1, column 16."),
        (f"[{ROW}\n {ROW}]", "Row 1 (line 1): Not JSON: `{` instead of `,` or `]` at line 2, column 2."),
        (f"[{ROW}]\n x", "Not JSON: `x` after the end of the array, at line 2, column 2."),
        (f"[\n{ROW},\n3]", "Row 2 (line 3): The element is a number, not a JSON object."),
        (f"[{ROW},\n[1]]", "Row 2 (line 2): The element is an array"),
        ('[\n{"text": "a},\n', "Row 1 (line 2): Not JSON: Invalid control character at line 2, column 14."),
        ('[{"text": "a}', "Row 1 (line 1): Not JSON: Unterminated string starting at line 1, column 11."),
        (f'[{ROW},\n\n{{"text":\n nul}}]', "Row 2 (line 3): Not JSON: Expecting value at line 4, column 2."),
        (f'[{ROW}, {{"text": "a", "text": "b"}}]', "Row 2 (line 1): Not usable JSON: the key `text` appears twice"),
        ('[{"text": NaN}]', "Row 1 (line 1): Not usable JSON: `NaN`"),
        (r'[{"text": "\ud800"}]', "Row 1 (line 1): A string holds half of a character"),
        ("[" * 3000, "nested too deeply"),
        (f"[{'9' * 5000}]", "Row 1 (line 1): Not usable JSON: a number has too many digits."),
        (f'[{ROW},\n{{"text": "'.encode() + b'\xe9"}]', "Row 2 (line 2): Not UTF-8: the byte 0xe9"),
        (f'[{ROW},\n{{"text": "'.encode() + b"\xc5", "Row 2 (line 2): Not UTF-8: the byte 0xc5"),
        (f"[{ROW}]".encode("utf-16"), "The file is UTF-16"),
        ('{"text":\n"a"}', "The file is no JSON array, and its first line no row: Not JSON"),
        ("prompt,completion\n", "Write an array of objects"),
        ('[{"prompt": "a"}]', "Row 1 (line 1): `completion` is missing."),
        (f'[{ROW}, {{"prompt": "a", "completion": "b"}}]', "Row 2 (line 1): This row has the format"),
    ],
)
def test_a_wrong_array_is_refused_by_row_and_line(data: bytes | str, reason: str) -> None:
    assert reason in refusal(data, "json")


def test_the_first_wrong_rows_are_named_and_the_rest_counted() -> None:
    message = refusal(PAIR + "a,\n" * 12, "csv")
    assert [f"Row {number} (line {number + 1}): `completion` is empty." in message for number in range(1, 7)] == [
        *[True] * 5,
        False,
    ]
    assert message.endswith("And 7 more.")
    # What cannot be read on comes last.
    assert "Row 2 (line 3): A quote is opened" in refusal(PAIR + 'a,\nb,"c\n', "csv")


def test_an_element_may_be_long_and_has_the_limit_of_a_line() -> None:
    wide = {"text": "x" * 3_000_000}
    assert objects(convert(json.dumps([wide, wide]), "json")) == [wide, wide]
    element = json.dumps({"text": "x" * 3_000_000})
    assert "Row 1 (line 1): Not JSON, or longer than 2,000,000 bytes" in refusal_once(f"[{element}]", 2_000_000)
    assert "Row 1 (line 1): As JSON it is longer than 100 bytes" in refusal_once(f'[{{"text": "{"x" * 200}"}}]', 100)


def refusal_once(data: str, max_row_bytes: int) -> str:
    with pytest.raises(InvalidFile) as caught:
        convert(data, "json", max_row_bytes=max_row_bytes)
    return caught.value.message


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_large_file_takes_the_memory_of_a_few_rows(kind: Any) -> None:
    text = "x" * 10_000

    def chunks() -> Iterator[bytes]:
        row = (f"{text},{text}\n" if kind == "csv" else json.dumps({"prompt": text, "completion": text}) + ",").encode()
        yield PAIR.encode() if kind == "csv" else b"["
        for _ in range(16):
            yield row * 100
        yield b"a,b" if kind == "csv" else b'{"prompt": "a", "completion": "b"}]'

    tracemalloc.start()
    count = sum(piece.count(b"\n") for piece in to_json_lines(chunks(), kind))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 16 * 100 + 1
    assert peak < 16 << 20


def test_rows_of_one_conversation_keep_its_messages() -> None:
    assert rows_of(convert(json.dumps([chat(USER, ANSWER)], indent=2), "json")) == [Conversation((USER, ANSWER))]
