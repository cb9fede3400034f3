"""Lists of bare keywords around a question: "python sql docker poem. How do I boil an egg?"

Such a list says what a prompt would like to be found by, and nothing about what it asks, so routers
leave it out. A clause is a list if it names topics without a word that joins them, or several
topics at once; the rest of the prompt has to be a question or a request of its own. Only the ends
of a short prompt are looked at, and nothing that a colon introduces, unless it is called tags or
keywords: that is mostly what the request is about.
"""

import re
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
_LEAST_NAMED = 0.3  # share of the words of a list that name topics
_BARE = 0.75  # the same of a list in brackets
_GAP = 3  # words in a row, within a pile of topics, that name none
_AROUND = " \t\n.!;:|-–—~,()[]/=>…"
_SPACED = dict.fromkeys(map(ord, '#@.,;:!?()[]"“”|/'), " ")
_BRACKETED = r"\s*[(\[][^()\[\]\n]{8,200}[)\]]"
_CLAUSE_END = (
    r"[.!?;:|\n。！？；：…]+(?:\s+|$)|\s+(?:[-–—]+|//|::|=>|->|~)\s+"
    r"|[(\[](?=\w+[^()\[\]]{8,200}[)\]]$)"
)
_KEYWORD = r"[#@.]?[^\W\d_][\w+#'’-]*"
_LIST = rf"[\"“*•·-]*{_KEYWORD}(?:[\s,/+&*•·→=>\\|\"“”`、，-]+{_KEYWORD})*[\"”]?"
_WORD = r"[#@]?[^\W_][\w+#'’-]*"
_OPENING_WORDS = (
    r"(?:how (?:do|does|can|to|much|many|long|old|often|is|are|would|should|come)"
    r"|what(?:'s|’s| is| are| does| do| time| would| should)|why (?:do|does|is|are|did|would)"
    r"|who (?:is|was|are)|where (?:is|are|do|can|does)|when (?:is|does|do|did|was)"
    r"|can (?:you|i|we)|could you|please|should i|is it|tell me|give me|do (?:you|i|we)"
    r"|(?:write|tell|make|give|explain|find) (?:an?|the|me|us))\b"
)
_OPENING = rf"(?i)(?<=\s){_OPENING_WORDS}|(?<=\s)¿"
# What people say when they come to the point.
_LEADING_ON = (
    r"(?i)(?:[,.;]? (?:ok|okay|so|now|anyway|anyhow|but|and|real|actual|question|then)){1,4}$"
)
# What may stand between a pile of topics and a question: a few words, and a sign.
_SIGN = r"[\])]?(?:\s*[.!;:|\n…]+\s*|\s*(?:[-–—]+|//|::|=>|~)\s+|,\s+)"
_AFTER_PILE = (
    _SIGN,
    rf"(?i:\s+(?={_OPENING_WORDS}))|\s+(?=[A-Z¿])",
    rf"(?:[ ,]+[^\W\d_][\w'’-]*){{1,4}}?{_SIGN}",
)
_BEFORE_PILE = r"(?P<sign>[.!?。？！…\n]|[(\[]|\s(?:[-–—]+|//|::|\||#))[^.!?\n]{0,24}$"
_JOINING_TOPICS = "to from in of for into with using that a an the as between by"
_JOINTS = frozenset(_JOINING_TOPICS.split())
_TAGS = r"(?:^|\s)#\w+(?:,?\s+#\w+)+"
_INTRODUCED = (
    r"(?i)^\W*(?:tags?|keywords?|hashtags?|seo|ignore[\w ]{0,24})\s*[:=]([^.;\n?]{4,200})[.;\n]\s*"
)
_NAMED = r"(?i)\b(?:tags?|keywords?|topics?|seo|ignore[\w ]{0,12})\s*:\s*$"


class KeywordLists(NamedTuple):
    """A text without the lists around it, and these lists."""

    text: str
    lists: str


