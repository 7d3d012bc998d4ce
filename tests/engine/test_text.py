import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import CHATML, CORPUS
from tuneloom.engine.text import Codec
from tuneloom.engine.text_stream import TextStream
from tuneloom.errors import InvalidRequest

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Reasoning is shown in the last turn only, as in Qwen 3.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Whatever is the last user turn gets a mark, so that turns before the last answer read differently once it is there.
REWRITING = (
    "{% for m in messages %}{{ m['role'] }}{{ messages | length }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hello café"},
    {"role": "assistant", "content": "\n\nyes"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "maybe 🙂"},
]


@pytest.fixture(scope="module")
def codec(tiny_base: Path) -> Codec:
    return Codec.load(tiny_base)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """A sentencepiece-like vocabulary: spaces as ▁, one before the text, bytes for what it does not know."""
    return Codec.load(_write_pieces(tmp_path_factory.mktemp("pieces")))


def with_template(codec: Codec, tiny_base: Path, template: str) -> Codec:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = template
    return Codec(tokenizer, json.loads((tiny_base / "config.json").read_text()), {})


def learned(codec: Codec, ids: list[int], mask: list[bool]) -> str:
    return "".join(codec.token_text(id)[0] for id, is_learned in zip(ids, mask, strict=True) if is_learned)


def test_a_chat_is_encoded_as_the_template_renders_it(codec: Codec, tiny_base: Path):
    from transformers import AutoTokenizer

    chat = [{"role": "system", "content": "answer"}, {"role": "user", "content": "the quick brown fox"}]
    expected = AutoTokenizer.from_pretrained(tiny_base).apply_chat_template(chat, add_generation_prompt=True)
    assert codec.encode_chat(chat) == expected["input_ids"]


def test_generation_stops_at_the_configured_ids_and_at_the_end_of_turn(codec: Codec, tiny_base: Path):
    assert codec.stop_ids == {2}
    other = with_template(codec, tiny_base, CHATML.replace("<|im_end|>", "<|endoftext|>"))
    assert other.stop_ids == {0, 2}


@pytest.mark.parametrize("template", [CHATML, SMOLLM2, REASONING])
def test_training_sees_before_each_answer_what_serving_sees(codec: Codec, tiny_base: Path, template: str):
    codec = with_template(codec, tiny_base, template)
    ids, mask = codec.encode_training(CHAT)
    for answer in (1, 3):
        prompt = codec.encode_chat(CHAT[:answer])
        assert ids[: len(prompt)] == prompt
        assert mask[len(prompt)] and not mask[len(prompt) - 1]


def test_answers_and_their_end_of_turn_are_learned_and_nothing_else(codec: Codec):
    ids, mask = codec.encode_training(CHAT)
    assert learned(codec, ids, mask) == "\n\nyes<|im_end|>maybe 🙂<|im_end|>"


def test_an_answer_of_weight_zero_is_not_learned(codec: Codec):
    ids, mask = codec.encode_training([CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]])
    assert learned(codec, ids, mask) == "maybe 🙂<|im_end|>"


def test_a_default_system_message_is_in_training_and_serving_alike(codec: Codec, tiny_base: Path):
    codec = with_template(codec, tiny_base, SMOLLM2)
    ids, _ = codec.encode_training(CHAT[:2])
    assert "You are a helpful" in codec.decode(ids)
    assert "You are a helpful" in codec.decode(codec.encode_chat(CHAT[:1]))


def test_a_template_that_rewrites_what_came_before_an_answer_is_refused(codec: Codec, tiny_base: Path):
    codec = with_template(codec, tiny_base, REWRITING)
    with pytest.raises(InvalidRequest, match="no answer follows"):
        codec.encode_training(CHAT)


@pytest.mark.parametrize("template", [CHATML, SMOLLM2, REASONING, REWRITING])
def test_a_batch_is_each_conversation_by_itself(codec: Codec, tiny_base: Path, template: str):
    codec = with_template(codec, tiny_base, template)
    chats = [CHAT, CHAT[:2], [*CHAT[:2], CHAT[2]], [CHAT[1]], [{**CHAT[0], "content": [{"type": "x"}]}, CHAT[1]]]

    def alone(chat: list[dict[str, Any]]) -> Any:
        try:
            return codec.encode_training(chat)
        except InvalidRequest as error:
            return error.message

    batch = codec.encode_training_batch([(chat, ()) for chat in chats])
    assert [found.message if isinstance(found, InvalidRequest) else found for found in batch] == list(map(alone, chats))
    texts = ["", "hello", "hello café 🙂 " * 20]
    assert codec.encode_texts(texts) == [codec.encode_text(text) for text in texts]


