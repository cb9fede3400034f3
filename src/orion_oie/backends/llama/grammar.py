"""Grammars in llama.cpp's GBNF: writes the one of a JSON Schema, makes samplers that follow one.

The schema has passed `structured.check_json_schema`. What its grammar allows validates, but it
does not allow all that would: properties come in their declared order, undeclared ones only where
none is declared; constants are always there; references are followed some levels deep, so that
nothing nests without end; and JSON is written with a space after commas and colons at most.
Characters that `sanitize` would remove from an answer are written as escapes.

Samplers may be made on any thread: only the vocabulary is read.
"""

import codecs
import ctypes
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import groupby, takewhile
from typing import Any

import llama_cpp as lc

from orion_oie.errors import InvalidRequestError

NESTED_REFS = 16
MAX_GBNF_CHARS = 2_000_000
MAX_CHOICES = 1000

_BLOCK = 64  # long repetitions are counted in blocks of so many
_BRANCHINGS = 20  # of texts with a common beginning
_DIGITS = 18  # of an integer without bounds
_DECIMALS = 6  # of a number with bounds; with 9 digits before them a float is exact
_WHOLE = 10**9

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
    "integer": f'"0" | "-"? [1-9] [0-9]{{0,{_DIGITS - 1}}}',
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
    """Writes rules, each body once; those of parts come before those of the whole.

    A part is a piece of GBNF that fits into a sequence. `levels` is how many references may still
    be followed; a part that would take more is None.
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
        """One of these; choices inside are not nested, and nothing is there twice."""
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
        """What stands for a value of the schema."""
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
        """One of these sorted texts. What some begin with is written once: a way less to follow."""
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
        """The target of a reference; the empty one means anything."""
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
            body = _number(schema, is_integer=kind == "integer")
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
        """An object of declared properties. Written from its end: what may follow is known."""
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
        """All of `head`, then `more`, separated by commas; `least` to `most` in all."""
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
        """`item` repeated: never more than llama.cpp takes in one repetition."""
        parts = [""]
        if least >= _BLOCK:
            parts.append(f"{self._rule(f'{item}{{{_BLOCK}}}')}{{{least // _BLOCK}}}")
        if least % _BLOCK:
            parts.append(f"{item}{{{least % _BLOCK}}}")
        parts.append(f"{item}*" if most is None else self._up_to(item, most - least))
        return " ".join(parts)

    def _up_to(self, item: str, most: int) -> str:
        """Less than a block, or a block and what is left after it; in rules that are shared."""
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


# -- ranges of numbers


def _number(schema: dict[str, Any], *, is_integer: bool) -> str | None:
    """A rule for the bounds of a schema; None without bounds."""
    scale = 1 if is_integer else 10**_DECIMALS
    low = _bound(schema, "minimum", "exclusiveMinimum", scale, math.ceil, 1)
    high = _bound(schema, "maximum", "exclusiveMaximum", scale, math.floor, -1)
    if low is None and high is None:
        return None
    digits = max(_DIGITS, *(len(str(abs(bound))) + 1 for bound in (low, high) if bound is not None))
    far = 10**digits - 1 if is_integer else _WHOLE * scale - 1
    options = _signed(-far if low is None else low, far if high is None else high, scale)
    if not is_integer:
        # Beyond the limit of bounds, what is not bounded has more digits.
        large = f'[1-9] [0-9]{{9,14}} ("." [0-9]{{1,{_DECIMALS}}})?'
        options += [large] if high is None else []
        options += [f'"-" {large}'] if low is None else []
    return " | ".join(options)


def _bound(
    schema: dict[str, Any],
    plain: str,
    strict: str,
    scale: int,
    to_inside: Callable[[Fraction], int],
    step: int,
) -> int | None:
    """The last multiple of 1/`scale` inside a bound."""
    if plain in schema:
        return to_inside(Fraction(str(schema[plain])) * scale)
    if strict not in schema:
        return None
    value = Fraction(str(schema[strict])) * scale
    inside = to_inside(value)
    return inside + step if inside == value else inside


def _signed(low: int, high: int, scale: int) -> list[str]:
    options = []
    if high >= 0:
        options += _unsigned(max(low, 0), high, scale)
    if low < 0:
        options.append(f'"-" ({" | ".join(_unsigned(max(-high, 1), -low, scale))})')
    return options


def _unsigned(low: int, high: int, scale: int) -> list[str]:
    """Numbers from `low` to `high`, both in units of 1/`scale`."""
    if scale == 1:
        return _whole(low, high)
    (first, below), (last, above) = divmod(low, scale), divmod(high, scale)
    if first == last:
        return [f'"{first}" {_decimals(below, above, scale)}']
    options = []
    if below > 0:
        options.append(f'"{first}" {_decimals(below, scale - 1, scale)}')
        first += 1
    if above < scale - 1:
        options.append(f'"{last}" {_decimals(0, above, scale)}')
        last -= 1
    if first <= last:
        options.append(f"({' | '.join(_whole(first, last))}) {_decimals(0, scale - 1, scale)}")
    return options


def _whole(low: int, high: int) -> list[str]:
    options = []
    for width in range(len(str(low)), len(str(high)) + 1):
        least, most = 10 ** (width - 1) if width > 1 else 0, 10**width - 1
        options.append(_between(str(max(low, least)), str(min(high, most)), may_stop=False))
    return options


def _decimals(low: int, high: int, scale: int) -> str:
    digits = len(str(scale)) - 1
    body = f'"." ({_between(f"{low:0{digits}}", f"{high:0{digits}}", may_stop=True)})'
    return body if low else f"({body})?"


def _between(low: str, high: str, *, may_stop: bool) -> str:
    """Strings of digits from `low` to `high`, all of one length.

    With `may_stop`, zeros at the end may be missing, but for the first digit.
    """
    width = len(low) - 1
    zeros, nines = "0" * width, "9" * width

    def rest(low: str, high: str) -> str:
        if not width:
            return ""
        if (low, high) == (zeros, nines):
            return f"[0-9]{{{'0,' if may_stop else ''}{width}}}"
        inner = f"({_between(low, high, may_stop=may_stop)})"
        return f"{inner}?" if may_stop and low == zeros else inner

    first, last = int(low[0]), int(high[0])
    if first == last:
        return f'"{first}" {rest(low[1:], high[1:])}'
    options = []
    if low[1:] != zeros:
        options.append(f'"{first}" {rest(low[1:], nines)}')
        first += 1
    if high[1:] != nines:
        options.append(f'"{last}" {rest(zeros, high[1:])}')
        last -= 1
    if first <= last:
        options.append(f"[{first}-{last}] {rest(zeros, nines)}")
    return " | ".join(options)


# -- samplers

# After these lead bytes, some bytes make no character, though llama.cpp's grammars take them for
# one: forms longer than needed, surrogates, and what lies beyond Unicode.
_WRONG_SECOND = {
    0xE0: range(0x80, 0xA0),
    0xED: range(0xA0, 0xC0),
    0xF0: range(0x80, 0x90),
    0xF4: range(0x90, 0xC0),
}
_CONTINUATIONS = bytes(range(0x80, 0xC0))


def parse_grammar(vocab: Any, text: str) -> Any:
    """A llama.cpp sampler that leaves the tokens with which the grammar goes on.

    What it leaves is always valid UTF-8, and text that the answer will have: no control tokens,
    whose names a grammar would count. The caller frees it. Raises `InvalidRequestError`.
    """
    vocabulary = _vocabulary(vocab, lc.llama_vocab_n_tokens(vocab))
    grammar = lc.llama_sampler_init_grammar(vocab, text.encode(), b"root")
    if not grammar:
        raise InvalidRequestError(
            "llama.cpp does not accept the grammar; its reasons are in the worker's log"
        )
    chain = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
    lc.llama_sampler_chain_add(chain, vocabulary.ban(vocabulary.unwritable))
    guard = lc.llama_sampler_init(ctypes.byref(_INTERFACE), None)
    _guards[ctypes.addressof(guard.contents)] = _Guard(vocabulary)
    lc.llama_sampler_chain_add(chain, guard)
    lc.llama_sampler_chain_add(chain, grammar)
    return chain


class _Vocabulary:
    """Which tokens a grammar would take for something else than the answer's text."""

    def __init__(self, vocab: Any, size: int) -> None:
        self._size = size
        self.unwritable: list[int] = []
        self.leads: dict[int, int] = {}  # tokens that end with a lead byte of the table
        wrong: dict[int, list[int]] = {lead: [] for lead in _WRONG_SECOND}
        buffer = ctypes.create_string_buffer(1024)
        for token in range(size):
            length = lc.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, False)
            piece = ctypes.string_at(buffer, max(length, 0))
            if lc.llama_vocab_is_eog(vocab, token):
                continue
            if not _is_writable(piece):
                self.unwritable.append(token)
                continue
            if piece[-1] in wrong:
                self.leads[token] = piece[-1]
            for lead, seconds in _WRONG_SECOND.items():
                if piece[0] in seconds:
                    wrong[lead].append(token)
        # They live as long as the process: one vocabulary, a few hundred tokens.
        self.bans = {lead: self.ban(tokens) for lead, tokens in wrong.items()}

    def ban(self, tokens: list[int]) -> Any:
        """A sampler that rules out these tokens."""
        biases = (lc.llama_logit_bias * len(tokens))()
        for entry, token in zip(biases, tokens, strict=True):
            entry.token, entry.bias = token, -math.inf
        return lc.llama_sampler_init_logit_bias(self._size, len(tokens), biases)


