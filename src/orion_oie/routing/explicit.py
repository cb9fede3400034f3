"""Explicit requests for a topic: "translate this into Polish", "in SQL", "write it in Rust".

A few patterns that are nearly always right, each for one topic. Anything less certain is left to
the linear model.
"""

import re
from collections.abc import Mapping

from orion_oie.routing.text.compiled import compiled

_LANGUAGES = (
    "arabic|bengali|bulgarian|catalan|chinese|croatian|czech|danish|dutch|english|estonian|finnish"
    "|french|german|greek|hebrew|hindi|hungarian|icelandic|indonesian|irish|italian|japanese|korean"
    "|latin|latvian|lithuanian|malay|mandarin|norwegian|persian|farsi|polish|portuguese|punjabi"
    "|romanian|russian|serbian|slovak|slovene|slovenian|spanish|swahili|swedish|tagalog|tamil"
    "|telugu|thai|turkish|ukrainian|urdu|vietnamese|welsh|yoruba|zulu"
)
_PROGRAMMING = (
    r"python|java|javascript|typescript|rust|golang|c\+\+|c#|kotlin|php|ruby|bash|haskell|perl|scala"
    r"|powershell|julia|lua"
)
_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "multilingual": (
        rf"\btranslat\w{{1,4}}\b.{{0,80}}\b(?:in)?to (?:\w{{2,12}} )?(?:{_LANGUAGES})\b",
        rf"\b(?:answer|reply|respond|write back) (?:to me )?(?:only )?in (?:{_LANGUAGES})\b",
        rf"\bhow (?:do|would|can|to) (?:\w{{1,8}} )?(?:say|write|spell|pronounce)\b.{{0,80}}"
        rf"\bin (?:{_LANGUAGES})\b",
    ),
    "data": (r"\b(?:in|using) sql\b(?!-)", r"\bsql (?:query|statement)\b"),
    "code": (
        rf"\b(?:write|implement|code|port|rewrite|convert|create|build)\b.{{0,80}}\b"
        rf"(?:function|program|script|class|method|code|parser|server|cli)\b.{{0,60}}"
        rf"\bin (?:{_PROGRAMMING})(?![\w+#])",
    ),
}
_MAX_CHARS = 400


# The patterns of a topic are tried only if the text has one of these words.
_NEEDLES: Mapping[str, tuple[str, ...]] = {
    "multilingual": ("translat", "answer", "reply", "respond", "write back", "how "),
    "data": ("sql",),
    "code": (" in ",),
}


def explicit_request(instruction: str) -> tuple[str, str] | None:
    """The topic that an instruction requests explicitly, and the words that do so without
    unprintable characters; None without a request, or if two topics are requested."""
    text = instruction[:_MAX_CHARS]
    lowered = text.lower()
    found: dict[str, str] = {}
    for topic, patterns in _PATTERNS.items():
        if not any(needle in lowered for needle in _NEEDLES[topic]):
            continue
        for pattern in patterns:
            match = compiled(pattern, re.IGNORECASE).search(text)
            if match:
                found[topic] = "".join(filter(str.isprintable, match.group()))
                break
    if len(found) != 1:
        return None
    return next(iter(found.items()))
