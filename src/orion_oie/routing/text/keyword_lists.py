"""Lists of bare keywords around a question: "python sql docker poem. How do I boil an egg?"

Such a list says what a prompt would like to be found by, and nothing about what it asks, so routers
leave it out. A clause is a list if it names topics without a word that joins them, or several
topics at once; the rest of the prompt has to be a question or a request of its own. Only the ends
of a short prompt are looked at, and nothing that a colon introduces, unless it is called tags or
keywords: that is mostly what the request is about.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from orion_oie.routing.text import segment_patterns as patterns
from orion_oie.routing.text.compiled import compiled
from orion_oie.routing.text.stopwords import any_stop_words
from orion_oie.routing.text.topic_words import topic_words

_MOST_CHARS = 600
_LEAST_WORDS = 3  # of a list, and of the question beside it
_MOST_WORDS = 40
_SEEN_WORDS = 2  # at the start of a text, of which one joins others if there is no list
_MORE_WORDS = 5  # of a clause beside a list that belongs to it
_LONG = 5  # words of a list that need not name topics
_TOPICS_AT_ONCE, _DENSE = 3, 0.4  # so many topics, in so many words, nobody means as a request
_AROUND = " \t\n.!;:|-–—~,()[]/=>…"
_CLAUSE_END = (
    r"[.!?;:|\n。！？；：…]+(?:\s+|$)|\s+(?:[-–—]+|//|::|=>|->|~)\s+"
    r"|[(\[](?=\w+[^()\[\]]{8,200}[)\]]$)"
)
_KEYWORD = r"[#@.]?[^\W\d_][\w+#'’-]*"
_LIST = rf"[\"“*•·-]*{_KEYWORD}(?:[\s,/+&*•·→=>\\|\"“”`、，-]+{_KEYWORD})*[\"”]?"
_WORD = r"[#@]?[^\W_][\w+#'’-]*"
_OPENING = (
    r"(?i)(?<=\s)(?:how (?:do|does|can|to|much|many|long|old|often|is|are|would|should|come)"
    r"|what(?:'s|’s| is| are| does| do| time| would| should)|why (?:do|does|is|are|did|would)"
    r"|who (?:is|was|are)|where (?:is|are|do|can|does)|when (?:is|does|do|did|was)"
    r"|can (?:you|i|we)|could you|please|should i|is it|tell me|give me|do (?:you|i|we)"
    r"|(?:write|tell|make|give|explain|find) (?:an?|the|me|us))\b|(?<=\s)¿"
)
# What people say when they come to the point.
_LEADING_ON = (
    r"(?i)(?:[,.;]? (?:ok|okay|so|now|anyway|anyhow|but|and|real|actual|question|then)){1,4}$"
)
_TAGS = r"(?:^|\s)#\w+(?:,?\s+#\w+)+"
_NAMED = r"(?i)\b(?:tags?|keywords?|topics?|seo|ignore[\w ]{0,12})\s*:\s*$"


class KeywordLists(NamedTuple):
    """A text without the lists around it, and these lists."""

    text: str
    lists: str


def without_keyword_lists(text: str) -> KeywordLists:
    """Separate the lists of keywords at the ends of a short text from the rest of it."""
    if len(text) > _MOST_CHARS or not _may_have_lists(text):
        return KeywordLists(text, "")
    tags = compiled(_TAGS).search(text) if text.count("#") > 1 else None
    clauses = _clauses(text if tags is None else compiled(_TAGS).sub(" ", text))
    first = _listed(clauses)
    while 0 < first < len(clauses) - 1 and _is_more(clauses[first]):
        first += 1
    last = len(clauses) - _listed(clauses[:first:-1])
    before = clauses[last - 1].rstrip() if last > first else ""
    if before.endswith((":", "：")) and not compiled(_NAMED).search(before):
        last = len(clauses)
    asked = "".join(clauses[first:last]).strip()
    if (first == 0 and last == len(clauses) and tags is None) or not _is_asking(asked):
        return KeywordLists(text, "")
    lists = [*clauses[:first], *clauses[last:], *([] if tags is None else [tags[0]])]
    return KeywordLists(asked, " ".join(lists).strip())


def _listed(clauses: Sequence[str]) -> int:
    """The number of clauses from the first one on that make a list of keywords together."""
    words = count = 0
    for count, clause in enumerate(clauses):  # noqa: B007 (the count is the result)
        found = _keywords(clause)
        if not found:
            break
        words += found
    else:
        count = len(clauses)
    return count if words >= _LEAST_WORDS else 0


def _may_have_lists(text: str) -> bool:
    """False for nearly all texts, at little cost: a list has no joining word."""
    words = text.split()
    if len(words) < 2 * _LEAST_WORDS:
        return False
    joining = _joining_words()
    ends = [words[:_SEEN_WORDS]]
    if not words[-1].endswith("?"):
        ends.append(words[-_LEAST_WORDS:])
    for end in ends:
        if not any(word.casefold() in joining and not word.isupper() for word in end):
            return True
    return text.count("#") > 1


def _clauses(text: str) -> list[str]:
    """The clauses with the signs that end them; a question that follows a list without any sign is
    a clause as well."""
    found, at = [], 0
    for end in compiled(_CLAUSE_END).finditer(text):
        found.append(text[at : end.end()])
        at = end.end()
    if at < len(text):
        found.append(text[at:])
    if found and not _is_list(found[0]):
        opening = compiled(_OPENING).search(found[0])
        cut = 0 if opening is None else opening.start()
        if not _is_list(found[0][:cut]):
            cut = _run_of_topics(found[0])
        if cut:
            found[:1] = [found[0][:cut], found[0][cut:]]
    return found


def _run_of_topics(clause: str) -> int:
    """The end of the words of several topics, one after the other, that a clause begins with; 0 if
    there are too few."""
    end, named = 0, list[str]()
    for word in compiled(_WORD).finditer(clause):
        topic = topic_words().get(word[0].casefold())
        if topic is None:
            break
        named.append(topic)
        end = word.end()
    return end if len(named) > _LEAST_WORDS and len(set(named)) > 1 else 0


def _is_more(clause: str) -> bool:
    """True for a few words beside a list that name a topic as well."""
    words = _words(clause)
    return (
        "?" not in clause
        and len(words) <= _MORE_WORDS
        and any(word.casefold() in topic_words() for word in words)
    )


def _is_list(clause: str) -> bool:
    return _keywords(clause) >= _LEAST_WORDS


def _keywords(clause: str) -> int:
    """The number of words of a clause that is a list of keywords, 0 for any other clause."""
    if "?" in clause:
        return 0
    words = _words(clause)
    if not 0 < len(words) <= _MOST_WORDS:
        return 0
    known = topic_words()
    named = [known[word.casefold()] for word in words if word.casefold() in known]
    if len(set(named)) >= _TOPICS_AT_ONCE and len(named) >= _DENSE * len(words):
        return max(_LEAST_WORDS, len(words))
    bare = compiled(_LEADING_ON).sub("", clause.strip(_AROUND))
    words = _words(bare)
    if sum(len(word) == 1 for word in words) > 1:
        return 0  # letters are what a puzzle is about
    if compiled(_LIST).fullmatch(bare) is None:
        return 0
    joining = _joining_words()
    if any(word.casefold() in joining and not word.isupper() for word in words):
        return 0
    is_request = words[0].casefold() in _verbs() and "," not in bare
    if is_request and len(words) <= _LEAST_WORDS and len(set(words)) > 1:
        return 0  # "write Python code"
    if len(named) * 2 >= len(words) or len(set(words)) == 1:
        return len(words)
    has_joint = any(word.casefold() in _MAY_JOIN.split() for word in words)
    return len(words) if len(words) >= _LONG and not has_joint else 0


def _is_asking(text: str) -> bool:
    words = [word.casefold() for word in _words(text)]
    if "?" in text and len(words) > 1:
        return True
    if len(words) < _LEAST_WORDS:
        return False
    return not any_stop_words().isdisjoint(words) or words[0] in _verbs()


def _words(text: str) -> list[str]:
    found: list[str] = compiled(_WORD).findall(text)
    return found


@cache
def _joining_words() -> frozenset[str]:
    """Words that hold sentences together, in any of the known languages."""
    return (any_stop_words() - frozenset(_ALSO_KEYWORDS.split())) | frozenset(_MORE.split())


@cache
def _verbs() -> frozenset[str]:
    return frozenset(patterns.ALL_VERBS.split())


_MORE = "в на по как что это из у о я мы вы он она они мне мой где когда почему сколько можно ли"
# Stop words that lists may have as well: names of code, kinds of requests, languages.
_MAY_JOIN = "for in if not and or as from with while new all any out please by where"
_ALSO_KEYWORDS = f"""
    {_MAY_JOIN}
    write explain give tell make create find list show describe translate help english
    example mean français française anglais español inglés
"""