def without_keyword_lists(text: str, *, only_piles: bool = False) -> KeywordLists:
    """Separate the lists of keywords at the ends of a short text from the rest of it. only_piles:
    none but words of several topics, for a text whose other words may be options or data."""
    if len(text) > _MOST_CHARS:
        return KeywordLists(text, "")
    if not only_piles and _may_have_lists(text):
        found = _without_clauses(text)
        if found is not None:
            rest = _without_piles(found.text)
            return KeywordLists(rest.text, f"{found.lists} {rest.lists}".strip())
    return _without_piles(text)


def _without_piles(text: str) -> KeywordLists:
    lists = []
    for _end in range(2):
        found = _without_pile(text)
        if found is None:
            break
        text = found.text
        lists.append(found.lists)
    return KeywordLists(text, " ".join(lists))


def _without_clauses(text: str) -> KeywordLists | None:
    """The text without the clauses at its ends that are lists."""
    tags = compiled(_TAGS).search(text) if text.count("#") > 1 else None
    clauses = _clauses(text if tags is None else compiled(_TAGS).sub(" ", text))
    first = _listed(clauses)
    while 0 < first < len(clauses) - 1 and _is_more(clauses[first]):
        first += 1
    last = len(clauses) - _listed(clauses[:first:-1])
    before = clauses[last - 1].rstrip() if last > first else ""
    if not compiled(_NAMED).search(before) and (
        before.endswith((":", "：")) or not _is_apart(clauses[last:])
    ):
        last = len(clauses)  # what the request is about
    asked = "".join(clauses[first:last]).strip()
    if (first == 0 and last == len(clauses) and tags is None) or not _is_asking(asked):
        return None
    lists = [*clauses[:first], *clauses[last:], *([] if tags is None else [tags[0]])]
    return KeywordLists(asked, " ".join(lists).strip())


def _without_pile(text: str) -> KeywordLists | None:
    """The text without words of several topics, one after the other, in brackets or at one of its
    ends; None if there are none, or nothing is asked beside them."""
    known = topic_words()
    if sum(word in known for word in text.casefold().translate(_SPACED).split()) < _LEAST_WORDS:
        return None
    words = list(compiled(_WORD).finditer(text))
    topics = [known.get(word[0].casefold().lstrip("#@")) for word in words]
    found = _without_brackets(text) or _without_start(text, words, topics)
    if found is None and not text.rstrip().endswith("?"):
        found = _without_end(text, words[::-1], topics[::-1])
    return found if found is not None and _is_asking(found.text) else None


def _without_brackets(text: str) -> KeywordLists | None:
    for found in compiled(_BRACKETED).finditer(text):
        words = [word.casefold() for word in _words(found[0])]
        named = [topic_words()[word] for word in words if word in topic_words()]
        is_bare = len(set(named)) > 1 and _LEAST_WORDS <= len(named) >= _BARE * len(words)
        if (is_bare or _is_pile(named, len(words))) and not _has_joints(found[0]):
            asked = f"{text[: found.start()].rstrip()}{text[found.end() :]}".strip()
            return KeywordLists(asked, found[0])
    return None


def _without_start(
    text: str, words: Sequence[re.Match[str]], topics: Sequence[str | None]
) -> KeywordLists | None:
    found = compiled(_INTRODUCED).match(text)
    if found is not None and sum(w.casefold() in topic_words() for w in _words(found[1])) > 1:
        return KeywordLists(text[found.end() :].strip(), found[0].strip())
    count = _piled(topics, words, text)
    if not 0 < count < len(words):
        return None
    for pattern in _AFTER_PILE:
        cut = compiled(pattern).match(text, words[count - 1].end())
        if cut is not None and _is_asking(text[cut.end() :]):
            return KeywordLists(text[cut.end() :].strip(), text[: cut.end()].strip())
    return None


