from pathlib import Path

import pytest

from tuneloom.engine.text import Codec
from tuneloom.errors import InvalidRequest
from tuneloom.rows import Conversation, Pair, Preference, Text
from tuneloom.train.render import Renderer

USER = {"role": "user", "content": "say yes or no"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no maybe"}
END_OF_TURN = 2


@pytest.fixture(scope="module")
def codec(tiny_base: Path) -> Codec:
    return Codec.load(tiny_base)


@pytest.fixture(scope="module")
def renderer(tiny_base: Path) -> Renderer:
    return Renderer.load(tiny_base)


def learned(example: object, codec: Codec) -> list[int]:
    return [id for id, is_learned in zip(example.ids, example.learned, strict=True) if is_learned]  # type: ignore[attr-defined]


def test_exactly_the_answers_and_their_ends_are_learned(renderer: Renderer, codec: Codec) -> None:
    example = renderer.render(Conversation((USER, YES, USER, NO)))
    answers = learned(example, codec)
    assert answers == [*codec.encode_text("yes"), END_OF_TURN, *codec.encode_text("no maybe"), END_OF_TURN]
    assert example.num_answers == 2


def test_what_comes_before_an_answer_is_what_serving_encodes(renderer: Renderer, codec: Codec) -> None:
    example = renderer.render(Conversation((USER, YES, USER, NO)))
    first = example.learned.index(True)
    assert example.ids[:first] == codec.encode_chat([USER])
    second = len(codec.encode_chat([USER, YES, USER]))
    assert example.ids[:second] == codec.encode_chat([USER, YES, USER])
    assert example.learned[second] and not example.learned[second - 1]


def test_an_answer_with_weight_0_is_not_learned(renderer: Renderer, codec: Codec) -> None:
    example = renderer.render(Conversation((USER, {**YES, "weight": 0}, USER, NO)))
    assert codec.decode(learned(example, codec)) == "no maybe"


def test_a_completion_is_learned_with_its_end_and_its_prompt_is_not(renderer: Renderer, codec: Codec) -> None:
    example = renderer.render(Pair("left right", " up down"))
    start = len(codec.encode_text("left right"))
    assert example.ids[:start] == codec.encode_text("left right")
    assert codec.decode(learned(example, codec)) == " up down"
    assert example.ids[-1] == END_OF_TURN and example.learned == [i >= start for i in range(len(example.ids))]


def test_a_completion_that_would_join_the_prompt_in_one_token_leaves_the_prompt_alone(
    renderer: Renderer, codec: Codec
) -> None:
    word = "sarcastic"
    prompts = [(word[:cut], codec.encode_text(word[:cut])) for cut in range(1, len(word))]
    start, prompt = next(each for each in prompts if codec.encode_text(word)[: len(each[1])] != each[1])
    example = renderer.render(Pair(start, word.removeprefix(start)))
    assert example.ids[: len(prompt)] == prompt
    assert codec.decode(learned(example, codec)) == word.removeprefix(start)


def test_text_is_learned_whole_with_an_end(renderer: Renderer, codec: Codec) -> None:
    example = renderer.render(Text("red green blue"))
    assert codec.decode(example.ids) == "red green blue"
    assert all(example.learned) and example.ids[-1] == END_OF_TURN


def test_all_can_be_learned_on_demand(tiny_base: Path) -> None:
    example = Renderer.load(tiny_base, learn_all=True).render(Conversation((USER, YES)))
    assert all(example.learned)


def test_where_the_last_answer_begins_is_the_length_of_the_prompt(renderer: Renderer, codec: Codec) -> None:
    example = renderer.render(Conversation((USER, YES, USER, NO)))
    assert example.prompt_length == len(codec.encode_chat([USER, YES, USER]))
    assert renderer.render(Pair("left", " right")).prompt_length == len(codec.encode_text("left"))
    assert renderer.render(Text("left right")).prompt_length == 0


def test_a_preference_is_one_prompt_as_serving_makes_it_with_two_answers(renderer: Renderer, codec: Codec) -> None:
    example = renderer.render_preference(Preference((USER, YES, USER), NO, YES))
    prompt = codec.encode_chat([USER, YES, USER])
    assert example.prompt == prompt
    for answered, text in ((example.chosen, "no maybe"), (example.rejected, "yes")):
        assert answered.ids[: len(prompt)] == prompt and not any(answered.learned[: len(prompt)])
        assert learned(answered, codec) == [*codec.encode_text(text), END_OF_TURN]


def test_a_preference_of_plain_text_ends_its_answers_with_the_end_of_text(renderer: Renderer, codec: Codec) -> None:
    example = renderer.render_preference(Preference("left right", " up", " down"))
    assert example.prompt == codec.encode_text("left right")
    assert learned(example.chosen, codec) == [*codec.encode_text(" up"), END_OF_TURN]
    assert learned(example.rejected, codec) == [*codec.encode_text(" down"), END_OF_TURN]


def test_a_batch_is_each_row_by_itself_with_its_error_in_its_place(renderer: Renderer) -> None:
    bad = Conversation((YES,))
    rows = [Text("red"), Conversation((USER, YES)), bad, Pair("sar", "castic"), Preference((USER,), YES, NO), Text("b")]
    batch = renderer.render_batch(rows)
    assert isinstance(batch.pop(2), InvalidRequest)
    rows.remove(bad)
    alone = [renderer.render_preference(r) if isinstance(r, Preference) else renderer.render(r) for r in rows]
    assert batch == alone
    with pytest.raises(InvalidRequest, match="no answer follows"):
        renderer.render(bad)
