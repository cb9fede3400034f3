"""JSON Schemas for an answer: those that can be enforced pass; for all others an error
says where and why."""

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie.errors import InvalidRequestError
from orion_oie.guardrails import json_schema
from orion_oie.guardrails.json_schema import check_json_schema

INTEGER = {"type": "integer"}
TEXT = {"type": "string"}
NUMBER = {"type": "number"}


def refusal(schema: object) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        check_json_schema(schema)
    return caught.value


def verdict(schema: object) -> str | None:
    """The message of the check; any other error fails the test."""
    try:
        check_json_schema(schema)
    except InvalidRequestError as error:
        return error.message
    return None


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def test_what_describes_is_free() -> None:
    """Keywords that only describe may stand anywhere; at the top, so may those of the document."""
    check_json_schema(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$id": "https://example.org/a",
            "$comment": "c",
            "title": "T",
            **record(
                a={**TEXT, "title": "A", "description": "d", "default": "x", "examples": ["y"]},
                b={"$ref": "#/$defs/B", "description": "d", "deprecated": True, "readOnly": True},
                c={"oneOf": [INTEGER], "discriminator": {"propertyName": "x"}, "writeOnly": True},
            ),
            "$defs": {"B": INTEGER},
            "definitions": {"C": TEXT},
        }
    )


UNSUPPORTED = {
    "not": {},
    "if": {},
    "then": {},
    "else": {},
    "multipleOf": 2,
    "pattern": "^a$",
    "patternProperties": {},
    "contains": {},
    "minContains": 1,
    "dependentRequired": {},
    "dependentSchemas": {},
    "unevaluatedProperties": False,
    "unevaluatedItems": False,
    "contentMediaType": "text/html",
    "additionalItems": False,
    "$dynamicRef": "#a",
    "$anchor": "a",
    "nullable": True,
    "x-anything": 1,
}


@pytest.mark.parametrize("keyword", UNSUPPORTED)
@pytest.mark.parametrize(
    "beside", [{"type": ["object", "array", "string", "number"]}, {}, {"anyOf": [{}]}]
)
def test_what_is_not_enforced_is_refused(keyword: str, beside: dict[str, Any]) -> None:
    """Keywords that answers could not be held to are errors anywhere, unknown ones too."""
    error = refusal(record(a={**beside, keyword: UNSUPPORTED[keyword]}))
    assert error.details == {"path": "/properties/a", "keyword": keyword}
    assert error.message == (
        f"json_schema at /properties/a: '{keyword}' is not supported: answers could not be held "
        "to it"
    )


