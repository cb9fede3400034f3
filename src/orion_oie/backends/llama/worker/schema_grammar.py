"""The grammar of a JSON Schema, in llama.cpp's GBNF.

The schema has passed `guardrails/json_schema.py`. Every text of the grammar validates against the
schema, but not every valid text is in the grammar: properties come in their declared order,
undeclared ones only where none is declared; constants are always present; references are followed
to a limited depth, so that nesting ends; and at most one space follows a comma or colon. Characters
that `sanitize` would remove from an answer are written as escapes.
"""

import json
import re
from collections.abc import Iterable
from itertools import groupby, takewhile
from typing import Any

from orion_oie.backends.llama.worker.number_ranges import (
    DIGITS,
    number_body,
)
from orion_oie.errors import InvalidRequestError

NESTED_REFS = 16
MAX_GBNF_CHARS = 2_000_000
MAX_CHOICES = 1000

_BLOCK = 64  # long repetitions are counted in blocks of this many
_BRANCHINGS = 20  # of texts with a common prefix

_TYPES = ("object", "array", "string", "number", "boolean", "null")
_RULES = {
    "comma": '"," " "?',
    "colon": '":" " "?',
    "hex": "[0-9a-fA-F]",
    "char": (
        r'[ !#-\[\]-~\u00A0-\uD7FF\uE000-\U0010FFFF] | "\\" (["\\/bfnrt] | "u" '
        r"([0-9a-cA-CefEF] hex{3} | [dD] [0-7] hex{2} | "
        r'[dD] [89abAB] hex{2} "\\u" [dD] [c-fC-F] hex{2}))'
    ),
    "string": r'"\"" char* "\""',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "integer": f'"0" | "-"? [1-9] [0-9]{{0,{DIGITS - 1}}}',
    "number": '"-"? ("0" | [1-9] [0-9]{0,14}) ("." [0-9]{1,15})? ([eE] [-+]? [0-9]{1,2})?',
}
_FORMATS = {
    "date": (
        '[1-9] [0-9]{3} "-" (("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01]) | '
        '("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30") | '
        '"02-" ("0" [1-9] | "1" [0-9] | "2" [0-8])) | '
        '([1-9] [0-9] ("0" [48] | [2468] [048] | [13579] [26]) | '
        '([2468] [048] | [13579] [26]) "00") "-02-29"'
    ),
    "time": (
        '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? '
        '("Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
    ),
    "date-time": 'date "T" time',
    "uuid": 'hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12}',
    "email": (
        'atom ("." atom){0,2} "@" (label "."){1,3} [A-Za-z]{2,12}\n'
        "atom ::= [A-Za-z0-9_+-]{1,20}\n"
        'label ::= [A-Za-z0-9] ("-"? [A-Za-z0-9]){0,29}'
    ),
}
FORMATS = frozenset(_FORMATS)


def gbnf_of_schema(schema: dict[str, Any]) -> str:
    """The grammar of a checked schema. Raises `InvalidRequestError` if it would be too large."""
    writer = _Writer(schema)
    start = writer.value(schema, NESTED_REFS)
    if start is None:
        raise InvalidRequestError(f"json_schema: no value ends within {NESTED_REFS} nested $ref")
    return writer.text(start)


