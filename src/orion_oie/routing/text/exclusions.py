"""What a prompt says that it is not about: "not a translation: ...", "without code, ...", "I don't
want a poem, just ...".

Such words name a topic only to exclude it, so they are taken out. Two forms are recognized: a
clause that begins with a denial and stands before or after what is asked instead, and a denial
anywhere that names a kind of answer. All else that a prompt denies is part of its question. Knows
English, and the most common forms of a few other languages.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from orion_oie.routing.text.compiled import compiled

# The names of kinds of answers, by the topic that they are of.
_KINDS: Mapping[str, str] = {
    "code": (
        r"cod(?:e|es|ing)|programs?|programming|scripts?|snippets?|python|javascript|regex(?:es)?"
        r"|bash|commands?|html|css|programa|código|programm"
    ),
    "data": (
        r"sql|quer(?:y|ies)|tables?|spreadsheets?|csv|json|statistics|stats|datasets?|excel|charts?"
    ),
    "creative": (
        r"poems?|poetry|poetic|verses?|rhym(?:e|es|ing)|stor(?:y|ies|ytelling)|fiction(?:al)?"
        r"|novels?|songs?|lyrics|limericks?|haikus?|essays?|fairy tales?|role-?play(?:ing)?"
        r"|slogans?|gedichte?|poema|poème|cuento|histoire|racconto"
    ),
    "multilingual": (
        r"translat(?:e|es|ed|ing|ions?)|french|german|spanish|italian|portuguese|dutch|polish"
        r"|russian|chinese|japanese|korean|arabic|übersetzung|traducción|traduction|traduzione"
        r"|tradução"
    ),
    "math": (
        r"maths?|mathematics|calculat(?:e|ing|ions?)|equations?|formulas?|formulae|proofs?|algebra"
        r"|arithmetic|fórmulas?|probability"
    ),
    "logic": r"logic(?:al)?|riddles?|puzzles?|brain ?teasers?|syllogisms?|fallac(?:y|ies)",
}
_KIND = "|".join(f"(?P<{topic}>{words})" for topic, words in _KINDS.items())
_DO_NOT = (
    r"do(?:n't|n’t| not|nt) (?:even |just |really )?(?:give|write|make|use|turn|want|need|translate"
    r"|show|send|add|start|include|tell|compose|bother|analy[sz]e|solve|explain|code|calculate"
    r"|prove|put|produce|create|summari[sz]e|reply|rewrite|fix|answer)"
)
_NOT_AFTER = r"not (?:asking|looking|interested|after|trying|about|meant|wanting)"
_OFFERED = r"without|rather than|instead of|skip|avoid|leave out|forget(?: about)?|never mind"
_AT_START = (
    rf"(?:i(?:'m|’m|m| am)? |we |it |this )?(?:{_DO_NOT}|{_NOT_AFTER})|{_OFFERED}|no need"
    r"|no(?! one| longer| matter| idea| such| wonder| problem)|not(?! sure| all| every| only| even)"
    r"|nothing|this (?:is not|isn't)|it(?:'s| is) not|kein(?:e|en)?|ohne|sans|pas de|senza|sem"
)
_ANYWHERE = rf"{_DO_NOT}|{_NOT_AFTER}|{_OFFERED}|ohne|sans|senza|sem"
_CUE_WORDS = """
    no not nothing without rather instead skip avoid leave forget never don't don’t dont isn't
    kein keine keinen ohne sans pas senza sem
"""
_CUES = frozenset(_CUE_WORDS.split())  # a text without any of these words has no exclusion
_STOP = r"just|only|but|because|tell me|give me|i want|i need|i'd like|i only"
_BEFORE = r"^|(?<=[.,;:!?(—–\n]) ?|(?<=- )|(?<=\bplease )|(?<=\band )|(?<=\bbut )"
_CLAUSE = (
    rf"(?i)(?:{_BEFORE})(?:{_AT_START})\b"
    rf"(?P<rest>(?:(?! (?:{_STOP})\b)[^.,;:!?\n—–]){{1,90}})(?:[.,;:!?\n—–]|(?= (?:{_STOP})\b)|$)"
)
_NAMED = (
    rf"(?i)\b(?:{_ANYWHERE})(?: (?!(?:{_STOP})\b)[\w'’/-]{{1,20}}){{0,4}}?"
    rf" (?:{_KIND})\b(?:,? (?:and|or|nor|no) (?:an? |the )?[\w'-]{{1,20}})?(?: please\b)?"
)
_STATEMENT = r"(?i)\b(?:is|are|was|were|can|could|has|have|does|do|did|will)\b"
_SEARCHED_CHARS = 500  # a request is short; the rest of a long text is not searched
_LEAST_WORDS = 3  # of what is asked instead
_EDGES = " \t\n,;:.!—–-"


class Exclusions(NamedTuple):
    """The text without what it excludes, and the topics that it excludes."""

    text: str
    topics: frozenset[str]


def without_exclusions(text: str) -> Exclusions:
    """Take the exclusions out of a text. A topic that the rest of it names again is not excluded,
    as in "not a poem but a story"; nor is anything if there is hardly a rest."""
    head = text[:_SEARCHED_CHARS]
    words = head.lower().split()
    if _CUES.isdisjoint(words) and _CUES.isdisjoint(word.lstrip("(—–-") for word in words):
        return Exclusions(text, frozenset())
    spans = [found.span() for found in compiled(_CLAUSE).finditer(head) if _is_denial(found)]
    for found in compiled(_NAMED).finditer(head):
        if not any(start < found.end() and found.start() < end for start, end in spans):
            spans.append(found.span())
    if not spans:
        return Exclusions(text, frozenset())
    kept, dropped, at = [], [], 0
    for start, end in sorted(spans):
        kept.append(text[at:start])
        dropped.append(text[start:end])
        at = end
    rest = " ".join([*kept, text[at:]]).strip(_EDGES)
    if len(rest.split(None, _LEAST_WORDS)) < _LEAST_WORDS:
        return Exclusions(text, frozenset())
    named = compiled(rf"(?i)\b(?:{_KIND})\b")
    denied = {str(found.lastgroup) for piece in dropped for found in named.finditer(piece)}
    if denied:
        denied -= {str(found.lastgroup) for found in named.finditer(rest[:_SEARCHED_CHARS])}
    return Exclusions(rest, frozenset(denied))


def _is_denial(found: re.Match[str]) -> bool:
    """False for a statement, such as "no poet is a dreamer"."""
    starts_bare = found[0].lstrip().lower().startswith(("no ", "not ", "nothing ", "kein"))
    return not (starts_bare and compiled(_STATEMENT).search(found["rest"]))
