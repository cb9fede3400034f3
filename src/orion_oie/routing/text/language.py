"""Language detection by script and stop words.

Good enough to distinguish an English question from a foreign one and to name the common languages.
It uses no grammar, does not split mixed texts, and prefers "undecided" to a wrong foreign language.
"""

import re
import unicodedata
from functools import cache
from typing import NamedTuple

from orion_oie.routing.text.excerpt import excerpt
from orion_oie.routing.text.stopwords import (
    ENDINGS,
    LETTERS,
    STOP_WORDS,
)

_HEAD_CHARS, _TAIL_CHARS = 1500, 500
_MIN_CONFIDENCE = 0.33
# Prose scores about 0.3 per word; a long text far below that merely contains foreign names.
_MIN_SCORE_PER_WORD = 0.08

# A character of these scripts carries about as much as this many Latin letters.
_HAN, _KANA, _HANGUL, _CYRILLIC, _ARABIC = "han", "kana", "hangul", "cyrillic", "arabic"
_SCRIPTS: tuple[tuple[str, str, float], ...] = (
    (_HAN, "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]+", 3.0),
    (_KANA, "[\u3041-\u309f\u30a1-\u30ff\u31f0-\u31ff\uff66-\uff9d]+", 2.0),
    (_HANGUL, "[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]+", 2.0),
    (_CYRILLIC, "[\u0400-\u052f]{2,}", 1.0),
    (_ARABIC, "[\u0620-\u064a\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f\ufb50-\ufefc]{2,}", 1.5),
    ("el", "[\u0370-\u03ff\u1f00-\u1fff]{3,}", 1.0),
    ("he", "[\u05d0-\u05ea]{2,}", 1.5),
    ("hi", "[\u0900-\u097f]{2,}", 1.0),
    ("bn", "[\u0980-\u09ff]{2,}", 1.0),
    ("ta", "[\u0b80-\u0bff]{2,}", 1.0),
    ("te", "[\u0c00-\u0c7f]{2,}", 1.0),
    ("th", "[\u0e00-\u0e7f]{2,}", 1.0),
    ("ka", "[\u10a0-\u10ff]{2,}", 1.0),
    ("hy", "[\u0530-\u058f]{2,}", 1.0),
)
_LATIN_RUNS = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+")
_UKRAINIAN = re.compile("[іїєґІЇЄҐ]")
_URDU = re.compile("[ٹڈڑںے]")
_PERSIAN = re.compile("[پچژگ]")

# A quotation is the subject of a text; the words around it are the writer's own.
_QUOTED = re.compile(
    r"```.{0,2000}?```|`[^`\n]{1,200}`|\"[^\"\n]{1,300}\"|“[^”\n]{1,300}”|«[^»\n]{1,300}»"
    r"|(?<!\w)'[^'\n]{1,200}'(?!\w)",
    re.DOTALL,
)
_QUOTES = "`\"\u201c\u00ab'"
# Code has English keywords and names in any language, so text in brackets is ignored and the words
# around it have to be clearer than in prose.
_CODE_MARK = re.compile(r"[{}=]|\w\(|;\s*$", re.MULTILINE)
_CODE_SIGNS = "{}=(;"  # without any of them there is no mark
_BRACKETS = re.compile(r"\{[^{}]{0,500}\}|\([^()\n]{0,200}\)")
_MIN_SCORE_BESIDE_CODE = 1.2

_WORD = re.compile("[a-z\u00c0-\u024f\u1e00-\u1eff]+")

# English stop words that are also keywords of programming languages say little about prose.
_CODE_WORD_LIST = """
    for in if is not and or as from with while do this new list find all any out has an one get
    show let make each by first last
"""
_CODE_WORDS = frozenset(_CODE_WORD_LIST.split())
# A neighbouring language takes little of the weight of a word it shares with a named language.
_NAMED = frozenset(("en", "fr", "es", "de", "it", "pt"))
_NEIGHBOUR_SHARE = 0.25
_SHORT_WORD_WEIGHT = 0.4
_CODE_WORD_WEIGHT = 0.4
_LETTER_WEIGHT = 0.35
_ENDING_WEIGHT = 0.4
_LONGEST_WITHOUT_ENDING = 5
_UNKNOWN_ASCII_WEIGHT = 0.1
_UNKNOWN_ASCII_LIMIT = 0.8


# Built when first needed, which keeps imports fast.
@cache
def _script_runs() -> list[tuple[str, re.Pattern[str], float]]:
    return [(name, re.compile(pattern), weight) for name, pattern, weight in _SCRIPTS]


class Language(NamedTuple):
    """An ISO 639-1 code, or None when undecided, and a confidence in [0, 1]."""

    code: str | None
    confidence: float


UNDECIDED = Language(None, 0.0)


def detect(text: str) -> Language:
    """The language of most of `text`, judged by its start and its end.

    Detected by script: zh, ja, ko, ar, ru, and further languages with a script of their own.
    Detected by words: en, fr, es, de, it, pt, and some neighbours that would be mistaken for them.
    """
    text = excerpt(text, _HEAD_CHARS, _TAIL_CHARS)
    if not text.isascii():
        # A foreign request may precede a long piece of code, so its first line may decide as well.
        first_line = text.lstrip().partition("\n")[0]
        for part in (text, first_line):
            found = _by_script(part)
            if found.code is not None:
                return found
    return _by_words(_without_quotes(text))