class _Writer:
    """Writes rules, each body once; the rules of parts come before those of the whole.

    A part is a piece of GBNF that fits into a sequence. `levels` is the number of references that
    may still be followed; a part that would take more is None.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self._root = schema
        self._names: dict[str, str] = {}
        self._size = 0
        self._choices: dict[str, list[str]] = {}
        self._followed: dict[tuple[str, int], str | None] = {}

    def text(self, start: str) -> str:
        rules = {"root": start, **_RULES, **_FORMATS}
        rules |= {name: body for body, name in self._names.items()}
        return "".join(f"{name} ::= {body}\n" for name, body in rules.items())

    def _rule(self, body: str) -> str:
        """The name of the rule with this body."""
        if body not in self._names:
            self._names[body] = f"r{len(self._names)}"
            self._size += len(body)
            if self._size > MAX_GBNF_CHARS:
                raise InvalidRequestError("json_schema: its grammar would be too large")
        return self._names[body]

    def _choice(self, options: Iterable[str | None]) -> str | None:
        """A choice between options, without nested choices and duplicates."""
        flat: dict[str, None] = {}
        for option in options:
            if option is not None:
                flat.update(dict.fromkeys(self._choices.get(option, [option])))
        if len(flat) > MAX_CHOICES:
            raise InvalidRequestError(f"json_schema: {len(flat)} ways for one value are too many")
        if len(flat) < 2:
            return next(iter(flat), None)
        name = self._rule(" | ".join(flat))
        self._choices[name] = list(flat)
        return name

    def value(self, schema: Any, levels: int) -> str | None:
        """The part for a value of the schema."""
        schema = {} if schema is True else schema
        if "$ref" in schema:
            return self._follow(schema["$ref"], levels - 1)
        for union in ("anyOf", "oneOf", "allOf"):
            if union in schema:
                return self._choice([self.value(branch, levels) for branch in schema[union]])
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return self._texts(sorted({_json(value) for value in values}), _BRANCHINGS)
        if "type" not in schema:
            return self._follow("", levels - 1) if levels else self._anything(0)
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return self._choice([self._typed(kind, schema, levels) for kind in types])

    def _texts(self, texts: list[str], branchings: int) -> str:
        """A choice between sorted texts. Common prefixes are written once, which leaves fewer
        alternatives to follow."""
        options = []
        for _, group in groupby(texts, lambda text: text[:1] if branchings else text):
            same = list(group)
            start = _common_start(same[0], same[-1])
            options.append(_literal(start))
            if len(same) > 1:
                rest = self._texts([text[len(start) :] for text in same], branchings - 1)
                options[-1] += f" {rest}"
        return options[0] if len(options) == 1 else self._rule(" | ".join(options))

    def _follow(self, ref: str, levels: int) -> str | None:
        """The part for the target of a reference; the empty reference means any value."""
        if levels < 0:
            return None
        if (ref, levels) not in self._followed:
            target = self._root
            for step in ref.split("/")[1:]:
                target = target[step]
            rule = self.value(target, levels) if ref else self._anything(levels)
            self._followed[ref, levels] = rule
        return self._followed[ref, levels]

    def _anything(self, levels: int) -> str | None:
        types = _TYPES if levels else _TYPES[2:]
        return self._choice([self._typed(kind, {}, levels) for kind in types])

    def _typed(self, kind: str, schema: dict[str, Any], levels: int) -> str | None:
        if kind == "object":
            return self._object(schema, levels)
        if kind == "array":
            return self._array(schema, levels)
        if kind == "string":
            return self._string(schema)
        if kind in ("integer", "number"):
            body = number_body(schema, is_integer=kind == "integer")
            return kind if body is None else self._rule(body)
        return kind

    def _string(self, schema: dict[str, Any]) -> str:
        if schema.get("format") in _FORMATS:
            return self._rule(rf'"\"" {schema["format"]} "\""')
        if "minLength" in schema or "maxLength" in schema:
            length = self._times("char", schema.get("minLength", 0), schema.get("maxLength"))
            return self._rule(rf'"\"" {length} "\""')
        return "string"

    def _array(self, schema: dict[str, Any], levels: int) -> str | None:
        head = [self.value(item, levels) for item in schema.get("prefixItems", [])]
        items = schema.get("items", not head)
        more = None if items is False else self.value(items, levels)
        body = self._series(head, more, schema.get("minItems", 0), schema.get("maxItems"))
        return None if body is None else self._rule(f'"[" {body} "]"')

    def _object(self, schema: dict[str, Any], levels: int) -> str | None:
        if "properties" in schema:
            return self._record(schema, levels)
        names = self.value(schema.get("propertyNames", {"type": "string"}), levels)
        inner = schema.get("additionalProperties", True)
        value = None if inner is False else self.value(inner, levels)
        entry = None if names is None or value is None else self._rule(f"{names} colon {value}")
        least, most = schema.get("minProperties", 0), schema.get("maxProperties")
        body = self._series([], entry, least, most)
        return None if body is None else self._rule(f'"{{" {body} "}}"')

    def _record(self, schema: dict[str, Any], levels: int) -> str | None:
        """An object of declared properties, written from its end: so the rest is always known."""
        firsts, rest = [""], '""'
        for name, inner in reversed(schema["properties"].items()):
            is_needed = name in schema.get("required", []) or (
                inner is not True and "const" in inner
            )
            value = self.value(inner, levels)
            if value is None and is_needed:
                return None
            if value is not None:
                entry = self._rule(f"{_literal(_json(name))} colon {value}")
                firsts = [f"{entry} {rest}"] + ([] if is_needed else firsts)
                rest = self._rule(
                    f"comma {entry} {rest}" if is_needed else f"(comma {entry})? {rest}"
                )
        return self._rule(f'"{{" ({" | ".join(firsts)}) "}}"')

    def _series(
        self, head: list[str | None], more: str | None, least: int, most: int | None
    ) -> str | None:
        """All of `head`, then `more`, separated by commas: `least` to `most` items in all."""
        if None in head or (more is None and least > len(head)):
            return None
        first = " comma ".join(str(item) for item in head)
        least, most = max(least - len(head), 0), None if most is None else most - len(head)
        if more is None or most == 0:
            return first
        follower = self._rule(f"comma {more}")
        if head:
            return f"{first} {self._times(follower, least, most)}"
        rest = self._times(follower, max(least - 1, 0), None if most is None else most - 1)
        return f"{more} {rest}" if least else f"({more} {rest})?"

    def _times(self, item: str, least: int, most: int | None) -> str:
        """`item` repeated, in repetitions that are small enough for llama.cpp."""
        parts = [""]
        if least >= _BLOCK:
            parts.append(f"{self._rule(f'{item}{{{_BLOCK}}}')}{{{least // _BLOCK}}}")
        if least % _BLOCK:
            parts.append(f"{item}{{{least % _BLOCK}}}")
        parts.append(f"{item}*" if most is None else self._up_to(item, most - least))
        return " ".join(parts)

    def _up_to(self, item: str, most: int) -> str:
        """Up to `most` items: less than a block, or a block and the rest, in shared rules."""
        rest = f"{item}{{0,{most % _BLOCK}}}" if most % _BLOCK else '""'
        if most < _BLOCK:
            return rest
        less = self._rule(f"{item}{{0,{_BLOCK - 1}}}")
        block = self._rule(f"{item}{{{_BLOCK}}}")
        for _ in range(most // _BLOCK):
            rest = self._rule(f"{less} | {block} {rest}")
        return rest


def _common_start(one: str, other: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in same)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
