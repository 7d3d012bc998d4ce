"""Rows as they are learned, held against serving: what is the same passes, and each way to differ is found."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.templates import FAMILIES, write_family
from tests.tiny import CHATML
from tuneloom.engine.text import Codec
from tuneloom.errors import InvalidRequest
from tuneloom.rows import Conversation, Pair, Scan, Text
from tuneloom.serve.messages import read_messages
from tuneloom.serve.tools import read_tools
from tuneloom.train.render import Example, Renderer
from tuneloom.train.rendering import Difference, Tally, compare
from tuneloom.train.sample import MADE_UP

LIMIT = 512
END_OF_TURN = 2
USER = {"role": "user", "content": "say yes or no"}
YES = {"role": "assistant", "content": "yes"}
TURNS = Conversation((USER, YES, USER, {"role": "assistant", "content": "no maybe"}))


@pytest.fixture(scope="module")
def codec(tiny_base: Path) -> Codec:
    return Codec.load(tiny_base)


@pytest.fixture(scope="module")
def renderer(tiny_base: Path) -> Renderer:
    return Renderer.load(tiny_base)


def with_template(base: Path, folder: Path, template: str) -> Path:
    """The tiny base with another chat template; return its folder."""
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def compared(row: Any, example: Example, codec: Codec, **options: Any) -> Tally:
    tally = Tally()
    compare(row, example, codec, tally, **{"limit": LIMIT, **options})
    return tally


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_that_a_family_takes_is_rendered_as_it_is_served(family: str, tiny_base: Path, tmp_path: Path):
    folder = write_family(tmp_path / family, tiny_base, family)
    codec, renderer = Codec.load(folder), Renderer.load(folder)
    taken = 0
    for conversation in MADE_UP.values():
        try:
            example = renderer.render(conversation)
        except InvalidRequest:
            continue
        assert compared(conversation, example, codec).answers > 0
        taken += 1
    assert taken >= 4


@pytest.mark.parametrize("row", [Pair("left right", " up down"), Pair("sarc", "astic"), Text("red green blue")])
def test_plain_text_is_compared_too(row: Any, codec: Codec, renderer: Renderer):
    assert compared(row, renderer.render(row), codec).answers == 1


@pytest.mark.parametrize("family", ["qwen", "mistral", "llama"])
def test_tools_and_calls_are_learned_in_the_form_that_serving_reads(family: str, tiny_base: Path, tmp_path: Path):
    folder = write_family(tmp_path / family, tiny_base, family)
    codec, renderer = Codec.load(folder), Renderer.load(folder)
    call = {"function": {"arguments": "{}", "name": "weather"}, "type": "function", "id": "call00001"}
    function = {"parameters": {"type": "object"}, "strict": None, "name": "weather", "description": None}
    line = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [{"function": function, "type": "function"}],
    }
    scan = Scan()
    ((_, row),) = scan.rows(io.BytesIO(json.dumps(line).encode()))
    assert compared(row, renderer.render(row), codec).answers == 1
    asked = Conversation((*read_messages(line["messages"]),), read_tools(line["tools"]))
    assert renderer.render(asked).ids == renderer.render(row).ids


def test_learning_everything_is_no_difference(codec: Codec, tiny_base: Path):
    example = Renderer.load(tiny_base, learn_all=True).render(TURNS)
    assert compared(TURNS, example, codec, learn_all=True).answers == 2


def test_a_template_that_rewrites_earlier_turns_is_no_false_alarm(tiny_base: Path, tmp_path: Path):
    forgetful = CHATML.replace(
        "{{ m['content'] }}",
        "{{ '...' if m['role'] == 'user' and loop.index0 < messages | length - 2 else m['content'] }}",
    )
    folder = with_template(tiny_base, tmp_path / "forgetful", forgetful)
    codec, renderer = Codec.load(folder), Renderer.load(folder)
    example = renderer.render(TURNS)
    assert example.num_answers == 1
    tally = compared(TURNS, example, codec)
    assert (tally.answers, tally.rewritten) == (1, 1)
    assert "1 answers are not learned" in tally.sentence()


def test_another_template_is_found_at_its_first_token(codec: Codec, tiny_base: Path, tmp_path: Path):
    other = with_template(tiny_base, tmp_path / "other", CHATML.replace("<|im_end|>", " <|im_end|>"))
    with pytest.raises(Difference) as found:
        compared(TURNS, Renderer.load(other).render(TURNS), codec)
    assert found.value.at == codec.encode_chat([USER]).index(END_OF_TURN)
    assert found.value.served == END_OF_TURN != found.value.trained


def test_an_unlearned_stop_token_is_found(codec: Codec, renderer: Renderer):
    example = renderer.render(TURNS)
    end = next(at for at, id in enumerate(example.ids) if example.learned[at] and id in codec.stop_ids)
    learned = [is_learned and at != end for at, is_learned in enumerate(example.learned)]
    with pytest.raises(Difference, match="ends the answer is not learned") as found:
        compared(TURNS, replace(example, learned=learned), codec)
    assert found.value.at == end


def test_an_answer_without_an_end_is_found_unless_it_was_cut(codec: Codec, renderer: Renderer):
    row = Conversation((USER, YES))
    example = renderer.render(row)
    end = max(at for at, id in enumerate(example.ids) if id in codec.stop_ids)
    cut = Example(example.ids[:end], example.learned[:end])
    with pytest.raises(Difference, match="the tokens differ"):
        compared(row, cut, codec)
    assert compared(row, cut, codec, limit=end).answers == 1
    endless = Text("red green")
    with pytest.raises(Difference, match="no token ends the answer"):
        compared(endless, Example([*codec.encode_text("red green"), 300], [True] * 4), codec)


def test_an_answer_that_is_not_learned_and_a_question_that_is_are_found(codec: Codec, renderer: Renderer):
    example = renderer.render(TURNS)
    second = len(codec.encode_chat(TURNS.messages[:3]))
    with pytest.raises(Difference, match="not learned"):
        compared(TURNS, replace(example, learned=[at < second and on for at, on in enumerate(example.learned)]), codec)
    asked = len(codec.encode_chat([USER])) - 4
    with pytest.raises(Difference, match="no answer begins here") as found:
        compared(TURNS, replace(example, learned=[on or at == asked for at, on in enumerate(example.learned)]), codec)
    assert found.value.at == asked
