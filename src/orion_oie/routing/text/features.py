"""Features of a text that point to an agent regardless of its words: shapes of code, mathematics
and tables, and a language other than English.

Each feature is a strength in [0, 1], combined from the cues below. Nothing is parsed or executed.
Every expression takes linear time: repetitions are not nested, and one that could overlap with its
neighbour is bounded.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from orion_oie.models.specs import RouteFeature
from orion_oie.routing.text.compiled import compiled
from orion_oie.routing.text.excerpt import excerpt
from orion_oie.routing.text.language import (
    Language,
    detect,
    foreign_letter_share,
    has_foreign_script,
)


class Cue(NamedTuple):
    """An expression worth `strength`; it is tried only if one of `needles` is in the text."""

    strength: float
    needles: tuple[str, ...]
    pattern: str


def _cue(strength: float, needles: str, pattern: str) -> Cue:
    return Cue(strength, tuple(needles.split(" ")), pattern)


_CODE = (
    _cue(0.8, "```", r"```"),
    _cue(0.9, "def", r"^[ \t]{0,40}(?:async )?def \w{1,60}\("),
    _cue(0.8, "class", r"^[ \t]{0,40}(?:export |abstract |final |public )?class \w{1,60} ?[:({]"),
    _cue(0.9, "function", r"\bfunction\*? ?\w{0,60}\([^)\n]{0,120}\) ?\{"),
    _cue(0.8, "fn func", r"\b(?:fn|func) \w{1,60}\("),
    _cue(
        0.8,
        "public private protected static void int char double float",
        r"^[ \t]{0,40}(?:public|private|protected|static|void|int|char|double|float)"
        r" [\w<>\[\] ]{1,60}[(=;]",
    ),
    _cue(0.9, "#include", r"^[ \t]{0,40}#include ?[<\"]"),
    _cue(0.8, "import using", r"^[ \t]{0,40}(?:import|using) [\w.:*{} ,]{1,60};"),
    _cue(0.9, "import", r"^[ \t]{0,40}(?:from [\w.]{1,60} )?import \w[\w., ]{0,60}$"),
    _cue(0.8, "const let var", r"\b(?:const|let|var) \w{1,60} ?="),
    _cue(0.8, "=> lambda", r"=> ?[{(]|\blambda \w{0,30}:"),
    _cue(
        0.7,
        "for while if else",
        r"^[ \t]{0,40}(?:for \w{1,40} in|while|if|elif|else)\b[^\n]{0,120}:[ \t]?$"
        r"|^[ \t]{0,40}(?:if|for|while) ?\([^\n]{0,120}\) ?\{",
    ),
    _cue(
        0.5,
        "return print echo assert console",
        r"^[ \t]{0,40}(?:return\b[^\n]{1,120};?$|(?:print|echo|printf|assert|console\.log)[ (\"'])",
    ),
    _cue(0.35, "; { }", r"[;{}][ \t]{0,20}$"),
    _cue(
        1.0,
        "Traceback at File",
        r"Traceback \(most recent call last\)|^[ \t]{0,20}at [\w.$<>]{1,120}\([\w.]{1,60}:\d"
        r"|\bFile \"[^\"\n]{1,200}\", line \d",
    ),
    _cue(
        0.6,
        "Error Exception fault dumped trace",
        r"[A-Z]\w{0,60}(?:Error|Exception)\b|\b(?:segmentation fault|core dumped|stack ?trace)\b",
    ),
    _cue(
        0.6,
        "$ # % >",
        r"^[ \t]{0,8}(?:[$%]|PS>|>>>|\w{1,30}@[\w.-]{1,60}:\S{0,60}[$#])"
        r" (?:sudo |\./)?[a-z][\w.-]{0,30}(?: |$)",
    ),
    _cue(
        0.7,
        "apt pip npm git docker kubectl chmod mkdir ls grep sed curl",
        r"\b(?:sudo apt|apt-get|pip3? install|npm (?:install|run)|git (?:commit|push|pull|rebase|"
        r"merge|clone|checkout|stash)|docker (?:run|build|compose)|kubectl|chmod|mkdir -p|ls -|"
        r"grep -|sed -|curl -)",
    ),
    _cue(
        0.6,
        ".",
        r"\w\.(?:py|js|ts|tsx|jsx|java|cpp|cc|hpp|rs|go|rb|php|html|css|sh|bash|json|ya?ml|toml|"
        r"ipynb|kt|swift)\b",
    ),
    _cue(0.6, "(", r"\w\.\w{1,60}\([^)\n]{0,80}\)|\w{2}\(\)"),
    _cue(0.4, "_", r"\b[a-z]{1,30}_[a-z0-9_]{1,60}\b"),
    _cue(0.3, "== != && || += :: -> ++", r"[=!]==?[^=\n]|&&|\|\||\+=|::\w|->\w|\+\+[;)]"),
    _cue(
        0.7,
        "<",
        r"</?(?:div|span|html|body|head|p|a|img|ul|li|table|script|style|form|input|button|h[1-6])"
        r"\b[^>\n]{0,120}>",
    ),
    _cue(0.8, "\\", r"\\(?:documentclass|begin\{document\}|usepackage|section\{)"),
    _cue(0.45, "`", r"`[^`\n]{1,80}`"),
    _cue(0.2, "[", r"\[[\w'\"]{1,30}(?:, ?[\w'\"]{1,30}){1,40}\]"),
    _cue(0.4, "{", r"\{ ?['\"]\w{1,40}['\"] ?: ?"),
    # Style sheets, configuration files and the lines of a log.
    _cue(
        0.7, "px rem; em; vh; vw;", r"[a-z-]{3,30}: ?[^;{}\n]{0,60}\b\d{1,4}(?:px|rem|em|vh|vw)\b"
    ),
    _cue(0.4, "px rem; css CSS", r"\b\d{1,4} ?(?:px|rem)\b|\b(?:css|CSS)\b"),
    _cue(
        0.8, "{", r"^[ \t]{0,20}[.#@]?[a-zA-Z][\w.#:> -]{0,60}\{[ \t]{0,4}(?:\n|[a-z-]{2,30}: ?\w)"
    ),
    _cue(0.8, "]", r"^\[[A-Za-z][\w.: \"-]{0,40}\][ \t]{0,4}\n[ \t]{0,8}[\w.-]{1,40} ?= ?\S"),
    _cue(
        0.6, "=", r"(?:^[ \t]{0,8}(?:export )?[A-Za-z_][\w.-]{1,40} ?= ?\S[^\n]{0,80}(?:\n|\Z)){2}"
    ),
    _cue(
        0.8,
        "FROM RUN COPY WORKDIR ENTRYPOINT",
        r"^FROM [\w./-]{1,60}(?::[\w.-]{1,30})?$|^(?:RUN|COPY|WORKDIR|ENTRYPOINT|EXPOSE) \S",
    ),
    _cue(
        0.8,
        "apiVersion: services: image: jobs:",
        r"^apiVersion: |^services:$|^jobs:$|^[ ]{2,12}image: \S",
    ),
    Cue(
        0.6,
        ("\n  ",),
        r"(?:^[ ]{0,8}[a-z_][\w-]{1,30}:(?: \S[^\n]{0,60})?\n[ ]{2,12}[a-z_-][\w-]{1,30}:)",
    ),
    _cue(
        0.7,
        "ERROR WARN INFO DEBUG FATAL error fatal warning",
        r"\d\d:\d\d:\d\d[^\n]{0,40}\b(?:ERROR|WARN|INFO|DEBUG|FATAL)\b"
        r"|\b(?:ERROR|WARN(?:ING)?|FATAL)\b[\]:]|^[\w./ -]{1,30}: (?:\w{1,20} )?(?:error|fatal)\b"
        r"|^(?:error|fatal|warning)(?:\[\w+\])?: ",
    ),
    _cue(
        0.6,
        "exit errno error",
        r"\bexit(?:ed with)? (?:status|code) \d|\b(?:errno|error code) \d",
    ),
)

_MATH = (
    _cue(
        0.9,
        "\\",
        r"\\(?:frac|sqrt|sum|int|cdot|times|leq?|geq?|pi|theta|alpha|triangle|angle|lim|log|sin|cos"
        r"|begin\{(?:aligned|equation|matrix|pmatrix))",
    ),
    _cue(0.7, "$", r"\$[^$\n]{1,120}[\\^_=+<>][^$\n]{0,120}\$"),
    _cue(0.7, "^", r"\w\)?\^[{(]?-?\w"),
    _cue(0.6, "² ³ √ ∑ ∫ π ≤ ≥ ≠ × ÷", r"[²³√∑∫π≤≥≠×÷]"),
    _cue(0.8, "+ * × ÷", r"\d ?[+*×÷] ?-?\(?\d"),
    _cue(0.6, "- /", r"\d\)? [-/] \(?-?\d{1,9}(?![\d/-])"),
    _cue(
        0.8,
        "=",
        r"\b\d{0,6}[a-z] ?[-+*/] ?\d{1,6}[a-z]? ?=|= ?\d{0,6}[a-z] ?[-+] ?\d",
    ),
    _cue(0.6, "= x y z", r"\b[xyz] ?= ?-?\d|\b[fgh]\([xtn]\) ?=|\b\d{1,6}[xyz]\b"),
    _cue(0.6, "=", r"\d\)? ?= ?\??\s{0,4}\Z"),
    _cue(
        0.6,
        "sin cos tan log ln sqrt mod",
        r"\b(?:sin|cos|tan|log|ln|sqrt|mod)\(?\d|\b(?:sin|cos|tan|log|ln)\([a-z0-9]",
    ),
    _cue(
        0.6,
        "% percent times plus minus divided multiplied",
        r"\d ?% of\b|\d (?:percent|plus|minus|divided by|multiplied by)\b|\d times \d",
    ),
)

_NUMBER = r"\d[\d,]{0,15}(?:\.\d{1,9})?"
_NUMBER_WORD_LIST = """
    two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty
    hundred half twice double triple dozen third quarter