# Each with the place and the keyword that the error names, and a part of its words.
REFUSED: list[tuple[object, str, str, str]] = [
    # not a schema
    (record(a=1), "/properties/a", "properties", "must be a schema"),
    (record(a=False), "/properties/a", "properties", "allows nothing"),
    ({**record(), "properties": []}, "", "properties", "must be an object"),
    ({"anyOf": []}, "", "anyOf", "must be a list of 1 to"),
    ({"anyOf": {}}, "", "anyOf", "must be a list"),
    ({"anyOf": [{}, 3]}, "/anyOf/1", "anyOf", "must be a schema"),
    ({"oneOf": [TEXT] * 101}, "", "oneOf", "1 to 100 schemas"),
    ({"allOf": [TEXT, TEXT]}, "", "allOf", "merge them"),
    ({"type": "text"}, "", "type", "must be of null, boolean"),
    ({"type": []}, "", "type", "must be of"),
    ({"type": ["null", "null"]}, "", "type", "must be of"),
    ({"type": [["null"]]}, "", "type", "must be of"),
    ({"title": 1}, "", "title", "must be a str"),
    ({"deprecated": "no"}, "", "deprecated", "must be a bool"),
    ({"$defs": []}, "", "$defs", "must be a dict"),
    ({"$defs": {"a/b": {"not": {}}}}, "/$defs/a/b", "not", "is not supported"),
    (record(**{"a/~b": {"not": {}}}), "/properties/a~1~0b", "not", "is not supported"),
    ({**TEXT, "$defs": {"a": 1}}, "/$defs/a", "$ref", "must be a schema"),
    (record(a={"$id": "b"}), "/properties/a", "$id", "at the top"),
    (record(a={"$defs": {}}), "/properties/a", "$defs", "at the top"),
    # not JSON
    ({"default": object()}, "/default", "default", "no value of JSON"),
    ({"default": (1,)}, "/default", "default", "no value of JSON"),
    ({"enum": [1, float("nan")]}, "/enum/1", "1", "no value of JSON"),
    ({"const": 10**100}, "/const", "const", "no value of JSON"),
    ({"const": "a\ud800"}, "/const", "const", "unpaired surrogate"),
    ({"default": {1: 2}}, "/default", "default", "no value of JSON, but 1"),
    # keywords in the wrong company
    ({"minimum": 1}, "", "minimum", 'needs "type": "number"'),
    ({**TEXT, "minimum": 1}, "", "minimum", 'needs "type": "number"'),
    ({"properties": {}}, "", "properties", 'needs "type": "object"'),
    ({"$ref": "#", "type": "object"}, "", "type", "cannot stand beside '$ref'"),
    ({"anyOf": [{}], "minimum": 1}, "", "minimum", "cannot stand beside 'anyOf'"),
    ({"anyOf": [{}], "oneOf": [{}]}, "", "oneOf", "cannot stand beside 'anyOf'"),
    ({"enum": ["a"], "maxLength": 1}, "", "maxLength", "cannot stand beside 'enum'"),
    ({**INTEGER, "minimum": 1, "exclusiveMinimum": 0}, "", "exclusiveMinimum", "beside 'minimum'"),
    ({**TEXT, "format": "date", "minLength": 1}, "", "minLength", "beside 'format'"),
    ({**record(), "minProperties": 1}, "", "minProperties", "beside 'properties'"),
    # constants
    ({"enum": []}, "", "enum", "1 to 2000 values"),
    ({"enum": "ab"}, "", "enum", "must be a list"),
    ({"enum": ["a", 1], "type": "string"}, "", "enum", "has 1, which is no string"),
    ({"const": True, "type": "integer"}, "", "const", "has True, which is no integer"),
    ({"const": 1.5, "type": ["integer", "null"]}, "", "const", "is no integer or null"),
    # numbers and counts
    ({**INTEGER, "minimum": "1"}, "", "minimum", "must be a number"),
    ({**INTEGER, "minimum": True}, "", "minimum", "must be a number"),
    ({**INTEGER, "maximum": 2**64 + 1}, "", "maximum", "must be within"),
    ({**INTEGER, "minimum": 3, "maximum": 2}, "", "maximum", "leaves nothing"),
    ({**INTEGER, "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "", "exclusiveMaximum", "leaves"),
    ({**INTEGER, "minimum": 1.2, "maximum": 1.8}, "", "maximum", "leaves nothing"),
    ({**NUMBER, "minimum": 1, "exclusiveMaximum": 1}, "", "exclusiveMaximum", "leaves nothing"),
    ({**NUMBER, "minimum": 1e9}, "", "minimum", "supported below 1000000000"),
    ({**NUMBER, "minimum": 1e-6}, "", "minimum", "at most 5 decimals"),
    ({"type": ["integer", "number"], "maximum": 1e12}, "", "maximum", "supported below"),
    ({**TEXT, "minLength": -1}, "", "minLength", "must be an integer from 0"),
    ({**TEXT, "maxLength": 1.5}, "", "maxLength", "must be an integer"),
    ({**TEXT, "maxLength": True}, "", "maxLength", "must be an integer"),
    ({**TEXT, "maxLength": 50_001}, "", "maxLength", "to 50000, got 50001"),
    ({**TEXT, "minLength": 2, "maxLength": 1}, "", "maxLength", "is less than 'minLength'"),
    ({**TEXT, "format": "uri"}, "", "format", "'uri' is not supported; known are binary, date"),
    ({**TEXT, "format": 1}, "", "format", "1 is not supported"),
    # arrays
    ({"type": "array", "uniqueItems": True}, "", "uniqueItems", "is not supported"),
    ({"type": "array", "items": False}, "/items", "items", "allows nothing"),
    ({"type": "array", "items": [TEXT]}, "/items", "items", "must be a schema"),
    ({"type": "array", "prefixItems": []}, "", "prefixItems", "not empty"),
    ({"type": "array", "prefixItems": [{}, {}], "maxItems": 1}, "", "maxItems", "'prefixItems'"),
    ({"type": "array", "prefixItems": [{}], "minItems": 2}, "", "minItems", "without 'items'"),
    # objects
    ({**record(), "required": ["a"]}, "", "required", "names 'a', which is not in"),
    ({**record(a={}), "required": ["a", "a"]}, "", "required", "different names"),
    ({**record(a={}), "required": "a"}, "", "required", "must be a list"),
    ({**record(**{f"p{n}": {} for n in range(257)})}, "", "properties", "up to 256"),
    ({"type": "object", "minProperties": 2}, "", "minProperties", "up to 1"),
    (
        {"type": "object", "minProperties": 1, "additionalProperties": False},
        "",
        "minProperties",
        "where properties are allowed",
    ),
    ({"type": "object", "propertyNames": INTEGER}, "", "propertyNames", "strings only"),
    ({"type": "object", "propertyNames": {}}, "", "propertyNames", "strings only"),
    (
        {**record(a={}), "additionalProperties": {"not": {}}},
        "/additionalProperties",
        "not",
        "is not supported",
    ),
    # references
    ({"$ref": "https://example.org/x"}, "", "$ref", "must be '#' or '#/$defs/NAME'"),
    ({"$ref": "#/$defs/a"}, "", "$ref", "must be '#'"),
    ({"$ref": 1}, "", "$ref", "must be '#'"),
    ({"$ref": "#/$defs/a%25", "$defs": {"a%25": {}}}, "", "$ref", "must be '#'"),
    ({"$ref": "#/$defs/a/b", "$defs": {"a/b": {}}}, "", "$ref", "must be '#'"),
    (record(a={"$ref": "#/properties/b"}, b={}), "/properties/a", "$ref", "must be '#'"),
    ({"$ref": "#"}, "", "$ref", "leads back to itself"),
    ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "", "$ref", "leads back to itself"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {**record(b={"$ref": "#"}), "required": ["b"]}}},
     "", "$ref", "leads to no value within 16"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "", "$ref", "leads to no value"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "path", "keyword", "words"), REFUSED)
