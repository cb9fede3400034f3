"""Properties of the values of a JSON Schema, derived from the schema alone: their types, their
properties, their depth. The schemas are well-formed; inner ones may be `True`.
"""

import math
from collections.abc import Iterator
from typing import Any

UNIONS = ("anyOf", "oneOf", "allOf")
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


def in_place(schema: Any) -> Iterator[str]:
    """The references that a value of the schema itself (not an inner value) has to follow."""
    if schema is not True:
        if "$ref" in schema:
            yield schema["$ref"]
        for form in UNIONS:
            for branch in schema.get(form, []):
                yield from in_place(branch)


def nested_refs(schema: Any, known: dict[str, float]) -> float:
    """The number of nested references of the smallest value; `known` holds those of the targets."""
    if schema is True:
        return 0
    if "$ref" in schema:
        return 1 + known.get(schema["$ref"], math.inf)
    if "const" in schema or "enum" in schema:
        return 0
    branches = [branch for form in UNIONS for branch in schema.get(form, [])]
    if branches:
        return min(nested_refs(branch, known) for branch in branches)
    kinds = types_of(schema)
    if kinds - {"array", "object"}:
        return 0
    inner = {"array": _needed_items, "object": _needed_properties}
    return min(
        max((nested_refs(one, known) for one in inner[kind](schema)), default=0) for kind in kinds
    )


def _needed_items(schema: dict[str, Any]) -> list[Any]:
    prefix: list[Any] = schema.get("prefixItems", [])
    has_more = schema.get("minItems", 0) > len(prefix)
    return [*prefix, schema.get("items", True)] if has_more else prefix


def _needed_properties(schema: dict[str, Any]) -> list[Any]:
    if schema.get("minProperties"):
        return [schema.get("propertyNames", True), schema.get("additionalProperties", True)]
    return [schema["properties"][name] for name in always_there(schema)]


def always_there(schema: dict[str, Any]) -> set[str]:
    """The properties that every generated object has: required ones, and constants."""
    properties = schema.get("properties", {})
    constant = {n for n, inner in properties.items() if inner is not True and "const" in inner}
    return constant | set(schema.get("required", []))


def types_of(leaf: dict[str, Any]) -> set[str]:
    """The types that values of the schema may have; an integer counts as a number."""
    if "const" in leaf or "enum" in leaf:
        values = [leaf["const"]] if "const" in leaf else leaf["enum"]
        types = {kind for value in values for kind in types_of_value(value)}
    else:
        declared = leaf.get("type", TYPES)
        types = {declared} if isinstance(declared, str) else set(declared)
    return {"number" if kind == "integer" else kind for kind in types}


def types_of_value(value: Any) -> set[str]:
    if isinstance(value, bool) or value is None:
        return {"null"} if value is None else {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == int(value) else {"number"}
    return {
        "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"
    }


def comparable(value: Any) -> Any:
    """A hashable form that is equal for values equal in JSON: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, list):
        return tuple(map(comparable, value))
    if isinstance(value, dict):
        return frozenset((key, comparable(inner)) for key, inner in value.items())
    return ("boolean", value) if isinstance(value, bool) else value
