"""Answers that follow a grammar, on a random model that would never write JSON by itself."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.engine.conftest import Harness, OpenCore, request
from tuneloom.engine.grammar import json_object_grammar, json_schema_grammar
from tuneloom.engine.matcher import Grammars
from tuneloom.engine.text import Codec
from tuneloom.errors import InvalidRequest, TuneloomError
from tuneloom.generation import SamplingParams

PROMPT = [5, 6, 7]
NAMES = st.sampled_from(["a", "name", "café", "x y", 'say "no"', "日本"])


@pytest.fixture(scope="module")
def codec(tiny_base: Path) -> Codec:
    return Codec.load(tiny_base)


@pytest.fixture
def core(open_core: OpenCore) -> Harness:
    return open_core()


def ask(
    core: Harness, codec: Codec, grammar: str, id: str = "r", *, max_tokens: int = 400, **params: Any
) -> tuple[str, str | None]:
    """Text and finish reason of one answer."""
    settings = SamplingParams(**{"max_tokens": max_tokens, "temperature": 1.0, "seed": 1, **params})
    core.core.add(request(id, PROMPT, params=settings, stop_ids=codec.stop_ids, grammar=grammar))
    core.run()
    assert id not in core.errors, core.errors[id]
    return codec.decode(core.tokens(id)), core.reason(id)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas whose every value is short."""
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
            st.integers(-50, 50),
            st.integers(0, 500),
        ),
        st.builds(
            lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
            st.integers(0, 3),
            st.integers(0, 5),
        ),
        st.just({"type": "string", "pattern": "^[a-c]{1,4}$"}),
        st.just({"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25}),
        st.builds(
            lambda values: {"enum": values},
            st.lists(st.one_of(NAMES, st.integers(-(2**53), 2**53), st.none()), min_size=1, max_size=4, unique_by=str),
        ),
        NAMES.map(lambda value: {"const": {"k": [value]}}),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(
                lambda items, low, size: {"type": "array", "items": items, "minItems": low, "maxItems": low + size},
                inner,
                st.integers(0, 2),
                st.integers(0, 2),
            ),
            st.lists(inner, min_size=1, max_size=3).map(lambda choices: {"anyOf": choices}),
            st.dictionaries(NAMES, inner, min_size=0, max_size=3).flatmap(
                lambda properties: st.builds(
                    lambda required: {
                        "type": "object",
                        "properties": properties,
                        "required": required,
                        "additionalProperties": False,
                    },
                    st.just(list(properties))
                    if len(properties) < 2
                    else st.sampled_from([list(properties), list(properties)[:1]]),
                )
            ),
        ),
        max_leaves=5,
    )


