"""Structured answers on a tiny vocabulary: whatever tokens are drawn under the grammar of a schema,
an answer that ends is JSON that validates; what should be sayable is; nothing native falls over."""

import enum
import json
import random
import threading
from collections.abc import Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema
import llama_cpp as lc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field
from tiny import write_tiny_llama

from orion_oie.backends.llama.worker import (
    grammar,
    schema_grammar,
)
from orion_oie.backends.llama.worker.grammar import parse_grammar
from orion_oie.backends.llama.worker.schema_grammar import gbnf_of_schema
from orion_oie.errors import InvalidRequestError
from orion_oie.guardrails import json_schema
from orion_oie.guardrails.gbnf import check_grammar
from orion_oie.guardrails.json_schema import check_json_schema
from orion_oie.guardrails.sanitize import clean

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
LONGEST = 1500


class Vocabulary:
    """The tokens of a model that is loaded without its weights."""

    def __init__(self, path: Path) -> None:
        params = lc.llama_model_default_params()
        params.vocab_only = True
        self._model = lc.llama_model_load_from_file(str(path).encode(), params)
        self.handle = lc.llama_model_get_vocab(self._model)
        self.size = lc.llama_vocab_n_tokens(self.handle)
        self.pieces = [self._piece(token) for token in range(self.size)]
        self.ends = {t for t in range(self.size) if lc.llama_vocab_is_eog(self.handle, t)}
        self.table = np.zeros(self.size, CANDIDATE)
        self.closers = {self.pieces.index(piece) for piece in (b'"', b"}", b"]")} | self.ends

    def _piece(self, token: int) -> bytes:
        buffer = lc.ctypes.create_string_buffer(64)
        length = lc.llama_token_to_piece(self.handle, token, buffer, 64, 0, False)
        return buffer.raw[:length]


class Follower:
    """One answer under a grammar."""

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        self._vocabulary = vocabulary
        self._sampler = parse_grammar(vocabulary.handle, text)
        self._native = lc.llama_token_data_array()
        table = vocabulary.table
        self._native.data = lc.ctypes.cast(table.ctypes.data, lc.llama_token_data_p)

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_: object) -> None:
        lc.llama_sampler_free(self._sampler)

    def allowed(self) -> list[int]:
        """The tokens that may come next."""
        table = self._vocabulary.table
        table["id"] = np.arange(len(table))
        table["logit"] = 0.0
        self._apply(len(table))
        return table["id"][np.isfinite(table["logit"])].tolist()

    def allows(self, token: int) -> bool:
        """Whether one token may come next."""
        self._vocabulary.table[0] = (token, 0.0, 0.0)
        self._apply(1)
        return bool(np.isfinite(self._vocabulary.table["logit"][0]))

    def accept(self, token: int) -> None:
        lc.llama_sampler_accept(self._sampler, token)

    def _apply(self, size: int) -> None:
        self._native.size, self._native.selected, self._native.sorted = size, -1, False
        lc.llama_sampler_apply(self._sampler, lc.ctypes.byref(self._native))

    def begins(self, text: str) -> bool:
        """Whether an answer may go on with the text, byte by byte."""
        for byte in text.encode():
            token = self._vocabulary.pieces.index(bytes([byte]))
            if not self.allows(token):
                return False
            self.accept(token)
        return True

    def says(self, text: str) -> bool:
        """Whether the text is a whole answer; one that ends with "…" need only be a beginning."""
        if text.endswith("…"):
            return self.begins(text[:-1])
        return self.begins(text) and any(map(self.allows, self._vocabulary.ends))

    def draw(self, seed: int, closing: float = 0.25) -> bytes | None:
        """A random answer; None if it does not end in time. Closing marks are favoured a bit."""
        chance, said = random.Random(seed), b""
        for _ in range(LONGEST):
            allowed = self.allowed()
            assert allowed, said
            closers = [token for token in allowed if token in self._vocabulary.closers]
            is_closing = closers and chance.random() < closing
            token = chance.choice(closers if is_closing else allowed)
            if token in self._vocabulary.ends:
                return said
            self.accept(token)
            said += self._vocabulary.pieces[token]
        return None


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(write_tiny_llama(tmp_path_factory.mktemp("grammar") / "tiny.gguf"))


