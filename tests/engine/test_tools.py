"""Calls of tools in the manner of each family, by a model that knows nothing: it takes any token that it may."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.templates import FAMILIES, write_family
from tuneloom.engine.matcher import Grammars
from tuneloom.engine.text import Codec
from tuneloom.engine.text_stream import TextStream
from tuneloom.engine.tool_grammar import tool_grammar
from tuneloom.engine.tool_parser import CallParser
from tuneloom.engine.tools import BARE, TAGGED
from tuneloom.generation import ToolCallDelta, ToolChoice

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "São Paulo", "東京"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "units": {"type": ["string", "null"], "enum": ["C", "F", None]},
            },
            "required": ["city", "days", "units"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, TIME]
CALL = {"name": "get_weather", "arguments": '{"city": "São Paulo", "days": 3, "units": null}'}
MAX_TOKENS = 600


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A base of one family: its codec, and its grammars."""
    folder = write_family(tmp_path_factory.mktemp("family") / request.param, tiny_base, request.param)
    codec = Codec.load(folder)
    grammars = Grammars(folder, codec.vocab_size)
    yield codec, grammars
    grammars.close()


def walk(codec: Codec, grammars: Grammars, grammar: str, seed: int, towards: str = "") -> tuple[list[int], bool]:
    """Ids that the grammar allows, first those of `towards` as far as it does, then at random; is it a whole answer?"""
    rng = random.Random(seed)
    matcher = grammars.open(grammar, codec.stop_ids)
    while not matcher.is_ready:
        time.sleep(0.001)
    ids: list[int] = []
    wanted = towards.encode()
    while len(ids) < MAX_TOKENS:
        forbidden = matcher.forbidden_V()
        if matcher.is_complete:
            return ids, True
        allowed = [id for id in range(len(forbidden)) if not forbidden[id]]
        ends = [id for id in allowed if id in codec.stop_ids]
        fitting = [id for id in allowed if wanted.startswith(codec.token_text(id)[1] or b"-")]
        if fitting:
            id = max(fitting, key=lambda id: len(codec.token_text(id)[1]))
            wanted = wanted[len(codec.token_text(id)[1]) :]
        else:
            id, wanted = ends[0] if ends and rng.random() < 0.3 else rng.choice(allowed), b""
        if id in codec.stop_ids:
            return ids, True
        ids.append(id)
        matcher.advance(id)
    return ids, False


def written(codec: Codec, ids: list[int]) -> str:
    return b"".join(codec.token_text(id)[1] for id in ids).decode(errors="replace")


def shown(codec: Codec) -> frozenset[int]:
    return frozenset(codec.marks.ids.values())


def read(codec: Codec, ids: list[int], *, is_forced: bool = False, size: int = 1) -> tuple[str, list[dict[str, str]]]:
    """Text and calls of an answer that comes in pieces of `size` tokens."""
    stream, parser = TextStream(codec, shown=shown(codec)), CallParser(codec.call_format, TOOLS, is_forced=is_forced)
    text, deltas = "", list[ToolCallDelta]()
    for at in range(0, len(ids) + 1, size):
        is_final = at + size > len(ids)
        piece, calls = parser.push(stream.push(ids[at : at + size], final=is_final)[0], final=is_final)
        text += piece
        deltas += calls
    return text, joined(deltas)


def joined(deltas: list[ToolCallDelta]) -> list[dict[str, str]]:
    """Whole calls; each begins with its id and name, and no arguments."""
    calls: list[dict[str, str]] = []
    for delta in deltas:
        if delta.id is not None:
            assert delta.id.startswith("call_") and delta.name and not delta.arguments and delta.index == len(calls)
            calls.append({"name": delta.name, "arguments": ""})
        else:
            assert delta.index == len(calls) - 1 and delta.name is None
            calls[-1]["arguments"] += delta.arguments
    return calls


def check(call: dict[str, str]) -> None:
    arguments = json.loads(call["arguments"])
    if call["name"] == "get":
        assert arguments == {}
        return
    assert call["name"] == "get_weather" and list(arguments) == ["city", "days", "units"]
    assert arguments["city"] in ("Paris", "São Paulo", "東京")
    assert 1 <= arguments["days"] <= 14 and arguments["units"] in ("C", "F", None)


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_is_always_a_call_that_fits_its_schema(family: Any, seed: int):
    codec, grammars = family
    grammar = tool_grammar(codec.call_format, TOOLS, ToolChoice("required"), codec.marks)
    ids, is_whole = walk(codec, grammars, grammar, seed)
    assert is_whole
    for size in (1, 7):
        text, calls = read(codec, ids, is_forced=True, size=size)
        assert text == "" and calls
        for call in calls:
            check(call)