@given(schema=schemas(), seed=st.integers(0, 2**31), temperature=st.sampled_from([0.0, 1.0, 1.7]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_answer_of_a_random_model_is_valid(
    core: Harness, codec: Codec, schema: dict[str, Any], seed: int, temperature: float
):
    text, reason = ask(core, codec, json_schema_grammar(json.dumps(schema)), seed=seed, temperature=temperature)
    core.outputs.clear()
    event(str(reason))
    if reason == "stop":
        jsonschema.validate(json.loads(text), schema)
    else:
        assert reason == "length" and len(text) > 400


@pytest.mark.parametrize(
    "schema",
    [
        {"const": 2**53 - 1},
        {"enum": [10**30]},
        {"const": {"k": [0.1, -1e22, 12345678.125]}},
        {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 90},
        {"type": "integer", "minimum": 2**63 - 90_000, "maximum": 2**63 - 1},
        {"type": "integer", "minimum": -(2**63), "maximum": -(2**63) + 90_000},
        {
            "type": "array",
            "items": {"properties": {"const": {"maximum": 2**63 - 1}}, "enum": [{"const": 1}]},
            "maxItems": 2,
        },
    ],
)
def test_long_numbers_of_a_schema_are_kept(core: Harness, codec: Codec, schema: dict[str, Any]):
    for seed in range(3):
        text, reason = ask(core, codec, json_schema_grammar(json.dumps(schema)), f"r{seed}", seed=seed)
        assert reason == "stop"
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("number", [2**53 + 1, -(2**60) - 1, 2**70, 123456789012345.67])
def test_a_number_that_would_come_out_as_another_is_refused(number: float):
    for schema in ({"enum": ["a", number]}, {"properties": {"n": {"const": {"k": [number]}}}}):
        with pytest.raises(InvalidRequest, match="digits") as refused:
            json_schema_grammar(json.dumps(schema))
        assert str(number) in refused.value.message and refused.value.param == "response_format"


def test_an_answer_ends_where_its_grammar_ends_and_no_token_later(core: Harness, codec: Codec):
    text, reason = ask(core, codec, json_schema_grammar('{"const": {"a": [true, null]}}'))
    assert (json.loads(text), reason, text[-1]) == ({"a": [True, None]}, "stop", "}")
    assert core.tokens("r")[-1] not in codec.stop_ids


def test_a_grammar_that_may_go_on_ends_by_a_stop_id_and_not_before_it_is_complete(core: Harness, codec: Codec):
    bias = {id: 100.0 for id in codec.stop_ids}
    text, reason = ask(core, codec, json_schema_grammar('{"type": "integer", "minimum": 100}'), logit_bias=bias)
    assert reason == "stop" and int(text) >= 100 and len(text) == 3
    assert core.tokens("r")[-1] in codec.stop_ids


def test_tokens_that_run_out_end_an_unfinished_answer_with_length(core: Harness, codec: Codec):
    text, reason = ask(
        core, codec, json_schema_grammar('{"const": "a long constant that takes many tokens"}'), max_tokens=5
    )
    assert reason == "length" and '"a long constant that takes many tokens"'.startswith(text)
    assert len(core.tokens("r")) == 5


def test_the_last_token_allowed_may_complete_the_answer(core: Harness, codec: Codec):
    grammar = json_schema_grammar('{"const": [1, 2]}')
    ask(core, codec, grammar)
    count = len(core.tokens("r"))
    text, reason = ask(core, codec, grammar, "again", max_tokens=count)
    assert (json.loads(text), reason) == ([1, 2], "stop")


def test_whitespace_between_tokens_is_short_however_much_a_model_likes_it(core: Harness, codec: Codec):
    spaces = {codec.encode_text(text)[0]: 50.0 for text in (" ", "\n", "\t")}
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "array", "maxItems": 2, "items": {"enum": [1]}}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    text, reason = ask(core, codec, json_schema_grammar(json.dumps(schema)), logit_bias=spaces)
    jsonschema.validate(json.loads(text), schema)
    assert reason == "stop" and re.search(r"\s", text) and not re.search(r" {17}|\n\s*\n|\t| \n", text)


@pytest.mark.parametrize("indent", [None, 2, 4])
def test_json_may_be_laid_out_as_models_are_used_to(tiny_base: Path, indent: int | None):
    grammars = Grammars(tiny_base, 512)
    value = {"a": 1, "b": [True, {"c": "d"}]}
    schema = {"properties": {"a": {"type": "integer"}, "b": {"items": {}}}}
    matcher = grammars.open(json_schema_grammar(json.dumps(schema)), frozenset({2}))
    for token in Codec.load(tiny_base).encode_text(json.dumps(value, indent=indent)):
        while not matcher.is_ready:
            time.sleep(0.001)
        assert not matcher.forbidden_V()[token]
        matcher.advance(token)
    assert matcher.is_complete
    grammars.close()


def test_any_json_object_is_an_object(core: Harness, codec: Codec):
    quote = {codec.encode_text(text)[0]: 8.0 for text in ('"', "}")}
    for seed in range(5):
        text, reason = ask(core, codec, json_object_grammar(), f"r{seed}", seed=seed, logit_bias=quote)
        assert text.startswith("{") and (reason == "length" or isinstance(json.loads(text), dict))


def test_rows_with_and_without_grammars_share_steps_and_answer_as_alone(core: Harness, codec: Codec):
    grammars = {
        "a": json_schema_grammar('{"type": "string", "maxLength": 9}'),
        "b": json_schema_grammar('{"type": "array", "items": {"enum": [1, 22, 333]}, "maxItems": 6}'),
        "c": None,
    }
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=5, presence_penalty=0.5, top_p=0.95, logprobs=2)

    def add(id: str) -> None:
        core.core.add(request(id, PROMPT, params=params, stop_ids=codec.stop_ids, grammar=grammars[id]))

    for id in grammars:
        add(id)
    core.run()
    together = {id: core.tokens(id) for id in grammars}
    core.outputs.clear()
    for id in grammars:
        add(id)
        core.run()
    assert {id: core.tokens(id) for id in grammars} == together
    assert json.loads(codec.decode(together["a"])) is not None and not core.errors


