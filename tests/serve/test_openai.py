"""Requests as they come: what is honoured, ignored, refused."""

from typing import Any

import pytest

from tuneloom.errors import InvalidRequest
from tuneloom.generation import ChatPrompt, TextPrompt, TokenPrompt
from tuneloom.serve.body import parse_object
from tuneloom.serve.openai import IGNORED, REFUSED, Chat, Completion, parse_chat, parse_completion

HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HI, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "hi", **fields}


def refusal(parse: Any, body: dict[str, Any]) -> tuple[str | None, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    assert caught.value.status == 400
    assert caught.value.message
    return caught.value.code, caught.value.param


def test_every_field_of_the_openai_client_is_honoured_ignored_or_refused_by_name() -> None:
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    read_apart = {"messages", "prompt", "stop", "logit_bias", "stream_options", "service_tier"}
    read_apart |= {"tools", "tool_choice", "parallel_tool_calls", "response_format"}
    for params, model in ((chat_create_params, Chat), (completion_create_params, Completion)):
        legal = set(params.CompletionCreateParamsNonStreaming.__annotations__)
        legal |= set(params.CompletionCreateParamsBase.__annotations__)
        assert legal - set(model.model_fields) - read_apart - IGNORED - set(REFUSED) == set()


def test_all_sampling_fields_reach_the_engine() -> None:
    call = parse_chat(
        chat(
            temperature=0,
            top_p=0.5,
            max_completion_tokens=7,
            n=3,
            stop=["a", "b"],
            seed=4,
            presence_penalty=-2,
            frequency_penalty=1.5,
            logit_bias={"12": -100},
            logprobs=True,
            top_logprobs=2,
            top_k=5,
            min_p=0.1,
            repetition_penalty=1.2,
            stream=True,
            stream_options={"include_usage": True, "include_obfuscation": False},
        )
    )

    params = call.params
    assert (params.temperature, params.top_p, params.max_tokens, params.n, params.stop) == (0, 0.5, 7, 3, ("a", "b"))
    assert (params.seed, params.presence_penalty, params.frequency_penalty) == (4, -2, 1.5)
    assert (params.logit_bias, params.logprobs) == ({12: -100.0}, 2)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.1, 1.2)
    assert call.stream and call.include_usage


def test_null_means_the_default_in_every_field() -> None:
    nulls = {name: None for name in (set(Chat.model_fields) | IGNORED | set(REFUSED)) - {"model"}}
    apart = ("stop", "logit_bias", "stream_options", "tools", "tool_choice", "parallel_tool_calls", "response_format")
    call = parse_chat(chat(**nulls, **dict.fromkeys(apart), service_tier=None))
    assert call == parse_chat(chat())


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    body = chat(
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        reasoning_effort="none",
        verbosity="medium",
        parallel_tool_calls=True,
        user="u",
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        stop=[],
    )
    assert parse_chat(body) == parse_chat(chat())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("audio", {"voice": "x", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(field: str, value: Any) -> None:
    assert refusal(parse_chat, chat(**{field: value})) == ("unsupported_parameter", field)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"temperatur": 1}, "unknown_parameter", "temperatur"),
        ({"temperature": "1"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"top_p": -0.1}, "invalid_value", "top_p"),
        ({"max_tokens": -1}, "invalid_value", "max_tokens"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_type", "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "invalid_value", "max_tokens"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 129}, "invalid_value", "n"),
        ({"n": True}, "invalid_type", "n"),
        ({"stop": 3}, "invalid_type", "stop"),
        ({"stop": ["a", 3]}, "invalid_type", "stop[1]"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"seed": 1 << 64}, "invalid_value", "seed"),
        ({"presence_penalty": 3}, "invalid_value", "presence_penalty"),
        ({"logit_bias": {"a": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias.1"),
        ({"logit_bias": []}, "invalid_type", "logit_bias"),
        ({"logprobs": 1}, "invalid_type", "logprobs"),
        ({"top_logprobs": 1}, "invalid_value", "top_logprobs"),
        ({"stream_options": {}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
        ({"model": ""}, "invalid_value", "model"),
        ({"model": 3}, "invalid_type", "model"),
        ({"messages": None}, "missing_required_parameter", "messages"),
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"service_tier": "gold"}, "invalid_value", "service_tier"),
        ({"service_tier": 1}, "invalid_type", "service_tier"),
        ({"store": "yes"}, "invalid_type", "store"),
        ({"user": 5}, "invalid_type", "user"),
        ({"metadata": "a"}, "invalid_type", "metadata"),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
        ({"metadata": {"k" * 65: "a"}}, "invalid_value", "metadata"),
        ({"metadata": {str(i): "a" for i in range(17)}}, "invalid_value", "metadata"),
    ],
)
def test_a_wrong_field_is_named_with_its_kind_of_fault(fields: dict[str, Any], code: str, param: str) -> None:
    assert refusal(parse_chat, chat(**fields)) == (code, param)


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("hi", "invalid_type", "messages[1]"),
        ({"content": "x"}, "missing_required_parameter", "messages[1].role"),
        ({"role": "wizard", "content": "x"}, "invalid_value", "messages[1].role"),
        ({"role": 1, "content": "x"}, "invalid_type", "messages[1].role"),
        ({"role": "user"}, "missing_required_parameter", "messages[1].content"),
        ({"role": "user", "content": None}, "invalid_type", "messages[1].content"),
        ({"role": "assistant", "content": None}, "invalid_type", "messages[1].content"),
        ({"role": "user", "content": 5}, "invalid_type", "messages[1].content"),
        ({"role": "user", "content": []}, "invalid_value", "messages[1].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "invalid_value",
            "messages[1].content[0].type",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "invalid_type", "messages[1].content[0].text"),
        ({"role": "user", "content": "x", "colour": 1}, "unknown_parameter", "messages[1].colour"),
        ({"role": "user", "content": "x", "tool_calls": [1]}, "unsupported_parameter", "messages[1].tool_calls"),
        ({"role": "tool", "content": "x"}, "missing_required_parameter", "messages[1].tool_call_id"),
        ({"role": "assistant", "tool_calls": [{"id": "c"}]}, "invalid_type", "messages[1].tool_calls[0].function"),
        *(
            (
                {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": arguments}}]},
                "invalid_value",
                "messages[1].tool_calls[0].function.arguments",
            )
            for arguments in ("{oops", "[1]", "null", "5")
        ),
    ],
)
def test_a_wrong_message_is_named_by_its_place(message: Any, code: str, param: str) -> None:
    assert refusal(parse_chat, chat(messages=[*HI, message])) == (code, param)


