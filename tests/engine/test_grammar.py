import json

import pytest

from tuneloom.engine.grammar import check_grammar, json_object_grammar, json_schema_grammar
from tuneloom.errors import InvalidRequest


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ('{"not": {"type": "string"}}', "`not`"),
        ('{"type": "array", "items": {"uniqueItems": true, "type": "array"}}', "`uniqueItems`"),
        ('{"type": "foo"}', "foo"),
        ('{"$ref": "https://example.com/schema"}', "https://example.com/schema"),
        ('{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ('{"type": "string", "minLength": 5, "maxLength": 2}', "minLength (5)"),
        ('{"type": "object"', "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"items":' * 5000 + "{}" + "}" * 5000, "nested too deeply"),
        ('{"items":' * 200 + "{}" + "}" * 200, "nested too deeply"),
        (json.dumps({"description": "x" * 300_000}), "bytes"),
        # Intersections of many patterns have exponentially many states.
        (json.dumps({"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(24)]}), "complex"),
        ('{"type": "object", "x-guidance": {"lenient": true}, "not": {}}', "`not`"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_reason(schema: str, says: str):
    with pytest.raises(InvalidRequest, match="`answer_form`") as caught:
        json_schema_grammar(schema, param="answer_form")
    assert says in caught.value.message and caught.value.param == "answer_form"
    assert len(caught.value.message) < 500


def test_plain_schemas_are_grammars():
    for schema in ({"type": "object"}, {}, {"type": "string", "pattern": "^[a-c]{2}$"}, {"enum": ["a", 1, None]}):
        check_grammar(json_schema_grammar(json.dumps(schema)))
    check_grammar(json_object_grammar())


def test_alternatives_that_overlap_are_refused_in_the_words_of_schemas() -> None:
    schema = json.dumps({"oneOf": [{"type": "number"}, {"type": "integer"}]})
    with pytest.raises(InvalidRequest, match="alternatives of a `oneOf` are not told apart"):
        json_schema_grammar(schema)