def grammar_of(schema: dict[str, Any]) -> str:
    check_json_schema(schema)
    return gbnf_of_schema(schema)


def check_answers(vocabulary: Vocabulary, schema: dict[str, Any], seeds: Iterator[int]) -> int:
    """Draws answers; how many ended. Each that did parses, validates and stays as it is."""
    text, ended = grammar_of(schema), 0
    validator = jsonschema.Draft202012Validator(schema)
    for seed in seeds:
        with Follower(vocabulary, text) as follower:
            said = follower.draw(seed)
        if said is not None:
            ended += 1
            answer = said.decode()
            assert clean(answer) == (answer, 0)
            validator.validate(json.loads(answer))
    return ended


# -- schemas, with texts that can be said under their grammar and texts that cannot


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Address(BaseModel):
    street: Annotated[str, Field(min_length=1, max_length=12)]
    number: Annotated[int, Field(ge=1, le=999)]
    city: str = "Rome"


class Person(BaseModel):
    """A model with one of each."""

    model_config = ConfigDict(extra="forbid")

    name: str
    age: Annotated[int, Field(ge=0, lt=150)]
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    is_member: bool
    color: Color
    mood: Literal["good", "bad"] | None = None
    addresses: list[Address] = Field(max_length=2)
    scores: dict[str, float]
    extra: int | str | None


class Node(BaseModel):
    value: int
    children: "list[Node]" = []


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: Annotated[int, Field(ge=1, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    tricks: list[str] = []


class Zoo(BaseModel):
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]]
    favourite: Cat | Dog | None


class Moment(BaseModel):
    day: date
    at: time
    stamp: datetime
    ident: UUID
    place: tuple[float, float]
    tags: tuple[str, ...]
    levels: dict[Literal["low", "high"], int]
    anything: Any


TEXT = {"type": "string"}
INTEGER = {"type": "integer"}
EMAIL = {"type": "string", "format": "email"}
DATE = {"type": "string", "format": "date"}
TREE = {"type": "object", "properties": {"next": {"$ref": "#"}, "of": {"$ref": "#/$defs/x"}}}
EITHER = {"oneOf": [{"type": "string", "maxLength": 1}, {"type": ["integer", "null"]}]}
TAGGED = {
    "oneOf": [
        {"type": "object", "properties": {"a": {"const": 1}, "b": INTEGER}},
        {"type": "object", "properties": {"b": TEXT, "a": {"enum": [2, 3]}}, "required": ["a"]},
    ]
}