def test_a_named_call_is_one_call_of_that_function(family: Any):
    codec, grammars = family
    for seed, name in enumerate(("get", "get_weather")):
        grammar = tool_grammar(codec.call_format, TOOLS, ToolChoice("required", name), codec.marks)
        _, calls = read(codec, walk(codec, grammars, grammar, seed)[0], is_forced=True)
        assert [call["name"] for call in calls] == [name]
        check(calls[0])


def test_without_parallel_calls_there_is_one(family: Any):
    codec, grammars = family
    grammar = tool_grammar(codec.call_format, TOOLS, ToolChoice("required", is_parallel=False), codec.marks)
    for seed in range(3):
        _, calls = read(codec, walk(codec, grammars, grammar, seed)[0], is_forced=True)
        assert len(calls) == 1


def test_several_calls_follow_each_other_where_the_template_can_write_them(family: Any):
    codec, grammars = family
    if codec.call_format.between is None:
        return
    wanted = codec.call_format.write([{"name": "get", "arguments": {}}] * 3)
    grammar = tool_grammar(codec.call_format, TOOLS, ToolChoice("required"), codec.marks)
    ids, _ = walk(codec, grammars, grammar, 0, wanted)
    assert [call["name"] for call in read(codec, ids)[1]][:3] == ["get"] * 3


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_that_is_free_to_call_is_text_or_valid_calls(family: Any, seed: int):
    codec, grammars = family
    grammar = tool_grammar(codec.call_format, TOOLS, ToolChoice(), codec.marks)
    text, calls = read(codec, walk(codec, grammars, grammar, seed)[0])
    for call in calls:
        check(call)

    lead = "" if not codec.call_format.marker else "Let me see.\n"
    begin = f"{lead}{codec.call_format.begin}get{codec.call_format.middle}"
    ids, is_whole = walk(codec, grammars, grammar, seed, begin)
    text, calls = read(codec, ids)
    assert is_whole and calls and text == lead.strip()
    for call in calls:
        check(call)


def test_an_answer_that_must_not_call_has_no_call(family: Any):
    codec, grammars = family
    grammar = tool_grammar(codec.call_format, TOOLS, ToolChoice("none"), codec.marks)
    wanted = codec.call_format.write([{"name": "get", "arguments": {}}])
    ids, _ = walk(codec, grammars, grammar, 1, wanted)
    marks = {codec.marks.ids.get(codec.call_format.marker)} - {None}
    assert not marks & set(ids)
    if not codec.call_format.marker:
        assert not written(codec, ids).startswith(codec.call_format.begin + 'get"')


def test_with_a_schema_for_text_an_answer_is_calls_or_json(family: Any):
    codec, grammars = family
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    grammar = tool_grammar(codec.call_format, TOOLS, ToolChoice(), codec.marks, text_schema=schema)
    text, calls = read(codec, walk(codec, grammars, grammar, 0, '{"ok"')[0])
    assert not calls and json.loads(text)["ok"] in (True, False)
    begin = f"{codec.call_format.begin}get{codec.call_format.middle}"
    text, calls = read(codec, walk(codec, grammars, grammar, 0, begin)[0])
    assert not text
    check(calls[0])


def conversation(id: str = "call_abcdefghijklmnopqrstuvwx") -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": id, "type": "function", "function": CALL}]},
        {"role": "tool", "tool_call_id": id, "content": '{"sky": "clear"}'},
        {"role": "assistant", "content": "It is clear."},
    ]


def test_the_base_is_shown_tools_calls_and_results(family: Any):
    codec, _ = family
    chat = conversation()
    prompt = "".join(codec.token_text(id)[0] for id in codec.encode_chat(chat[:4], TOOLS))
    for part in ("Be brief.", "get_weather", "Weather of a city.", "Weather?", "clear", "days"):
        assert part in prompt
    assert "strict" not in prompt