@pytest.mark.parametrize(("tier", "priority"), [("flex", -1), ("auto", 0), ("default", 0), ("priority", 1)])
def test_the_service_tier_orders_the_requests_of_an_owner(tier: str, priority: int) -> None:
    assert parse_chat(chat(service_tier=tier)).priority == priority
    assert parse_completion(completion(service_tier=tier)).priority == priority


@pytest.mark.parametrize("field", ["functions", "function_call"])
def test_deprecated_fields_are_refused_with_their_successor(field: str) -> None:
    with pytest.raises(InvalidRequest, match="Send `tool"):
        parse_chat(chat(**{field: {"name": "f"}}))


def test_messages_come_out_in_the_words_of_chat_templates() -> None:
    function = {"name": "f", "arguments": "{}"}
    call = parse_chat(
        chat(
            messages=[
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "function_call": function, "audio": None, "annotations": []},
                {"role": "function", "name": "f", "content": "1"},
                {"role": "assistant", "content": None, "refusal": "no"},
            ]
        )
    )

    assert call.prompts == (
        ChatPrompt(
            (
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "ab"},
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
                {"role": "tool", "content": "1", "name": "f"},
                {"role": "assistant", "content": "no"},
            )
        ),
    )


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", (TextPrompt("a"),)),
        (["a", "b"], (TextPrompt("a"), TextPrompt("b"))),
        ([1, 2], (TokenPrompt((1, 2)),)),
        ([[1, 2], [3]], (TokenPrompt((1, 2)), TokenPrompt((3,)))),
    ],
)
def test_a_prompt_is_text_or_token_ids_alone_or_in_a_list(prompt: Any, prompts: Any) -> None:
    call = parse_completion(completion(prompt=prompt, n=2))
    assert (call.prompts, call.num_choices) == (prompts, 2 * len(prompts))
    assert call.params.max_tokens == 16


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": {}}, "invalid_type", "prompt"),
        ({"prompt": ["a", 1]}, "invalid_type", "prompt[1]"),
        ({"prompt": [1, "a"]}, "invalid_type", "prompt[1]"),
        ({"prompt": [[1], []]}, "invalid_value", "prompt[1]"),
        ({"prompt": [-1]}, "invalid_type", "prompt[0]"),
        ({"prompt": ["a"] * 2049}, "invalid_value", "prompt"),
        ({"prompt": ["a"] * 100, "n": 100}, "invalid_value", "n"),
        ({"logprobs": 6}, "invalid_value", "logprobs"),
        ({"logprobs": True}, "invalid_type", "logprobs"),
        ({"best_of": 2, "n": 3}, "invalid_value", "best_of"),
        ({"best_of": 2, "stream": True}, "invalid_value", "best_of"),
        ({"prompt": ["a"] * 100, "best_of": 100}, "invalid_value", "best_of"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"echo": True, "logprobs": 1}, "unsupported_parameter", "echo"),
        ({"tools": []}, "unknown_parameter", "tools"),
        ({"service_tier": "gold"}, "invalid_value", "service_tier"),
        ({"messages": HI}, "unknown_parameter", "messages"),
    ],
)
def test_a_wrong_completion_field_is_named(fields: dict[str, Any], code: str, param: str) -> None:
    assert refusal(parse_completion, completion(**fields)) == (code, param)


@pytest.mark.parametrize("seed", [-(1 << 63), (1 << 63) - 1])
def test_every_64_bit_seed_is_one(seed: int) -> None:
    assert parse_chat(chat(seed=seed, n=2)).params.seed == seed


def test_an_answer_goes_back_as_the_client_has_parsed_it() -> None:
    from openai.types.chat import ParsedChatCompletionMessage

    for parsed in (None, {"a": 1}):
        message = ParsedChatCompletionMessage[dict[str, int]](role="assistant", content='{"a": 1}', parsed=parsed)
        call = parse_chat(chat(messages=[*HI, message.model_dump()]))
        assert call.prompts == parse_chat(chat(messages=[*HI, {"role": "assistant", "content": '{"a": 1}'}])).prompts


def test_a_refused_value_is_shown_as_json() -> None:
    with pytest.raises(InvalidRequest, match='Invalid `model`: ""'):
        parse_chat(chat(model=""))
    with pytest.raises(InvalidRequest, match="expected a token id, got -1"):
        parse_completion(completion(prompt=[-1]))


def test_the_model_in_the_url_must_not_be_contradicted() -> None:
    assert parse_chat({"messages": HI}, "m").model == "m"
    assert parse_chat(chat(), "m").model == "m"
    with pytest.raises(InvalidRequest, match="differs"):
        parse_chat(chat(), "other")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[1]", "an array"),
        (b"\xff{}", "UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_body_that_is_no_plain_json_object_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        parse_object(raw)


def test_a_whole_surrogate_pair_is_text() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude42"}') == {"a": "\U0001f642"}