def test_a_refusal_names_place_and_keyword(
    schema: object, path: str, keyword: str, words: str
) -> None:
    """A malformed, contradictory or unenforceable schema is refused, with place and reason."""
    error = refusal(schema)
    assert error.details == {"path": path, "keyword": keyword}
    assert error.message.startswith(f"json_schema at {path}: '" if path else "json_schema: '")
    assert words in error.message


def tagged(**properties: Any) -> dict[str, Any]:
    return {**record(**properties), "required": list(properties)}


@pytest.mark.parametrize(
    "branches",
    [
        [TEXT, INTEGER, {"type": ["null", "boolean"]}],
        [{"const": 1}, {"const": True}, {"enum": [2, "a"]}, {"const": [1]}],
        [TEXT, {"anyOf": [INTEGER, {"const": None}]}],
        [tagged(k={"const": "a"}), tagged(k={"const": "b"}), tagged(k={"enum": ["c", "d"]})],
        [record(k={"const": "a"}), tagged(k={"$ref": "#/$defs/b"})],
        [tagged(k={"const": 1}), tagged(k={"const": True})],
    ],
)
def test_one_of_with_branches_apart(branches: list[Any]) -> None:
    """Branches differ by type, by constant, or by a property that is always there."""
    check_json_schema({"oneOf": branches, "$defs": {"b": {"enum": ["b", 1]}}})


