"""Validation of the JSON Schemas that an answer can be constrained to.

A schema passes if every value that is generated for it validates by JSON Schema 2020-12. A keyword
that could not be enforced is refused, never ignored; annotations are allowed.

The grammar of a schema is written by `backends/llama/worker/schema_grammar.py`.
"""

import math
import re
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple, NoReturn

from orion_oie.errors import InvalidRequestError
from orion_oie.guardrails.schema_values import (
    UNIONS,
    always_there,
    comparable,
    in_place,
    nested_refs,
    types_of,
    types_of_value,
)

MAX_SCHEMA_CHARS = 100_000
MAX_SCHEMA_DEPTH = 64
MAX_NESTED_REFS = 16  # nested $ref that one value may follow
MAX_COUNT = 50_000  # of characters, items and entries
MAX_ENUM = 2000
MAX_BRANCHES = 100
MAX_PROPERTIES = 256
MAX_INTEGER = 2**64
MAX_NUMBER = 10**9  # bounds of numbers stay below it, and have at most NUMBER_DECIMALS decimals
NUMBER_DECIMALS = 5
FORMATS = frozenset({"date", "time", "date-time", "uuid", "email"})
FREE_FORMATS = frozenset({"password", "path", "binary"})  # valid for any text

_ANNOTATIONS = {
    **dict.fromkeys(("title", "description", "$comment"), str),
    **dict.fromkeys(("deprecated", "readOnly", "writeOnly"), bool),
    **dict.fromkeys(("default", "discriminator"), object),
    "examples": list,
}
_AT_THE_TOP = {"$schema": str, "$id": str, "$defs": dict, "definitions": dict}
_FORMS = ("$ref", *UNIONS, "const", "enum")
_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_KEYWORDS = {
    "null": frozenset[str](),
    "boolean": frozenset[str](),
    "integer": _BOUNDS,
    "number": _BOUNDS,
    "string": frozenset({"minLength", "maxLength", "format"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}),
    "object": frozenset(
        {"properties", "required", "additionalProperties", "propertyNames"}
        | {"minProperties", "maxProperties"}
    ),
}


def check_json_schema(schema: object) -> None:
    """Raise `InvalidRequestError` unless answers can be constrained to the schema.

    The error's details are the `path` in the schema and the `keyword`.
    """
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"json_schema must be a dict, got {type(schema).__name__}")
    _SchemaCheck(schema).run()


def _refuse(path: str, keyword: str, why: str) -> NoReturn:
    where = f" at {path}" if path else ""
    raise InvalidRequestError(f"json_schema{where}: '{keyword}' {why}", path=path, keyword=keyword)


def _step(path: str, key: object) -> str:
    return f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"