def test_log_probabilities_are_those_of_the_model_without_the_grammar(core: Harness, codec: Codec):
    ask(core, codec, json_schema_grammar('{"const": "x"}'), temperature=0.0, logprobs=3)
    token = core.outputs["r"][0].tokens[0]
    assert token.top[0][1] > token.logprob and token.token_id not in [id for id, _ in token.top]


def test_a_grammar_that_is_none_fails_its_own_request_only(core: Harness, codec: Codec):
    core.core.add(request("bad", PROMPT, grammar='{"grammars": [{"json_schema": {"type": "foo"}}]}'))
    core.core.add(request("good", PROMPT))
    core.run()
    assert isinstance(core.errors["bad"], InvalidRequest) and "foo" in core.errors["bad"].message
    assert len(core.tokens("good")) == 8


def test_an_answer_that_meets_a_limit_of_its_grammar_fails_alone(core: Harness, codec: Codec):
    rules = [f'b{i}: "x" | b{i} b{i}' for i in range(100)]
    ambiguous = "\n".join([f"start: {' | '.join(f'b{i}' for i in range(100))}", *rules])
    params = SamplingParams(max_tokens=200, temperature=0.0)
    core.core.add(
        request("hard", PROMPT, params=params, grammar=json.dumps({"grammars": [{"lark_grammar": ambiguous}]}))
    )
    core.core.add(request("good", PROMPT))
    core.run()
    assert len(core.tokens("good")) == 8
    error = core.errors["hard"]
    assert isinstance(error, TuneloomError) and error.code == "grammar_error" and error.status == 500
    assert set(codec.decode(core.tokens("hard"))) == {"x"}


def test_preempted_answers_go_on_where_their_grammar_and_their_chance_stood(open_core: OpenCore, codec: Codec):
    grammar = json_schema_grammar('{"type": "array", "items": {"type": "integer", "maximum": 99}, "minItems": 30}')
    params = SamplingParams(max_tokens=60, temperature=1.0, frequency_penalty=0.2, repetition_penalty=1.1)

    def answers(**settings: Any) -> tuple[dict[str, list[int]], int]:
        core = open_core(prefix_cache_bytes=0, **settings)
        for i in range(6):
            some = replace(params, seed=i)
            core.core.add(request(f"r{i}", PROMPT, params=some, grammar=grammar, stop_ids=codec.stop_ids))
        core.run()
        assert not core.errors
        return {f"r{i}": core.tokens(f"r{i}") for i in range(6)}, core.core.stats().preemptions

    roomy, none = answers()
    tight, some = answers(kv_cache_tokens=160, max_length=128)
    assert (none, some > 0) == (0, True)
    assert tight == roomy
    assert all(codec.decode(tokens).startswith("[") for tokens in tight.values())