def test_a_call_is_trained_as_it_is_served(family: Any):
    """What is learned of a call is, but for ids, what the grammar lets a model write and the parser reads."""
    codec, grammars = family
    ids, mask = codec.encode_training(conversation(), TOOLS)
    prompt = codec.encode_chat(conversation()[:2], TOOLS)
    assert ids[: len(prompt)] == prompt
    answer = [id for id, is_learned in zip(ids, mask, strict=True) if is_learned and id not in codec.stop_ids]
    text, calls = read(codec, answer)
    assert text in ("", "It is clear.") and calls == [CALL]

    grammar = tool_grammar(codec.call_format, TOOLS, ToolChoice(), codec.marks)
    wanted = codec.call_format.write([{"name": CALL["name"], "arguments": json.loads(CALL["arguments"])}])
    ids, is_whole = walk(codec, grammars, grammar, 0, wanted)
    assert is_whole and read(codec, ids)[1][0] == CALL


def test_ids_of_calls_are_shortened_for_templates_that_insist(tiny_base: Path, tmp_path: Path):
    codec = Codec.load(write_family(tmp_path / "m", tiny_base, "mistral"))
    chat = conversation()
    prompt = codec.decode(codec.encode_chat(chat[:4]))
    assert chat[2]["tool_calls"][0]["id"] not in prompt
    assert codec.encode_chat(conversation("abcdefghi")[:4]) != codec.encode_chat(chat[:4])


@pytest.mark.parametrize(
    ("name", "begin", "has_several"),
    [
        ("plain", TAGGED.begin, True),
        ("qwen", TAGGED.begin, True),
        ("coder", "<tool_call>\n<function=", True),
        ("llama", BARE.begin, False),
        ("mistral", '[TOOL_CALLS] [{"name": "', True),
        ("mistral_new", "[TOOL_CALLS]", True),
        ("granite", '<|tool_call|>[{"name": "', True),
        ("phi", '<|tool_call|>[{"name": "', True),
        ("gemma", BARE.begin, False),
    ],
)
def test_the_format_of_each_family_is_found(tiny_base: Path, tmp_path: Path, name: str, begin: str, has_several: bool):
    found = Codec.load(write_family(tmp_path / name, tiny_base, name)).call_format
    assert (found.begin, found.between is not None) == (begin, has_several)


def test_a_template_of_its_own_for_tools_is_asked_for_the_format(tiny_base: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = {"default": FAMILIES["plain"].template, "tool_use": FAMILIES["coder"].template}
    codec = Codec(tokenizer, json.loads((tiny_base / "config.json").read_text()), {})
    assert codec.call_format.begin == "<tool_call>\n<function="


@pytest.mark.parametrize(
    "answer",
    [
        "<tool_call> is a tag",
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "get", "args": {}}\n</tool_call>',
        "a < b <tool_call>\n{",
        ' {"name": "get"',
    ],
)
def test_what_only_looks_like_a_call_is_text(answer: str):
    for size in (1, 5, 100):
        parser = CallParser(TAGGED, TOOLS)
        text = ""
        for at in range(0, len(answer), size):
            piece, calls = parser.push(answer[at : at + size])
            assert not calls
            text += piece
        assert text + parser.push("", final=True)[0] == answer


def test_text_before_a_call_goes_out_at_once_and_the_space_between_never():
    parser = CallParser(TAGGED, TOOLS)
    assert parser.push("Let me look. ") == ("Let me look.", ())
    assert parser.push("Now:\n\n<tool") == (" Now:", ())
    text, calls = parser.push('_call>\n{"name": "get", "arguments": {}}\n</tool_call>')
    assert (text, joined(list(calls))) == ("", [{"name": "get", "arguments": "{}"}])


def test_arguments_are_passed_on_as_they_come():
    parser = CallParser(TAGGED, TOOLS)
    parser.push('<tool_call>\n{"name": "get_weather", "arguments": ')
    pieces = ['{"ci', 'ty": "a}\\"', ' b{", ', '"days": 3', "}"]
    assert [parser.push(piece)[1][-1].arguments for piece in pieces] == pieces
    assert parser.push("}\n</tool_call>", final=True) == ("", ())


def test_llamas_tag_before_a_call_is_no_text():
    parser = CallParser(BARE, TOOLS)
    assert parser.push("<|python_tag|>") == ("", ())
    text, calls = parser.push('{"name": "get", "parameters": {}}', final=True)
    assert (text, joined(list(calls))) == ("", [{"name": "get", "arguments": "{}"}])