"""
_NUMBER_WORDS = frozenset(_NUMBER_WORD_LIST.split())
_QUANTITY_NEEDLES = ("how ", "How ", "what ", "What ", "Find ", "find ")
_QUANTITY_QUESTION = (
    r"\bhow (?:many|much|far|long|old|fast|tall|often)\b|\bwhat percent"
    r"|\b(?:what (?:is|was|will be|are)|find) (?:the |his |her |their |its |your )?"
    r"(?:\w{1,20} ){0,2}(?:total|sum|number|average|mean|cost|price|area|volume|perimeter|"
    r"percentage|probability|speed|distance|ratio|value|difference|product|remainder|profit|"
    r"length|width|height|angle)\b"
)
_WORD_PROBLEM_NUMBERS = 2

_SQL = (
    _cue(
        0.9,
        "SELECT select INSERT CREATE ALTER DELETE GROUP JOIN UPDATE",
        r"\b(?:SELECT|select) [^;\n]{1,200}?\s(?:FROM|from)\s+\w|\b(?:INSERT INTO|CREATE TABLE|"
        r"ALTER TABLE|DELETE FROM|GROUP BY|(?:INNER|LEFT|OUTER) JOIN)\b|\bUPDATE \w{1,60} SET\b",
    ),
    _cue(0.6, ".", r"\w\.(?:csv|tsv|xlsx?|parquet|sqlite)\b"),
)
_PIPE_ROW = r"^[^|\n]{0,200}\|[^|\n]{0,200}\|[^\n]{0,600}$"
_ONE_PIPE_ROW = r"^[^|\n]{1,200}\|[^|\n]{1,200}$"
_COMMA_ROW = r"^[^,\n]{1,80},[^,\n]{0,80}(?:,[^,\n]{0,80}){1,30}$"
_PAIR_ROW = r"^[^,\s][^,\n]{0,40},[^,\s][^,\n]{0,40}$"
_TAB_ROW = r"^[^\t\n]{0,200}\t[^\n]{1,600}$"
_ROWS = (
    ("|", _PIPE_ROW, 2),
    ("|", _ONE_PIPE_ROW, 3),
    (",", _COMMA_ROW, 3),
    (",", _PAIR_ROW, 3),
    ("\t", _TAB_ROW, 3),
)

# An English question that quotes another script usually asks about that language.
_QUOTED_SCRIPT = 0.3


def code_shape(text: str) -> float:
    """The strength of code: fences, definitions, calls, stack traces, shell lines, file names."""
    return _noisy_or(_strengths(_CODE, excerpt(text)))


def math_shape(text: str) -> float:
    """The strength of mathematics: formulas, arithmetic, or a question about several numbers that
    are not in a table."""
    text = excerpt(text)
    strengths = _strengths(_MATH, text)
    problem = _word_problem(text)
    if problem and not _table_rows(text):
        strengths.append(problem)
    return _noisy_or(strengths)


def table_shape(text: str) -> float:
    """The strength of tables: rows of pipes, commas or tabs, SQL, names of data files."""
    text = excerpt(text)
    return _noisy_or([*_strengths(_SQL, text), _table_rows(text)])


def non_english(text: str, language: Language | None = None) -> float:
    """The confidence that the text is in a language other than English, known or unknown.

    language: the result of `detect` for the text, if it is available already.
    """
    code, confidence = language or detect(text)
    if code not in (None, "en"):
        return round((1 + confidence) / 2, 3)
    if code is None:
        share = foreign_letter_share(text)
        if share > 0.5:
            return 0.9
        if share > 0.1 and len(text.split(None, 4)) > 4:
            return 0.6
    return _QUOTED_SCRIPT if has_foreign_script(text) else 0.0


_SHAPES: dict[RouteFeature, Callable[[str], float]] = {
    "code_shape": code_shape,
    "math_shape": math_shape,
    "table_shape": table_shape,
}


def measure(text: str, language: Language | None = None) -> dict[RouteFeature, float]:
    """Every feature of `text`, or of an excerpt of a long text, with a strength above 0."""
    text = excerpt(text)
    found: dict[RouteFeature, float] = {"non_english": non_english(text, language)}
    for name, shape in _SHAPES.items():
        found[name] = shape(text)
    return {name: strength for name, strength in found.items() if strength > 0}


def _strengths(cues: Iterable[Cue], text: str) -> list[float]:
    found = []
    for strength, needles, pattern in cues:
        for needle in needles:  # a loop, because `any` over a generator takes twice as long
            if needle in text:
                if compiled(pattern, re.MULTILINE).search(text):
                    found.append(strength)
                break
    return found


def _noisy_or(strengths: Iterable[float]) -> float:
    """The combined strength, in [0, 1]: one strong cue is enough, several weak ones add up."""
    missing = 1.0
    for strength in strengths:
        missing *= 1.0 - strength
    return round(1.0 - missing, 3)


def _word_problem(text: str) -> float:
    if not any(needle in text for needle in _QUANTITY_NEEDLES):
        return 0.0
    if not compiled(_QUANTITY_QUESTION, re.IGNORECASE).search(text):
        return 0.0
    numbers = len(compiled(_NUMBER, re.MULTILINE).findall(text)) + sum(
        w in _NUMBER_WORDS for w in text.lower().split()
    )
    return 0.0 if numbers < _WORD_PROBLEM_NUMBERS else min(0.8, 0.4 + 0.1 * numbers)


def _table_rows(text: str) -> float:
    lines = text.count("\n") + 1
    strengths = (
        _even_rows(compiled(pattern, re.MULTILINE).findall(text), separator, enough)
        for separator, pattern, enough in _ROWS
        if lines >= enough and separator in text
    )
    return max(strengths, default=0.0)


def _even_rows(rows: list[str], separator: str, enough: int) -> float:
    """The strength of a table: several rows with equally many separators, or many with some."""
    widths = Counter(row.count(separator) for row in rows)
    same = max(widths.values(), default=0)
    if same >= enough:
        return min(0.9, 0.5 + 0.1 * (same - enough + 1))
    return 0.5 if sum(count for width, count in widths.items() if width > 2) > enough else 0.0
