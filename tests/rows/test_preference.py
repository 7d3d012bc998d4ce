from typing import Any

import pytest

from tests.rows.conftest import ANSWER, OTHER, SKIPPED, USER, chat, only_problem, scan
from tuneloom.rows import Conversation, Pair, Preference, Row

TOOL = {"type": "function", "function": {"name": "sum"}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": "{}"}}],
}


def preference(*prompt: dict[str, Any], preferred: Any = ANSWER, other: Any = OTHER, noun: str = "output", **more: Any):
    given = {"messages": list(prompt or [USER]), **more}
    return {"input": given, f"preferred_{noun}": [preferred], f"non_preferred_{noun}": [other]}


GOOD = preference()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD, Preference((USER,), ANSWER, OTHER)),
        (preference(noun="completion"), Preference((USER,), ANSWER, OTHER)),
        (preference(USER, ANSWER, USER), Preference((USER, ANSWER, USER), ANSWER, OTHER)),
        (
            preference(USER, preferred=CALL, tools=[TOOL], parallel_tool_calls=True),
            Preference((USER,), CALL, OTHER, (TOOL,)),
        ),
        (preference(preferred={**ANSWER, "weight": 1}), Preference((USER,), ANSWER, OTHER)),
        ({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}, Preference("1 + 1 =", " 2", " 3")),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, Preference((USER,), ANSWER, OTHER)),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER], "tools": [TOOL]},
            Preference((USER,), ANSWER, OTHER, (TOOL,)),
        ),
    ],
)
def test_a_preference_has_a_prompt_and_two_answers(row: dict[str, Any], expected: Row) -> None:
    rows, result = scan(row, method="dpo")
    assert result.problems == []
    assert rows == [expected]


def test_both_spellings_may_stand_in_one_file() -> None:
    rows, result = scan(GOOD, preference(noun="completion"), method="dpo")
    assert (len(rows), result.problems) == (2, [])


def test_a_preference_is_two_rows_of_which_only_the_answers_are_learned() -> None:
    chosen, rejected = Preference((USER, ANSWER, USER), ANSWER, OTHER, (TOOL,)).answered()
    assert chosen == Conversation((USER, SKIPPED, USER, ANSWER), (TOOL,))
    assert rejected == Conversation((USER, SKIPPED, USER, OTHER), (TOOL,))
    assert Preference("a", "b", "c").answered() == (Pair("a", "b"), Pair("a", "c"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (preference(other=ANSWER), "are the same answer"),
        (preference(other={**ANSWER, "content": [{"type": "text", "text": "hello"}]}), "are the same answer"),
        (preference(USER, ANSWER), "last message of `input.messages` has the role `assistant`"),
        (preference(preferred=USER), "`preferred_output` holds `user`"),
        (preference(other=SKIPPED), "`non_preferred_output[0]` has `weight` 0"),
        (preference(preferred={"role": "assistant"}), "`preferred_output[0]`: `content` is missing"),
        (preference({"role": "user"}), "`input.messages[0]`: `content` is missing"),
        (preference(extra=1), "Unknown key in `input`: `extra`"),
        (preference(parallel_tool_calls=1), "`input`: `parallel_tool_calls` is a number"),
        ({**GOOD, "input": []}, "`input` is an array, not an object"),
        ({**GOOD, "input": {}}, "`input.messages` is missing"),
        ({**GOOD, "preferred_output": [ANSWER, ANSWER]}, "`preferred_output` holds `assistant`, `assistant`"),
        ({**GOOD, "preferred_output": "hello"}, "`preferred_output` is a string"),
        ({"input": GOOD["input"], "preferred_output": [ANSWER]}, "`non_preferred_output` is missing"),
        ({"input": GOOD["input"], "non_preferred_completion": [ANSWER]}, "`preferred_completion` is missing"),
        ({"preferred_output": [ANSWER], "non_preferred_output": [OTHER]}, "`input` is missing"),
        ({**GOOD, "score": 1}, "`score`"),
    ],
)
def test_a_wrong_preference_is_named_with_its_reason(row: dict[str, Any], reason: str) -> None:
    assert reason in only_problem(row, after=GOOD, method="dpo")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "`chosen` and `rejected` are the same answer"),
        ({"prompt": "a", "chosen": "b"}, "`rejected` is missing"),
        ({"chosen": "a", "rejected": "b"}, "`prompt` is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "`rejected` is empty"),
        ({"prompt": "a", "chosen": [ANSWER], "rejected": [OTHER]}, "`chosen` is an array"),
        ({"prompt": [USER], "chosen": "b", "rejected": "c"}, "`chosen` is a string"),
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [OTHER]}, "`chosen` holds `user`, `assistant`"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": []}, "`tools`"),
    ],
)
def test_trls_spelling_names_what_is_wrong(row: dict[str, Any], reason: str) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert reason in only_problem(row, after=good, method="dpo")


def test_each_method_refuses_the_rows_of_the_other_and_says_what_to_do() -> None:
    supervised = scan(GOOD, {"prompt": "a", "chosen": "b", "rejected": "c"})[1]
    assert [problem.line for problem in supervised.problems] == [1, 2]
    for problem in supervised.problems:
        assert "`supervised` cannot learn" in problem.message
        assert "the method `dpo`" in problem.message
    dpo = scan(chat(USER, ANSWER), {"text": "a"}, method="dpo")[1]
    assert [problem.line for problem in dpo.problems] == [1, 2]
    for problem, name in zip(dpo.problems, ("`messages`", "`text`"), strict=True):
        assert f"the format {name}" in problem.message
        assert "`preferred_output`" in problem.message
        assert "the method `supervised`" in problem.message


def test_without_a_method_every_format_is_taken() -> None:
    assert scan(GOOD, method=None)[1].problems == []
    assert scan(chat(USER, ANSWER), method=None)[1].problems == []