SCHEMAS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "anything": ({}, ['{"a":[1,null,{}]}', "[]", "-0.5e-3", '"\\u00e9"'], ["", "{", "01", "nul"]),
    "null": ({"type": "null"}, ["null"], ["nil"]),
    "boolean": ({"type": "boolean"}, ["true", "false"], ["True", "1"]),
    "integer": (INTEGER, ["0", "-7", "123456789012345678"], ["-0", "01", "1.0", "+1", "1" * 19]),
    "positive": ({**INTEGER, "minimum": 1}, ["1", "10", "9" * 18], ["0", "-1"]),
    "negative": ({**INTEGER, "exclusiveMaximum": 0}, ["-1", "-10"], ["0", "1", "-0"]),
    "range": ({**INTEGER, "minimum": -12, "maximum": 345}, ["-12", "0", "345"], ["-13", "346"]),
    "uneven": ({**INTEGER, "minimum": 0.5, "exclusiveMaximum": 3.0}, ["1", "2"], ["0", "3"]),
    "wide": ({**INTEGER, "minimum": 0, "maximum": 2**64}, [str(2**64)], [str(2**64 + 1)]),
    "number": ({"type": "number"}, ["0", "-1.50", "1e9", "2E-05"], [".5", "1.", "1e", "1e999"]),
    "share": ({"type": "number", "minimum": 0, "maximum": 1}, ["0", "0.5", "1", "1.00"], ["1.01"]),
    "strict": (
        {"type": "number", "exclusiveMinimum": -0.5, "exclusiveMaximum": 2.25},
        ["-0.49", "0", "2.2499", "1"],
        ["-0.5", "-0.50", "2.25", "3", "-1"],
    ),
    "above": ({"type": "number", "minimum": 2.5}, ["2.5", "3", "123456789012"], ["2.4", "-3"]),
    "below": ({"type": "number", "maximum": -2.5}, ["-2.5", "-12345678901.5"], ["-2.4", "2.5"]),
    "point": ({"type": "number", "minimum": 1.5, "maximum": 1.5}, ["1.5", "1.500"], ["1.51"]),
    "string": (
        TEXT,
        ['""', '"é 漢 😀"', '"\\" \\\\ \\n \\u0041"', '"\\ud83d\\ude00"'],
        ['"\n"', '"\\x"', '"\\ud800"', '"\\ude00\\ud83d"', '"\\ud83d\\u0041"', '"\x7f"', '"\x9b"'],
    ),
    "short": ({**TEXT, "minLength": 2, "maxLength": 3}, ['"ab"', '"é😀漢"'], ['"a"', '"abcd"']),
    "pair": ({**TEXT, "maxLength": 1}, ['"\\ud83d\\ude00"', '""'], ['"\\ud83d\\ude00a"']),
    "empty": ({**TEXT, "maxLength": 0}, ['""'], ['"a"']),
    "long": (
        {**TEXT, "minLength": 130, "maxLength": 5000},
        [f'"{"a" * length}"' for length in (130, 191, 192, 194, 3000, 5000)],
        [f'"{"a" * length}"' for length in (129, 5001)],
    ),
    "date": (
        DATE,
        ['"2024-02-29"', '"2000-02-29"'],
        ['"2023-02-29"', '"1900-02-29"', '"2024-13-01"'],
    ),
    "time": ({**TEXT, "format": "time"}, ['"23:59:59Z"', '"00:00:00.5+02:00"'], ['"24:00:00Z"']),
    "uuid": ({**TEXT, "format": "uuid"}, ['"01234567-89ab-cdef-0123-456789ABCDEF"'], ['"0"']),
    "email": (EMAIL, ['"a.b+c@d-e.example.org"'], ['"a@b"', '"a..b@c.de"', '"@c.de"']),
    "password": ({**TEXT, "format": "password", "minLength": 1}, ['"a"'], ['""']),
    "const": ({"const": {"a": [1, "é\n"]}}, ['{"a": [1, "é\\n"]}'], ['{"a": [1]}']),
    "enum": ({"enum": ["a", "ab", 1, None, 'q"\\']}, ['"ab"', "1", '"q\\"\\\\"'], ['"b"', "12"]),
    "hidden": ({"enum": ["\x9b\x7f\x00"]}, ['"\\u009b\\u007f\\u0000"'], ['"\x9b\x7f\\u0000"']),
    "types": ({"type": ["string", "null"], "maxLength": 1}, ['"a"', "null"], ['"ab"', "1"]),
    "array": ({"type": "array"}, ["[]", '[1, "a",[]]'], ["[1,]", "[,]", "[1  ,2]"]),
    "items": (
        {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 3},
        ["[1,2]", "[1, 2, 3]"],
        ["[]", "[1]", "[1,2,3,4]"],
    ),
    "one item": ({"type": "array", "items": INTEGER, "maxItems": 1}, ["[]", "[1]"], ["[1,2]"]),
    "no item": ({"type": "array", "items": INTEGER, "maxItems": 0}, ["[]"], ["[1]"]),
    "tuple": (
        {"type": "array", "prefixItems": [INTEGER, TEXT], "items": {"type": "null"}, "maxItems": 3},
        ['[1,"a"]', '[1, "a", null]'],
        ["[1]", '["a",1]', '[1,"a",null,null]'],
    ),
    "closed tuple": ({"type": "array", "prefixItems": [{}], "items": False}, ["[1]"], ["[]"]),
    "open object": ({"type": "object"}, ["{}", '{"a":{"b": [1]}, "a":2}'], ["{1:2}", '{"a"}']),
    "record": (
        {"type": "object", "properties": {"a": INTEGER, "b": TEXT, "c": {}}, "required": ["b"]},
        ['{"b":""}', '{"a":1, "b": ""}', '{"b":"","c":[]}', '{"a":1,"b":"","c":null}'],
        ["{}", '{"b":1}', '{"b":"","a":1}', '{"b":"","d":1}', '{,"b":""}', '{"b":"",}'],
    ),
    "all optional": (
        {"type": "object", "properties": {"a": INTEGER, "b": INTEGER, "c": INTEGER}},
        ["{}", '{"a":1}', '{"c":1}', '{"b":1, "c":2}', '{"a":1,"b":1,"c":1}'],
        ['{"a":1,}', '{"c":1,"a":1}', "{,}"],
    ),
    "closed": ({"type": "object", "additionalProperties": False}, ["{}"], ['{"a":1}']),
    "no properties": ({"type": "object", "properties": {}}, ["{}"], ['{"a":1}']),
    "strange names": (
        {"type": "object", "properties": {'"\\\n\x7f é': True}, "required": ['"\\\n\x7f é']},
        ['{"\\"\\\\\\n\\u007f é":1}'],
        ["{}"],
    ),
    "dict": (
        {"type": "object", "additionalProperties": INTEGER, "minProperties": 1, "maxProperties": 2},
        ['{"":1}', '{"a":1,"b":2}'],
        ["{}", '{"a":"b"}', '{"a":1,"b":2,"c":3}'],
    ),
    "names": (
        {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": INTEGER},
        ["{}", '{"y":1,"x":2}'],
        ['{"z":1}'],
    ),
    "anyOf": ({"anyOf": [INTEGER, {"anyOf": [TEXT, INTEGER]}]}, ["1", '"a"'], ["null"]),
    "oneOf": (EITHER, ['"a"', "1", "null"], ['"ab"']),
    "tagged": (
        TAGGED,
        ['{"a":1}', '{"a":1,"b":2}', '{"b":"", "a":3}'],
        ['{"b":1}', '{"a":2,"b":""}'],
    ),
    "allOf": ({"allOf": [{"$ref": "#/$defs/n"}], "$defs": {"n": INTEGER}}, ["1"], ["null"]),
    "tree": (
        {**TREE, "$defs": {"x": {"type": "array", "items": {"$ref": "#"}}}, "$id": "tree"},
        ["{}", '{"next":{"next":{}}}', '{"next":{"of":[{},{"of":[]}]}}'],
        ['{"next":1}'],
    ),
    "Person": (
        Person.model_json_schema(),
        [
            '{"name": "Ada", "age": 36, "share": 0.25, "is_member": true, "color": "red", '
            '"mood": null, "addresses": [{"street": "Via", "number": 7}], "scores": {"a": 1.5}, '
            '"extra": "x"}',
            '{"name":"","age":149,"is_member":false,"color":"blue","addresses":[],"scores":{},'
            '"extra":null}',
        ],
        ['{"name":"","age":150…', '{"name":"","is…', '{"name":"","age":1,"share":0,…'],
    ),
    "Node": (
        Node.model_json_schema(),
        ['{"value":1,"children":[{"value":2}]}'],
        ['{"children":[]}'],
    ),
    "Zoo": (
        Zoo.model_json_schema(),
        ['{"pets":[{"kind":"cat","lives":9},{"kind":"dog"}],"favourite":null}'],
        ['{"pets":[{"kind":"cat","tricks"…', '{"pets":[{"lives":9…'],
    ),
    "Moment": (
        Moment.model_json_schema(),
        [
            '{"day":"1999-12-31","at":"10:00:00Z","stamp":"2024-01-01T00:00:00+01:00","ident":'
            '"00000000-0000-0000-0000-000000000000","place":[1,2.5],"tags":["a"],"levels":'
            '{"low":1},"anything":{"a":[]}}'
        ],
        ['{"day":"1999-02-30…'],
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_that_ends_validates(name: str, vocabulary: Vocabulary) -> None:
    """Random tokens under the grammar make JSON that validates, and that nothing need clean."""
    seeds = range(12)
    assert check_answers(vocabulary, SCHEMAS[name][0], iter(seeds)) >= len(seeds) // 2


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_validates_can_be_said(name: str, vocabulary: Vocabulary) -> None:
    """Valid texts pass the grammar to their end; those that do not validate stop inside."""
    schema, said, unsaid = SCHEMAS[name]
    text = grammar_of(schema)
    for example in said:
        jsonschema.Draft202012Validator(schema).validate(json.loads(example))
        with Follower(vocabulary, text) as follower:
            assert follower.says(example), example
    for example in unsaid:
        with Follower(vocabulary, text) as follower:
            assert not follower.says(example), example


# -- schemas that nobody wrote

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-9, 9) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


def optional(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keywords)


def typed(kind: str, **keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return optional(**keywords).map(lambda given: {"type": kind, **given})


def between(low: str, high: str, numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(numbers, min_size=2, max_size=2).map(
        lambda pair: {low: min(pair), high: max(pair)}
    )


def ranges(kind: str, numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = (
        st.sampled_from(["minimum", "exclusiveMinimum"]),
        st.sampled_from(["maximum", "exclusiveMaximum"]),
    )
    pairs = st.tuples(*names).flatmap(lambda pair: between(*pair, numbers))
    halves = st.tuples(st.one_of(*names), numbers).map(lambda item: dict([item]))
    return (pairs | halves).map(lambda bounds: {"type": kind, **bounds})


LEAVES = st.one_of(
    st.just({}),
    st.sampled_from(["null", "boolean", "integer", "number", "string"]).map(lambda t: {"type": t}),
    ranges("integer", st.integers(-2000, 2000) | st.floats(-99, 99)),
    ranges("number", st.integers(-99, 99) | st.decimals(-99, 99, places=5).map(float)),
    between("minLength", "maxLength", st.integers(0, 90)).map(lambda b: {"type": "string", **b}),
    st.sampled_from(sorted(json_schema.FORMATS)).map(lambda f: {"type": "string", "format": f}),
    st.builds(lambda value: {"const": value}, VALUES),
    st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=4)),
    st.sampled_from(["#", "#/$defs/a"]).map(lambda ref: {"$ref": ref}),
)


@st.composite
def records(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(
        st.dictionaries(st.sampled_from("abcd") | st.text(max_size=3), inner, max_size=4)
    )
    required = (
        draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    )
    return {"type": "object", "properties": properties, "required": required}


def composed(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        records(inner),
        typed("object", additionalProperties=inner, minProperties=st.integers(0, 1)),
        between("minItems", "maxItems", st.integers(0, 3)).flatmap(
            lambda bounds: typed("array", items=inner).map(lambda one: {**one, **bounds})
        ),
        typed("array", prefixItems=some, items=st.just(False) | inner),
        some.map(lambda branches: {"anyOf": branches}),
        some.map(lambda branches: {"oneOf": branches}),
    )


SUBSCHEMAS = st.recursive(LEAVES, composed, max_leaves=6)


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(schema=SUBSCHEMAS, definition=SUBSCHEMAS)
def test_no_accepted_schema_is_broken(
    schema: dict[str, Any], definition: dict[str, Any], vocabulary: Vocabulary
) -> None:
    """A schema of any make is refused, or every answer that ends under its grammar validates."""
    schema = {**schema, "$defs": {"a": definition}}
    try:
        check_json_schema(schema)
    except InvalidRequestError:
        return
    jsonschema.Draft202012Validator.check_schema(schema)
    check_answers(vocabulary, schema, iter(range(4)))


# -- what JSON Schema does not say


@pytest.mark.parametrize("model", [Person, Node, Zoo, Moment])
def test_models_read_their_answers(model: type[BaseModel], vocabulary: Vocabulary) -> None:
    """What is generated for a pydantic model becomes an instance of it, dates and times too."""
    text = grammar_of(model.model_json_schema())
    for seed in range(10):
        with Follower(vocabulary, text) as follower:
            said = follower.draw(seed)
        if said is not None:
            model.model_validate_json(said)


@pytest.mark.parametrize("schema", [{}, {"type": "array", "items": {"$ref": "#"}}])
def test_nothing_nests_without_end(schema: dict[str, Any], vocabulary: Vocabulary) -> None:
    """However much a model likes '[', the values inside come to an end some levels down."""
    opening, depth = vocabulary.pieces.index(b"["), 0
    with Follower(vocabulary, grammar_of(schema)) as follower:
        while follower.allows(opening):
            follower.accept(opening)
            depth += 1
        assert abs(depth - json_schema.MAX_NESTED_REFS) <= 1
        assert follower.says("]" * depth)


def test_a_reference_is_followed_as_deep_as_promised(vocabulary: Vocabulary) -> None:
    """A chain of references passes the check if, and only if, a grammar can be written for it."""
    for length in (json_schema.MAX_NESTED_REFS, json_schema.MAX_NESTED_REFS + 1):
        definitions: dict[str, Any] = {
            f"d{index}": {
                "type": "array",
                "items": {"$ref": f"#/$defs/d{index + 1}"},
                "minItems": 1,
            }
            for index in range(1, length)
        }
        definitions[f"d{length}"] = {"const": 1}
        schema = {"$ref": "#/$defs/d1", "$defs": definitions}
        if length <= json_schema.MAX_NESTED_REFS:
            with Follower(vocabulary, grammar_of(schema)) as follower:
                assert follower.says("[" * (length - 1) + "1" + "]" * (length - 1))
        else:
            for refused in (check_json_schema, gbnf_of_schema):
                with pytest.raises(InvalidRequestError, match="nested"):
                    refused(schema)


def test_check_and_grammar_know_the_same() -> None:
    """The two halves, which may not import each other, agree on formats and depth."""
    assert schema_grammar.FORMATS == json_schema.FORMATS
    assert schema_grammar.NESTED_REFS == json_schema.MAX_NESTED_REFS


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "prefixItems": [
            {"type": "array", "items": {"const": n}, "maxItems": 50_000 - n} for n in range(200)
        ]},
        {"anyOf": [{"anyOf": [{"const": f"{a}-{b}"} for b in range(50)]} for a in range(50)]},
    ],
    ids=["length", "alternatives"],
)  # fmt: skip
def test_a_grammar_has_a_size(schema: dict[str, Any]) -> None:
    """A small schema can have a huge grammar: it is refused before llama.cpp sees it."""
    check_json_schema(schema)
    with pytest.raises(InvalidRequestError, match=r"too (large|many)"):
        gbnf_of_schema(schema)