def _without_end(
    text: str, words: Sequence[re.Match[str]], topics: Sequence[str | None]
) -> KeywordLists | None:
    """words, topics: from the last one to the first."""
    count = _piled(topics, words, text)
    if not 0 < count < len(words):
        return None
    asked = text[: words[count - 1].start()]
    cut = compiled(_BEFORE_PILE).search(asked)
    if cut is not None:
        if asked[: cut.start() + 1].rstrip().endswith((":", "：")):
            return None  # what the request is about
        at = cut.start() + len(cut["sign"])
        return KeywordLists(text[:at].strip(" \n([#"), text[at:].strip())
    named = set(topics[:count])
    if count > _LEAST_WORDS and None not in named and len(named) >= _TOPICS_AT_ONCE:
        return KeywordLists(asked.rstrip(" ,"), text[len(asked) :])  # it needs no sign before it
    return None


def _piled(topics: Sequence[str | None], words: Sequence[re.Match[str]], text: str) -> int:
    """The number of words, from the first on, that are a pile of topics."""
    best = gap = 0
    named = list[str]()
    for place, topic in enumerate(topics):
        if place:
            one, other = sorted((words[place - 1].span(), words[place].span()))
            between = text[one[1] : other[0]]
            if "?" in between:
                break
        if topic is None:
            gap += 1
            word = words[place][0].casefold()
            if gap > _GAP or (best and (word in _joining_words() or word in _verbs())):
                break
            continue
        gap = 0
        named.append(topic)
        if _is_pile(named, place + 1):
            best = place + 1
    if not best:
        return 0
    first, last = sorted((words[0].span(), words[best - 1].span()))
    return 0 if _has_joints(text[first[0] : last[1]]) else best


def _has_joints(pile: str) -> bool:
    """True if words join those of a pile, and no commas part what they join."""
    joints = sum(word in _JOINTS for word in pile.split())
    return joints > 0 and not 1 < pile.count(",") >= joints - 1


def _is_pile(named: Sequence[str], count: int) -> bool:
    """True if so many of `count` words name topics, of so many, as no request does."""
    different = len(set(named))
    if different > _TOPICS_AT_ONCE:
        return len(named) >= _DENSE * count
    if different == _TOPICS_AT_ONCE:
        return len(named) * 2 >= count
    if different > 1:
        return len(named) > _LEAST_WORDS and len(named) * 4 >= count * 3
    return len(named) >= 2 * _LEAST_WORDS and len(named) * 3 >= count * 2


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


def _is_apart(clauses: Sequence[str]) -> bool:
    """True if a list after a request is hardly about it: of several topics, in brackets, or long
    and of nothing but the words of a topic."""
    words = [word.casefold() for clause in clauses for word in _words(clause)]
    topics = [topic_words().get(word) for word in words]
    if len({*topics} - {None}) > 1 or None in topics:
        return len({*topics} - {None}) > 1
    in_brackets = bool(clauses) and clauses[-1].rstrip().endswith((")", "]"))
    has_signs = any("," in clause for clause in clauses)
    return in_brackets or not has_signs or len(words) > _LEAST_WORDS


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
        and words[0].casefold() not in _verbs()
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
    is_joined = words[0].casefold() in _verbs() and _has_joints(clause)
    is_dense = len(named) >= _DENSE * len(words)
    if len(set(named)) >= _TOPICS_AT_ONCE and is_dense and not is_joined:
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
    is_repeated = len(words) > 1 and len(set(words)) == 1
    has_joint = any(word.casefold() in _MAY_JOIN.split() for word in words)
    if has_joint and len(set(named)) < 2 and not words[0].isupper():
        return 0  # "Python and numpy"
    if len(named) * 2 >= len(words) or is_repeated:
        return len(words)
    is_of_topics = len(named) >= _LEAST_NAMED * len(words)
    return len(words) if len(words) >= _LONG and is_of_topics and not has_joint else 0


def _is_asking(text: str) -> bool:
    words = [word.casefold() for word in _words(text)]
    if "?" in text and len(words) > 1:
        return True
    if len(words) < _LEAST_WORDS:
        return False
    return not _joining_words().isdisjoint(words) or words[0] in _verbs()


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