def test_text_parts_are_joined_and_other_parts_refused(codec: Codec):
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "sun"}]
    joined = codec.encode_chat([{"role": "user", "content": "hello sun"}])
    assert codec.encode_chat([{"role": "user", "content": parts}]) == joined
    with pytest.raises(InvalidRequest, match="image_url"):
        codec.encode_chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_messages_that_the_template_refuses_are_a_clear_error(codec: Codec, tiny_base: Path):
    codec = with_template(codec, tiny_base, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate") as error:
        codec.encode_chat(CHAT[:1])
    assert error.value.param == "messages"
    with pytest.raises(InvalidRequest, match="empty"):
        codec.encode_chat([])


def test_a_template_without_tools_is_told_of_them_in_the_system_message(codec: Codec):
    told = codec.decode(codec.encode_chat(CHAT[:1], tools=[{"type": "function", "function": {"name": "f"}}]))
    assert told.startswith("system\n") and '{"name": "f", "parameters": {"type": "object", "properties": {}}}' in told


@pytest.mark.parametrize("template", ["<s>{{ messages[0]['content'] }}", "{{ messages[0]['content'] }}"])
def test_a_prompt_has_one_bos_whether_the_template_writes_it_or_not(tmp_path: Path, template: str):
    codec = Codec.load(_write_pieces(tmp_path, template=template))
    ids = codec.encode_chat([{"role": "user", "content": "hello"}])
    assert ids[0] == 1 and ids.count(1) == 1
    assert codec.encode_text("hello").count(1) == 1
    assert codec.encode_text("<s>hello").count(1) == 1


def test_a_vocabulary_with_leading_spaces_trains_what_it_serves(pieces: Codec):
    ids, mask = pieces.encode_training(CHAT)
    for answer in (1, 3):
        prompt = pieces.encode_chat(CHAT[:answer])
        assert ids[: len(prompt)] == prompt
    assert pieces.decode(ids) and any(mask)


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_text_survives_encoding_and_decoding(codec: Codec, pieces: Codec, text: str):
    plain = text.replace("▁", "")
    for each in (codec, pieces):
        ids = [id for id in each.encode_text(plain) if id not in each.vocabulary.special_ids]
        assert each.decode(ids) == each._backend.decode(ids) == plain


@given(
    st.lists(st.integers(0, 511), max_size=30),
    st.lists(st.integers(1, 4), min_size=1, max_size=10),
    st.lists(st.text("abĠ e", min_size=1, max_size=3), max_size=2),
)
@settings(max_examples=100, deadline=None)
def test_a_stream_equals_the_decoded_whole_up_to_the_first_stop(
    codec: Codec, ids: list[int], sizes: list[int], stop: list[str]
):
    chunks = _chunks(ids, sizes)
    streamed, has_stopped = _run(TextStream(codec, tuple(stop)), chunks)
    expected, must_stop = _until_stop(codec.decode(ids), stop)
    assert (streamed, has_stopped) == (expected, must_stop)


def test_a_character_is_never_split(codec: Codec):
    stream = TextStream(codec)
    deltas = [stream.push([id])[0] for id in codec.encode_text("日🙂")]
    assert [delta for delta in deltas if delta] == ["日", "🙂"]


def test_a_possible_stop_string_is_held_back_until_it_is_known(codec: Codec):
    stream = TextStream(codec, ("yes",))
    assert stream.push(codec.encode_text("say y")) == ("say ", False)
    assert stream.push(codec.encode_text("e")) == ("", False)
    assert stream.push(codec.encode_text("t")) == ("yet", False)
    assert stream.push(codec.encode_text("ye"))[0] == ""
    assert stream.push((), final=True) == ("ye", False)
    assert stream.push(codec.encode_text("yes more")) == ("", True)
    assert stream.push(codec.encode_text("more")) == ("", True)


def test_an_unfinished_character_at_the_end_becomes_a_replacement(codec: Codec):
    ids = codec.encode_text("日")[:-1]
    stream = TextStream(codec)
    assert stream.push(ids) == ("", False)
    assert stream.push((), final=True)[0] == codec.decode(ids) != ""


def test_a_token_shows_its_raw_bytes(codec: Codec, pieces: Codec):
    first = codec.encode_text("é")[0]
    assert b"\xc3".startswith(codec.token_text(first)[1][:1])
    assert codec.token_text(2) == ("<|im_end|>", b"<|im_end|>")
    assert pieces.token_text(3 + 0xE6) == ("\ufffd", b"\xe6")
    assert pieces.token_text(100_000) == ("", b"")


def _run(stream: TextStream, chunks: list[list[int]]) -> tuple[str, bool]:
    text = ""
    for chunk in chunks:
        delta, has_stopped = stream.push(chunk)
        text += delta
        if has_stopped:
            return text, True
    delta, has_stopped = stream.push((), final=True)
    return text + delta, has_stopped


def _chunks(ids: list[int], sizes: list[int]) -> list[list[int]]:
    chunks, at, turn = [], 0, 0
    while at < len(ids):
        chunks.append(ids[at : at + sizes[turn % len(sizes)]])
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    return chunks


def _until_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """The plain reference: look at every prefix of the text."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


def _write_pieces(folder: Path, template: str = CHATML) -> Path:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    by_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special + by_byte, show_progress=False)
    tokenizer.train_from_iterator([line for line in CORPUS if line.isascii()] * 4, trainer)
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 512, "max_position_embeddings": 64}))
    return folder