# -- samplers


def test_control_tokens_are_no_text(vocabulary: Vocabulary) -> None:
    """The name of a control token is not taken for letters: an answer would not have them."""
    [control] = [
        t for t in range(vocabulary.size) if not vocabulary.pieces[t] if t not in vocabulary.ends
    ]
    with Follower(vocabulary, 'root ::= "<|im_start|>"') as follower:
        assert not follower.allows(control)
        assert follower.says("<|im_start|>")


@pytest.mark.parametrize("name", ["string", "short", "Person", "open object"])
def test_a_vocabulary_of_another_kind(name: str, tmp_path: Path) -> None:
    """SentencePiece has bytes, spaces and an unknown token of its own: answers are as valid."""
    vocabulary = Vocabulary(write_tiny_llama(tmp_path / "spm.gguf", vocab="spm"))
    assert check_answers(vocabulary, SCHEMAS[name][0], iter(range(10))) >= 5


@pytest.mark.parametrize("letters", ['[^"]', ".", r"[\u0080-\U0010FFFF]"])
def test_characters_are_whole(letters: str, vocabulary: Vocabulary) -> None:
    """Of single bytes, only such are left that make valid UTF-8 together."""
    for seed in range(40):
        with Follower(vocabulary, f'root ::= {letters}{{30}} "x"') as follower:
            said = follower.draw(seed)
        assert said is not None
        assert len(said.decode()) == 31