@lru_cache(maxsize=1)
def _vocabulary(vocab: Any, size: int) -> _Vocabulary:
    return _Vocabulary(vocab, size)


def _is_writable(piece: bytes) -> bool:
    """It has text, all of it valid if what stands before and after it is."""
    if piece.isascii():
        return bool(piece) and b"\0" not in piece
    try:
        codecs.utf_8_decode(piece.lstrip(_CONTINUATIONS), "strict", False)
    except UnicodeDecodeError:
        return False
    return b"\0" not in piece


@dataclass(slots=True)
class _Guard:
    """State of a sampler that goes on where the last token stopped inside a character."""

    vocabulary: _Vocabulary
    lead: int | None = None


_guards: dict[int, _Guard] = {}


def _on_accept(sampler: Any, token: int) -> None:
    guard = _guards[ctypes.addressof(sampler.contents)]
    guard.lead = guard.vocabulary.leads.get(token)


def _on_apply(sampler: Any, candidates: Any) -> None:
    guard = _guards[ctypes.addressof(sampler.contents)]
    if guard.lead is not None:
        lc.llama_sampler_apply(guard.vocabulary.bans[guard.lead], candidates)


def _on_free(sampler: Any) -> None:
    del _guards[ctypes.addressof(sampler.contents)]


_INTERFACE = lc.llama_sampler_i(
    accept=lc.llama_sampler_i_accept(_on_accept),
    apply=lc.llama_sampler_i_apply(_on_apply),
    free=lc.llama_sampler_i_free(_on_free),
)
