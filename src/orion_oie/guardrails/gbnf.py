"""Validation of grammars in GBNF, llama.cpp's grammar format.

A grammar passes if llama.cpp can parse it and never gets stuck. A grammar that would crash it, hang
it or exhaust the memory is refused.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple, NoReturn

from orion_oie.errors import InvalidRequestError

MAX_GRAMMAR_CHARS = 64_000
MAX_GROUP_DEPTH = 64  # llama.cpp parses groups recursively
MAX_REPEAT = 1999  # above it, llama.cpp refuses, or reads "at most" as "without limit"
MAX_ELEMENTS = 100_000  # characters and names, with repetitions expanded
MAX_STARTS = 5000  # alternatives for the first element, which llama.cpp follows in parallel
MAX_START_DEPTH = 500  # llama.cpp follows first elements recursively

_GAP = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_HEAD = re.compile(r"([A-Za-z0-9-]+)[ \t]*::=")
_TOKEN = re.compile(
    r"(?P<gap>[ \t]+|\#[^\r\n]*)|(?P<newline>[\r\n]+)|(?P<any>\.)|(?P<name>[A-Za-z0-9-]+)"
    r'|"(?P<literal>(?:[^"\\]|\\.)*)"|\[(?P<chars>(?:[^\]\\]|\\.)*)\]'
    r"|(?P<open>\()|(?P<close>\))|(?P<bar>\|)|(?P<repeat>[*+?]|\{[^}]*\})",
    re.DOTALL,
)
_COUNTS = re.compile(r"\{[ \t]*([0-9]{1,9})[ \t]*(,?)[ \t]*([0-9]{0,9})[ \t]*\}")
_LETTER = re.compile(
    r'\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\([tnr\\"\[\]-])|([^\\])',
    re.DOTALL,
)
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r"}


def check_grammar(text: object) -> None:
    """Raise `InvalidRequestError` unless llama.cpp can parse and follow the grammar."""
    if not isinstance(text, str):
        raise InvalidRequestError(f"grammar must be a str, got {type(text).__name__}")
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequestError(
            f"grammar has {len(text)} characters, the limit is {MAX_GRAMMAR_CHARS}"
        )
    if re.search("[\0\ud800-\udfff]", text):
        raise InvalidRequestError("grammar has a NUL character or an unpaired surrogate")
    _check_rules(_GrammarReader(text).read())


class _Part(NamedTuple):
    """One element of a sequence: a rule, or `size` characters; repeated `least` to `most` times
    (None: no limit)."""

    rule: str | None
    size: int
    least: int = 1
    most: int | None = 1


_Rules = dict[str, list[list[_Part]]]


class _GrammarReader:
    """Parses a grammar as llama.cpp does. A group becomes a rule, named after its number."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._rules: _Rules = {}

    def read(self) -> _Rules:
        while (gap := _GAP.match(self._text, self._at)) and gap.end() < len(self._text):
            self._at = gap.end()
            head = _HEAD.match(self._text, self._at)
            if head is None:
                self._fail("expected 'NAME ::='; a rule goes on after a line break only inside "
                           "parentheses and after '|'")  # fmt: skip
            if head[1] in self._rules:
                self._fail(f"the rule {head[1]!r} is there twice")
            self._at = head.end()
            self._read_body(head[1])
        return self._rules

    def _fail(self, why: str) -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        raise InvalidRequestError(f"grammar, line {line}: {why}", line=line)

    def _read_body(self, name: str) -> None:
        self._rules[name] = [[]]
        path, may_break = [name], True
        while self._at < len(self._text):
            token = _TOKEN.match(self._text, self._at)
            if token is None:
                self._fail(f"cannot read {self._text[self._at : self._at + 20]!r}")
            kind = str(token.lastgroup)
            if kind == "newline" and len(path) == 1 and not may_break:
                return
            if kind not in ("gap", "newline"):
                self._take(kind, token[kind], path)
                may_break = kind == "bar"
            self._at = token.end()
        if len(path) > 1:
            self._fail("a '(' is not closed")

    def _take(self, kind: str, word: str, path: list[str]) -> None:
        """Add one token to the innermost group of the path."""
        sequence = self._rules[path[-1]][-1]
        if kind == "bar":
            self._rules[path[-1]].append([])
        elif kind == "open":
            if len(path) > MAX_GROUP_DEPTH:
                self._fail(f"parentheses are nested more than {MAX_GROUP_DEPTH} deep")
            path.append(f"({len(self._rules)})")
            self._rules[path[-1]] = [[]]
            sequence.append(_Part(path[-1], 1))
        elif kind == "close":
            if len(path) == 1:
                self._fail("a ')' closes nothing")
            path.pop()
        elif kind == "repeat":
            if not sequence or not sequence[-1].size or sequence[-1][2:] != (1, 1):
                self._fail(f"{word!r} repeats nothing, or a repetition")
            least, most = self._counts(word)
            sequence[-1] = sequence[-1]._replace(least=least, most=most)
        elif kind == "literal":
            letters = [letter for letter, _ in self._letters(word)]
            if any(letter == 0 or not _is_letter(letter) for letter in letters):
                self._fail("a text has a character that no answer can have")
            sequence.append(_Part(None, len(letters)))
        else:
            size = self._check_class(word) if kind == "chars" else 1
            sequence.append(_Part(word if kind == "name" else None, size))

    def _counts(self, word: str) -> tuple[int, int | None]:
        if word in "*+?":
            return int(word == "+"), 1 if word == "?" else None
        counts = _COUNTS.fullmatch(word)
        if counts is None or (counts[3] and not counts[2]):
            self._fail(f"cannot read the repetition {word!r}")
        least = int(counts[1])
        most = int(counts[3]) if counts[3] else None if counts[2] else least
        if not least <= (least if most is None else most) <= MAX_REPEAT:
            self._fail(f"{word!r} must go upwards, to {MAX_REPEAT} at most")
        return least, most

    def _letters(self, text: str) -> list[tuple[int, bool]]:
        """The code points of a literal or class, each with True if it is an unescaped '-'."""
        letters, at = [], 0
        while at < len(text):
            found = _LETTER.match(text, at)
            if found is None:
                self._fail(f"unknown escape {text[at : at + 6]!r}")
            code = found[1] or found[2] or found[3]
            plain = _CONTROLS.get(found[4], found[4]) or found[5]
            letters.append((int(code, 16) if code else ord(plain), found[0] == "-"))
            at = found.end()
        return letters

    def _check_class(self, text: str) -> int:
        is_negated = text.startswith("^")
        letters = self._letters(text[is_negated:])
        ranges, at = [], 0
        while at < len(letters):
            is_range = at + 2 < len(letters) and letters[at + 1][1]
            ranges.append((letters[at][0], letters[at + 2 * is_range][0]))
            at += 3 if is_range else 1
        if not ranges or any(low > high for low, high in ranges):
            self._fail(f"[{text:.40}] is empty, or has a range that goes downwards")
        if is_negated:
            free = 1
            for low, high in sorted(ranges):
                free = max(free, high + 1) if low <= free else free
            is_alive = _is_letter(free)
        else:
            is_alive = all(map(_is_letter, sum(ranges, ()))) and any(high for _, high in ranges)
        if not is_alive:
            self._fail(f"[{text:.40}] allows no character, or one that no answer can have")
        return 2 * len(ranges)