def test_what_llama_cpp_refuses_is_an_error(
    vocabulary: Vocabulary, capfd: pytest.CaptureFixture[str]
) -> None:
    """A grammar that only native code finds fault with is named as what it is."""
    text = 'root ::= (("a"{1,40} "b"){1,40} "c"){1,40}'
    check_grammar(text)
    with pytest.raises(InvalidRequestError, match="does not accept the grammar"):
        parse_grammar(vocabulary.handle, text)
    assert "repetition" in capfd.readouterr().err


def test_samplers_of_many_threads(vocabulary: Vocabulary) -> None:
    """Grammars are read on other threads while one is followed; nothing is left of them."""
    text = grammar_of(Person.model_json_schema())
    errors: list[BaseException] = []

    def make() -> None:
        try:
            for _ in range(20):
                lc.llama_sampler_free(parse_grammar(vocabulary.handle, text))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    drawn = check_answers(vocabulary, SCHEMAS["Node"][0], iter(range(10)))
    for thread in threads:
        thread.join()
    assert not errors
    assert drawn
    assert not guards_left()


def guards_left() -> int:
    """The number of parses that the module still guards: a leak would show in nothing else."""
    return len(grammar._guards)


def gbnf(chance: random.Random) -> str:
    """A random grammar of a few rules; most have some fault."""
    names = ["root", "a", "b", "c"]
    letters = ['"x"', '"xé"', '""', "[a-z]", '[^"]', "[^\\x00-\\x1Fé]", ".", "[ऀ-ॿ]", '"\\u00e9"']

    def sequence(depth: int) -> str:
        return " ".join(part(depth) for _ in range(chance.choice([0, 1, 1, 2, 3])))

    def part(depth: int) -> str:
        kind = chance.random()
        if kind < 0.2 and depth < 3:
            inner = f"({sequence(depth + 1)} | {sequence(depth + 1)})"
        else:
            inner = chance.choice(letters if kind < 0.7 else names[1:])
        return inner + chance.choice(["", "", "", "", "*", "+", "?", "{2}", "{0,3}", "{1,}"])

    return "".join(f"{name} ::= {sequence(0)} | {sequence(0)}\n" for name in names)


def test_llama_cpp_follows_what_passed_the_check(vocabulary: Vocabulary) -> None:
    """Of random grammars, each that passes is read by native code and leaves a way to go on."""
    chance, passed = random.Random(0), 0
    while passed < 150:
        text = gbnf(chance)
        try:
            check_grammar(text)
        except InvalidRequestError:
            continue
        passed += 1
        with Follower(vocabulary, text) as follower:
            for _ in range(8):
                token = chance.choice(follower.allowed())
                follower.accept(token)
                if token in vocabulary.ends:
                    break
