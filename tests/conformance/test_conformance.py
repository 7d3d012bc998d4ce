"""The page and the two drivers keep to one list of calls. The drivers themselves run against a server."""

import re
from pathlib import Path

from tests.conformance.driver import CASES, MODULES
from tests.conformance.table import Column, is_green, page

NODE = Path(__file__).parent / "node"
CALLS = {"Files": {"files_list": ["files.list", "newest first"]}, "Async": {"async_chat": ["Async", "chat", "python"]}}


def names(language: str) -> list[str]:
    return [name for calls in CASES.values() for name, (_, _, *only) in calls.items() if only in ([], [language])]


def test_each_call_of_the_list_is_in_the_python_driver_and_no_other():
    written = [
        name
        for module in dict.fromkeys(MODULES.values())
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    ]
    assert sorted(name for name in written if name[0].islower()) == sorted(names("python"))


def test_each_call_of_the_list_is_in_the_node_driver_and_no_other():
    text = "".join(path.read_text() for path in NODE.glob("calls_*.mjs"))
    assert sorted(re.findall(r"export (?:async function|const) ([a-z]\w+)", text)) == sorted(names("node"))


def test_the_page_shows_what_failed_and_why():
    python = Column("openai-python 9.9", "python", passed={"files_list"}, failures={"async_chat": "text: got 'a'\n"})
    node = Column("openai-node 9.9", "node", problem="the driver ended with 7")
    text = page(CALLS, [python, node], server="tuneloom 0", date="1 May 2030")

    assert "| `files.list` | newest first | ok | FAIL |" in text
    assert "| `Async` | chat | FAIL | - |" in text
    assert "- openai-python 9.9, `Async` (async_chat): text: got 'a'" in text
    assert "- openai-node 9.9, `files.list` (files_list): the driver ended with 7" in text
    assert not is_green(CALLS, [python, node])


def test_a_call_that_a_client_does_not_have_counts_neither_way():
    column = Column("openai-python 1.9", "python", passed={"async_chat"}, lacking={"files_list"})
    assert is_green(CALLS, [column])
    text = page(CALLS, [column], server="tuneloom 0", date="1 May 2030")
    assert "| `files.list` | newest first | - |" in text and "1 of 1" in text


def test_a_page_without_failures_is_green():
    column = Column("openai-python 9.9", "python", passed={"files_list", "async_chat"})
    assert is_green(CALLS, [column])
    assert "Failures" not in page(CALLS, [column], server="tuneloom 0", date="1 May 2030")