@pytest.mark.parametrize(
    "branches",
    [
        [INTEGER, NUMBER],
        [INTEGER, {"const": 1.0}],
        [{"const": 1}, {"const": 1.0}],
        [{"const": {"a": [1]}}, {"const": {"a": [1.0]}}],
        [TEXT, {"const": "a"}],
        [TEXT, {"type": ["null", "string"]}],
        [TEXT, {"anyOf": [INTEGER, {"$ref": "#/$defs/b"}]}],
        [record(k={"const": "a"}), record(k={"enum": ["b"]})],
        [tagged(k={"const": "a"}), tagged(k={"enum": ["a", "b"]})],
        [tagged(k={"const": "a"}), tagged(k=TEXT)],
        [tagged(a={"const": 1}), tagged(b={"const": 2})],
        [{"type": ["object", "null"]}, {"type": "null"}],
    ],
)
def test_one_of_with_branches_that_may_meet(branches: list[Any]) -> None:
    """Two branches that might match one value are named: exactly one could not be promised."""
    union = {"oneOf": [{"type": "boolean"}, *branches]}
    error = refusal({**record(a=union), "$defs": {"b": TEXT}})
    assert error.details == {"path": "/properties/a", "keyword": "oneOf"}
    assert "branches 1 and 2 that might both match" in error.message


def test_a_schema_is_a_dict() -> None:
    """Other things are refused by their type."""
    assert refusal("{}").message == "json_schema must be a dict, got str"
    assert refusal(True).message == "json_schema must be a dict, got bool"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_schema_has_a_size_and_a_depth() -> None:
    """Schemas that are too large, too deep or contain themselves are refused, and at once."""
    check_json_schema(nested(json_schema.MAX_SCHEMA_DEPTH))
    assert "nested more than 64 deep" in refusal(nested(json_schema.MAX_SCHEMA_DEPTH + 1)).message
    assert "more than 100000 characters" in refusal({"title": "x" * 100_001}).message
    assert "more than 100000 characters" in refusal({"x" * 100_001: {}}).message
    many: list[Any] = []
    for _ in range(60):
        many = [many, many]
    assert "more than 100000 characters" in refusal({"default": many}).message
    itself: dict[str, Any] = {}
    itself["default"] = itself
    assert "nested more than" in refusal(itself).message


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/d0", "$defs": {
            f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(2000)
        } | {"d2000": {}}},
        {"$ref": "#/$defs/d0", "$defs": {f"d{n}": {"anyOf": [
            {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"const": n}]}, {"$ref": f"#/$defs/d{n + 1}"}
        ]} for n in range(400)} | {"d400": {}}},
        {"oneOf": [{"anyOf": [{"$ref": f"#/$defs/d{n}"}] * 90} for n in range(9)],
         "$defs": {f"d{n}": tagged(k={"const": n}) for n in range(9)}},
        {"x" * 50_000: [[0] * 20_000]},
    ],
    ids=["chain", "mesh", "unions", "names"],
)  # fmt: skip
def test_no_schema_takes_long_to_check(schema: dict[str, Any]) -> None:
    """The check of an input of the largest allowed size takes a bounded time."""
    started = time.perf_counter()
    verdict(schema)
    assert time.perf_counter() - started < 2


def known_keywords() -> set[str]:
    """The keywords that the check knows: random schemas should be made of them."""
    return set(json_schema._FORMS).union(*json_schema._KEYWORDS.values())


KEYWORDS = sorted(known_keywords() | {"type", "$defs", "title", "not", "pattern"})
NAMES = st.sampled_from(
    ["null", "integer", "number", "string", "array", "object", "a", "date", "#"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | NAMES | st.text(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYWORDS) | st.sampled_from("ab"), inner, max_size=4)
    ),
)
DICTS = st.dictionaries(st.sampled_from(KEYWORDS), JSON, max_size=4)


@settings(max_examples=300, deadline=None)
@given(schema=DICTS)
def test_nonsense_is_refused_in_words(schema: dict[str, Any]) -> None:
    """Whatever stands where, the check ends with a verdict; what it accepts is a JSON Schema."""
    complaint = verdict(schema)
    if complaint is not None:
        assert complaint.startswith("json_schema")
        return
    jsonschema.Draft202012Validator.check_schema(schema)
    json.dumps(schema, allow_nan=False)