def _is_letter(code: int) -> bool:
    return code < 0xD800 or 0xE000 <= code <= 0x10FFFF


def _check_rules(rules: _Rules) -> None:
    """Check the rules together. An element that may be empty is called nullable."""
    if "root" not in rules:
        raise InvalidRequestError("grammar has no rule 'root'")
    parts = [part for sequences in rules.values() for sequence in sequences for part in sequence]
    for part in parts:
        if part.rule is not None and part.rule not in rules:
            raise InvalidRequestError(f"grammar has no rule {part.rule!r}, but uses it")
    if sum(part.size * (part.most or part.least or 1) for part in parts) > MAX_ELEMENTS:
        raise InvalidRequestError("grammar is too large with its repetitions written out")
    ending = _settled(rules, lambda part: part.rule is None)
    if len(ending) < len(rules):
        name = next(name for name in rules if name not in ending)
        raise InvalidRequestError(f"grammar: {_called(name)} never comes to an end")
    nullable = _settled(rules, lambda part: part.rule is None and part.size == 0)
    for name, sequences in rules.items():
        repeated = (p.rule for sequence in sequences for p in sequence if p.most != 1)
        if not nullable.isdisjoint(repeated):
            raise InvalidRequestError(f"grammar: {_called(name)} repeats what may be empty")
    _check_starts(rules, nullable)


def _settled(rules: _Rules, is_settled: Callable[[_Part], bool]) -> set[str]:
    """The rules with a sequence in which every part is settled or optional, found recursively."""
    users = defaultdict(set)
    for name, sequences in rules.items():
        for sequence in sequences:
            for part in sequence:
                users[part.rule].add(name)
    found: set[str | None] = set()
    todo = set(rules)
    while todo:
        name = todo.pop()
        is_found = any(
            all(part.least == 0 or part.rule in found or is_settled(part) for part in sequence)
            for sequence in rules[name]
        )
        if is_found and name not in found:
            found.add(name)
            todo |= users[name] - found
    return {name for name in found if name is not None}


def _check_starts(rules: _Rules, nullable: set[str]) -> None:
    """Check that no rule begins with itself, and that it begins in a limited number of ways."""
    starts = {name: [*_first_rules(rules[name], nullable)] for name in rules}
    try:
        order = [*TopologicalSorter(starts).static_order()]
    except CycleError as error:
        cycle = [name for name in error.args[1] if not name.startswith("(")]
        path = " -> ".join(dict.fromkeys(cycle))
        raise InvalidRequestError(f"grammar: {path} begins with itself (left recursion)") from None
    ways: dict[str, int] = {}
    depth: dict[str, int] = {}
    for name in order:
        ways[name] = len(rules[name]) + sum(ways[first] for first in starts[name])
        depth[name] = 1 + max((depth[first] for first in starts[name]), default=0)
        if ways[name] > MAX_STARTS or depth[name] > MAX_START_DEPTH:
            raise InvalidRequestError(f"grammar: {_called(name)} begins in too many ways")


def _first_rules(sequences: list[list[_Part]], nullable: set[str]) -> Iterator[str]:
    for sequence in sequences:
        for part in sequence:
            if part.rule is not None:
                yield part.rule
            if part.least and part.size and part.rule not in nullable:
                break


def _called(name: str) -> str:
    return "a group" if name.startswith("(") else f"the rule {name!r}"