def _is_number(value: object) -> bool:
    """True for numbers and booleans that JSON can write and Python can read back."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and abs(value) < 10**100


class _SchemaCheck:
    """The check of one schema: one pass over every subschema, then the checks that need all."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._root = schema
        self._size = 0
        self._targets: dict[str, Any] = {"#": schema}
        self._one_ofs: list[tuple[str, list[Any]]] = []
        self._key_schemas: list[tuple[str, Any]] = []

    def run(self) -> None:
        self._check_json(self._root, "", "json_schema", 0)
        for home in ("$defs", "definitions"):
            definitions = self._root.get(home)
            if isinstance(definitions, dict):
                self._targets |= {f"#/{home}/{name}": one for name, one in definitions.items()}
        for ref, schema in self._targets.items():
            self._visit(schema, ref[1:], "$ref")
        self._check_loops()
        self._check_end()
        for path, schema in self._key_schemas:
            if any(types_of(leaf) != {"string"} for leaf in self._leaves(schema)):
                _refuse(path, "propertyNames", "must allow strings only")
        for path, branches in self._one_ofs:
            self._check_one_of(branches, path)

    def _check_json(self, value: object, path: str, keyword: str, depth: int) -> None:
        """Check that the schema is JSON of a limited size and depth (one that contains itself is
        too deep)."""
        self._grow(1)
        if isinstance(value, dict | list):
            if depth > MAX_SCHEMA_DEPTH:
                _refuse(path, keyword, f"is nested more than {MAX_SCHEMA_DEPTH} deep")
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in pairs:
                if isinstance(value, dict):
                    self._check_text(key, path, keyword)
                self._check_json(inner, _step(path, key), str(key), depth + 1)
        elif not _is_number(value) and value is not None:
            self._check_text(value, path, keyword)

    def _check_text(self, text: object, path: str, keyword: str) -> None:
        if not isinstance(text, str):
            _refuse(path, keyword, f"has no value of JSON, but {text!r:.80}")
        self._grow(len(text))
        if re.search("[\ud800-\udfff]", text):
            _refuse(path, keyword, "has a text with an unpaired surrogate")

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > MAX_SCHEMA_CHARS:
            _refuse("", "json_schema", f"has more than {MAX_SCHEMA_CHARS} characters")

    # -- one subschema

    def _visit(self, schema: Any, path: str, keyword: str) -> None:
        if schema is True:
            return
        if schema is False:
            _refuse(path, keyword, "is false, which allows nothing")
        if not isinstance(schema, dict):
            _refuse(path, keyword, "must be a schema: an object or true")
        types = _declared_types(schema, path)
        form = next((form for form in _FORMS if form in schema), None)
        if form is None:
            allowed = {"type"}.union(*(_KEYWORDS[kind] for kind in types))
        else:
            allowed = {form, "type"} if form in ("const", "enum") else {form}
        free = _ANNOTATIONS if path else _ANNOTATIONS | _AT_THE_TOP
        for key, value in schema.items():
            if key not in free and key not in allowed:
                _refuse(path, key, _why_not(key, form))
            if not isinstance(value, free.get(key, object)):
                _refuse(path, key, f"must be a {free[key].__name__}")
        if form == "$ref":
            self._visit_reference(schema["$ref"], path)
        elif form in UNIONS:
            self._visit_union(form, schema[form], path)
        elif form is not None:
            _check_constants(schema, form, types, path)
        else:
            self._visit_typed(schema, types, path)

    def _visit_reference(self, ref: object, path: str) -> None:
        is_plain = isinstance(ref, str) and re.fullmatch(r"#(/[^/~%#\0-\x20]+){,2}", ref)
        if not is_plain or ref not in self._targets:
            _refuse(path, "$ref", f"must be '#' or '#/$defs/NAME' of this schema, got {ref!r:.80}")

    def _visit_union(self, form: str, branches: object, path: str) -> None:
        if not isinstance(branches, list) or not 0 < len(branches) <= MAX_BRANCHES:
            _refuse(path, form, f"must be a list of 1 to {MAX_BRANCHES} schemas")
        if form == "allOf" and len(branches) > 1:
            _refuse(path, form, "is supported with one schema; merge them into one")
        for index, branch in enumerate(branches):
            self._visit(branch, f"{path}/{form}/{index}", form)
        if form == "oneOf":
            self._one_ofs.append((path, branches))

    def _visit_typed(self, schema: dict[str, Any], types: list[str], path: str) -> None:
        for kind in {"integer", "number"} & set(types):
            _check_bounds(schema, path, is_integer=kind == "integer")
        if "string" in types:
            _check_range(schema, "minLength", "maxLength", path)
            _check_format(schema, path)
        if "array" in types:
            self._visit_array(schema, path)
        if "object" in types:
            self._visit_object(schema, path)

    def _visit_array(self, schema: dict[str, Any], path: str) -> None:
        _check_range(schema, "minItems", "maxItems", path)
        if schema.get("uniqueItems", False) is not False:
            _refuse(path, "uniqueItems", "is not supported: answers could not be held to it")
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list) or ("prefixItems" in schema and not prefix):
            _refuse(path, "prefixItems", "must be a list of schemas, and not empty")
        for index, item in enumerate(prefix):
            self._visit(item, f"{path}/prefixItems/{index}", "prefixItems")
        if "items" in schema and not (prefix and schema["items"] is False):
            self._visit(schema["items"], f"{path}/items", "items")
        if schema.get("maxItems", len(prefix)) < len(prefix):
            _refuse(path, "maxItems", "is less than there are 'prefixItems'")
        is_closed = prefix and schema.get("items", False) is False
        if is_closed and schema.get("minItems", 0) > len(prefix):
            _refuse(path, "minItems", "is more than there are 'prefixItems', without 'items'")

    def _visit_object(self, schema: dict[str, Any], path: str) -> None:
        _check_range(schema, "minProperties", "maxProperties", path)
        properties = schema.get("properties", {})
        if not isinstance(properties, dict) or len(properties) > MAX_PROPERTIES:
            _refuse(path, "properties", f"must be an object of up to {MAX_PROPERTIES} schemas")
        for name, inner in properties.items():
            self._visit(inner, _step(f"{path}/properties", name), "properties")
        required = schema.get("required", [])
        is_list = isinstance(required, list) and all(isinstance(name, str) for name in required)
        if not is_list or len(set(required)) < len(required):
            _refuse(path, "required", "must be a list of different names")
        for name in required:
            if name not in properties:
                _refuse(path, "required", f"names {name!r:.80}, which is not in 'properties'")
        if schema.get("additionalProperties", True) is not False:
            inner = schema.get("additionalProperties", True)
            self._visit(inner, f"{path}/additionalProperties", "additionalProperties")
        if "propertyNames" in schema:
            self._visit(schema["propertyNames"], f"{path}/propertyNames", "propertyNames")
            self._key_schemas.append((path, schema["propertyNames"]))
        for key in ("propertyNames", "minProperties", "maxProperties"):
            if key in schema and "properties" in schema:
                _refuse(path, key, "cannot stand beside 'properties'")
        # Generated names may repeat, so two entries do not guarantee two properties.
        if schema.get("minProperties", 0) > (schema.get("additionalProperties") is not False):
            _refuse(path, "minProperties", "is supported up to 1, where properties are allowed")

    # -- checks that need all subschemas

    def _check_loops(self) -> None:
        graph = {ref: set(in_place(schema)) for ref, schema in self._targets.items()}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            ref = str(error.args[1][0])
            _refuse(ref[1:], "$ref", "leads back to itself with no value in between")

    def _check_end(self) -> None:
        """Check that some value is reached within the references that a grammar follows."""
        levels: dict[str, float] = {}
        for _ in range(MAX_NESTED_REFS + 1):
            levels = {ref: nested_refs(schema, levels) for ref, schema in self._targets.items()}
        if levels["#"] > MAX_NESTED_REFS:
            _refuse("", "$ref", f"leads to no value within {MAX_NESTED_REFS} nested references")

    def _leaves(self, schema: Any) -> list[dict[str, Any]]:
        """The schemas that remain when references and unions are followed."""
        leaves, seen, todo = [], set(), [schema]
        while todo:
            inner = todo.pop()
            inner = {} if inner is True else inner
            if id(inner) in seen:
                continue
            seen.add(id(inner))
            branches = [branch for form in UNIONS for branch in inner.get(form, [])]
            if "$ref" in inner:
                todo.append(self._targets[inner["$ref"]])
            elif branches:
                todo += branches
            else:
                leaves.append(inner)
        return leaves

    def _check_one_of(self, branches: list[Any], path: str) -> None:
        """Check that no value generated for one branch can validate against another."""
        leaves = [self._leaves(branch) for branch in branches]
        if sum(map(len, leaves)) > MAX_BRANCHES:
            _refuse(path, "oneOf", f"is supported for {MAX_BRANCHES} schemas, also inside unions")
        for second in range(len(branches)):
            for first in range(second):
                pairs = ((one, other) for one in leaves[first] for other in leaves[second])
                if not all(self._are_disjoint(one, other) for one, other in pairs):
                    _refuse(
                        path,
                        "oneOf",
                        f"has branches {first} and {second} that might both match; give them "
                        "different types, or a required property with different 'const', or use "
                        "'anyOf'",
                    )

    def _are_disjoint(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        common = types_of(one) & types_of(other)
        if not common:
            return True
        values = self._values_of(one), self._values_of(other)
        if values[0] is not None and values[1] is not None:
            return not values[0] & values[1]
        if common != {"object"} or "properties" not in one or "properties" not in other:
            return False
        tags = always_there(one) & always_there(other)
        return any(
            self._are_different(one["properties"][tag], other["properties"][tag]) for tag in tags
        )

    def _are_different(self, one: Any, other: Any) -> bool:
        values = [set[Any]() for _ in range(2)]
        for found, schema in zip(values, (one, other), strict=True):
            for leaf in self._leaves(schema):
                constants = self._values_of(leaf)
                if constants is None:
                    return False
                found |= constants
        return not values[0] & values[1]

    @staticmethod
    def _values_of(leaf: dict[str, Any]) -> set[Any] | None:
        values = [leaf["const"]] if "const" in leaf else leaf.get("enum")
        return None if values is None else {comparable(value) for value in values}


def _declared_types(schema: dict[str, Any], path: str) -> list[str]:
    declared = schema.get("type", [])
    types = declared if isinstance(declared, list) else [declared]
    is_known = all(isinstance(kind, str) and kind in _KEYWORDS for kind in types)
    if not is_known or len(set(types)) < len(types) or ("type" in schema and not types):
        _refuse(path, "type", f"must be of {', '.join(_KEYWORDS)}, or a list of them")
    return types


def _why_not(keyword: str, form: str | None) -> str:
    if keyword in _AT_THE_TOP:
        return "is supported only at the top of the schema"
    kinds = [kind for kind, keywords in _KEYWORDS.items() if keyword in keywords]
    if form is not None and (kinds or keyword in (*_FORMS, "type")):
        return f"cannot stand beside '{form}'"
    if kinds:
        return f'needs "type": "{kinds[-1]}" beside it'
    return "is not supported: answers could not be held to it"


def _check_constants(schema: dict[str, Any], form: str, types: list[str], path: str) -> None:
    values = schema["enum"] if form == "enum" else [schema["const"]]
    if not isinstance(values, list) or not 0 < len(values) <= MAX_ENUM:
        _refuse(path, form, f"must be a list of 1 to {MAX_ENUM} values")
    for value in values:
        if types and not types_of_value(value) & set(types):
            _refuse(path, form, f"has {value!r:.80}, which is no {' or '.join(types)}")


def _check_range(schema: dict[str, Any], low: str, high: str, path: str) -> None:
    for keyword in (low, high):
        count = schema.get(keyword, 0)
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_COUNT:
            _refuse(path, keyword, f"must be an integer from 0 to {MAX_COUNT}, got {count!r:.80}")
    if schema.get(low, 0) > schema.get(high, MAX_COUNT):
        _refuse(path, high, f"is less than '{low}'")


def _check_format(schema: dict[str, Any], path: str) -> None:
    name = schema.get("format", "password")
    if not isinstance(name, str) or name not in FORMATS | FREE_FORMATS:
        known = ", ".join(sorted(FORMATS | FREE_FORMATS))
        _refuse(path, "format", f"{name!r:.80} is not supported; known are {known}")
    for key in ("minLength", "maxLength"):
        if key in schema and name in FORMATS:
            _refuse(path, key, "cannot stand beside 'format'")


class _Bound(NamedTuple):
    keyword: str
    value: Fraction
    is_strict: bool


def _check_bounds(schema: dict[str, Any], path: str, *, is_integer: bool) -> None:
    low = _bound(schema, "minimum", "exclusiveMinimum", path)
    high = _bound(schema, "maximum", "exclusiveMaximum", path)
    for bound in (low, high):
        if bound is not None:
            _check_bound(bound, path, is_integer)
    if low is None or high is None:
        return
    if is_integer:
        least = math.floor(low.value) + 1 if low.is_strict else math.ceil(low.value)
        most = math.ceil(high.value) - 1 if high.is_strict else math.floor(high.value)
        is_empty = least > most
    else:
        is_point = low.value == high.value and not low.is_strict and not high.is_strict
        is_empty = low.value >= high.value and not is_point
    if is_empty:
        _refuse(path, high.keyword, f"leaves nothing above '{low.keyword}'")


def _bound(schema: dict[str, Any], plain: str, strict: str, path: str) -> _Bound | None:
    keyword = strict if strict in schema else plain
    if keyword not in schema:
        return None
    if plain in schema and strict in schema:
        _refuse(path, strict, f"cannot stand beside '{plain}'")
    value = schema[keyword]
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(path, keyword, "must be a number")
    return _Bound(keyword, Fraction(str(value)), keyword == strict)


def _check_bound(bound: _Bound, path: str, is_integer: bool) -> None:
    if is_integer and abs(bound.value) > MAX_INTEGER:
        _refuse(path, bound.keyword, f"must be within -{MAX_INTEGER} and {MAX_INTEGER}")
    has_decimals = (bound.value * 10**NUMBER_DECIMALS).denominator > 1
    if not is_integer and (abs(bound.value) >= MAX_NUMBER or has_decimals):
        limits = f"below {MAX_NUMBER}, with at most {NUMBER_DECIMALS} decimals"
        _refuse(path, bound.keyword, f"of a number is supported {limits}")