def foreign_letter_share(text: str) -> float:
    """The share of letters outside ASCII in the start and the end of `text`, in [0, 1]."""
    text = excerpt(text, _HEAD_CHARS, _TAIL_CHARS)
    if text.isascii():
        return 0.0
    letters = sum(map(str.isalpha, text))
    return sum(1 for char in text if char > "\x7f" and char.isalpha()) / letters if letters else 0.0


def has_foreign_script(text: str) -> bool:
    """True if the start or the end of `text` has words in a script other than Latin."""
    text = excerpt(text, _HEAD_CHARS, _TAIL_CHARS)
    return not text.isascii() and any(pattern.search(text) for _, pattern, _ in _script_runs())


def _by_script(text: str) -> Language:
    runs = {name: "".join(pattern.findall(text)) for name, pattern, _ in _script_runs()}
    sizes = {name: len(runs[name]) * weight for name, _, weight in _script_runs()}
    east_asian = sizes[_HAN] + sizes[_KANA]
    sizes[_HAN], sizes[_KANA] = east_asian, 0.0
    script = max(sizes, key=lambda name: sizes[name])
    size = sizes[script]
    if not size:
        return UNDECIDED
    latin = "".join(_LATIN_RUNS.findall(text))
    share = size / (sum(sizes.values()) + len(latin))
    # Latin letters in a foreign text are mostly names and code; an English sentence is not.
    needed = 0.55 if _by_words(_without_quotes(text)).code is not None else 0.25
    if share < needed:
        return UNDECIDED
    if script == _HAN:
        script = "ja" if len(runs[_KANA]) * 12 > len(runs[_HAN]) else "zh"
    elif script == _HANGUL:
        script = "ko"
    elif script == _CYRILLIC:
        script = "uk" if _UKRAINIAN.search(runs[_CYRILLIC]) else "ru"
    elif script == _ARABIC:
        script = _arabic_script_language(runs[_ARABIC])
    return Language(script, round(min(1.0, 0.5 + share / 2), 3))


def _arabic_script_language(run: str) -> str:
    if _URDU.search(run):
        return "ur"
    return "fa" if _PERSIAN.search(run) else "ar"


def _without_quotes(text: str) -> str:
    if not any(map(text.__contains__, _QUOTES)):
        return text
    rest = _QUOTED.sub(" ", text)
    return rest if len(_LATIN_RUNS.findall(rest)) >= 3 else text


def _by_words(text: str) -> Language:
    may_be_code = any(map(text.__contains__, _CODE_SIGNS))
    beside_code = may_be_code and _CODE_MARK.search(text) is not None
    if beside_code:
        text = _BRACKETS.sub(" ", text)
    words = _WORD.findall(text.lower())
    if not words:
        return UNDECIDED
    scores = dict.fromkeys(STOP_WORDS, 0.0)
    unknown_ascii = 0
    known = _word_weights()
    for word in words:
        weights = known.get(word)
        if weights:
            for language, weight in weights:
                scores[language] += weight
            continue
        unknown_ascii += word.isascii()
        if len(word) > _LONGEST_WITHOUT_ENDING:
            for language, endings in ENDINGS.items():
                if word.endswith(endings):
                    scores[language] += _ENDING_WEIGHT
    if not text.isascii():
        lowered = text.lower()
        for letter, languages in LETTERS.items():
            count = min(3, lowered.count(letter))
            for language in languages if count else ():
                scores[language] += count * _LETTER_WEIGHT / len(languages)
    scores["en"] += min(_UNKNOWN_ASCII_LIMIT, _UNKNOWN_ASCII_WEIGHT * unknown_ascii)
    needed = _MIN_SCORE_BESIDE_CODE if beside_code else 0.0
    return _decide(scores, max(needed, _MIN_SCORE_PER_WORD * len(words)))


def _decide(scores: dict[str, float], needed: float) -> Language:
    (code, best), (_, second) = sorted(scores.items(), key=lambda item: -item[1])[:2]
    if best <= 0 or best < needed:
        return UNDECIDED
    confidence = best / (best + 0.8) * (0.4 + 0.6 * (best - second) / best)
    if confidence < _MIN_CONFIDENCE:
        return UNDECIDED
    return Language(code, round(confidence, 3))


def _unaccented(word: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))


@cache
def _word_weights() -> dict[str, tuple[tuple[str, float], ...]]:
    """The weights of each stop word by language; they share a total of one among the languages."""
    owners: dict[str, set[str]] = {}
    for language, words in STOP_WORDS.items():
        for word in words:
            for form in {word, _unaccented(word)} if len(word) > 1 else {word}:
                owners.setdefault(form, set()).add(language)
    return {
        word: tuple(
            (language, _word_weight(word, language, languages)) for language in sorted(languages)
        )
        for word, languages in owners.items()
    }


def _word_weight(word: str, language: str, languages: set[str]) -> float:
    sharers = sum(1.0 if other in _NAMED else _NEIGHBOUR_SHARE for other in languages)
    weight = (_SHORT_WORD_WEIGHT if len(word) == 1 else 1.0) / max(1.0, sharers)
    return weight * _CODE_WORD_WEIGHT if language == "en" and word in _CODE_WORDS else weight
