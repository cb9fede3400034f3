"""Which agent a conversation is with, and when it moves to another.

A turn stays with the agent of the turn before unless it clearly asks otherwise: the odds of that
agent are raised before the best is chosen, more for a turn that leans on what was said, less for
one that says that it does not, and more again soon after a switch. The numbers were fitted on
conversations (see docs/routing.md). Remembers agents, no text; knows no clock.
"""

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from cachetools import LRUCache

SESSIONS = 10_000

STAY = 1.2  # added to the log-odds of the agent that answered last
SHORT, SHORT_WORDS = 0.9, 6
LEANING = 1.2
NEW_TOPIC = -2.2
RESTLESS, RESTLESS_TURNS = 0.6, 2

# A turn that begins like this, or has one of these words, mostly goes on from the last answer.
_LEANING = (
    r"(?i)^\W{0,3}(?:and|but|so|then|also|now|ok(?:ay)?|yes|no|nope|yeah|sure|great|thanks?|hmm+"
    r"|why|how come|what about|how about|what if|same|again|more|another|shorter|longer|continue"
    r"|go on"
    r"|und|aber|jetzt|danke|warum|noch|nein|ja|et|mais|merci|pourquoi|encore|maintenant|oui|non"
    r"|y|pero|gracias|ahora|otra|sí)\b"
    r"|\b(?:it|its|that|this|these|those|them|they|he|she|the (?:first|second|third|last|other|same"
    r"|previous|next)|instead|above|earlier|you (?:said|mentioned|wrote|gave|used)|your (?:answer"
    r"|version|code|example|last)|step \d|line \d|the (?:one|part|result|output|table|poem|story"
    r"|function|query|code|text|sentence|answer|picture|image|photo))\b"
    r"|^.{0,12}(?:那|这|再|继续|为什么|谢谢|好的|还有|换)"
)
_NEW_TOPIC = (
    r"(?i)\b(?:something (?:else|different|completely)|(?:different|new|another|other|unrelated)"
    r" (?:topic|question|subject|thing|task|matter)|change (?:of )?(?:topic|subject)|by the way|btw"
    r"|unrelated|on another note|switching|moving on|forget (?:that|it|about)|separately"
    r"|andere[srn]? (?:thema|frage)|etwas anderes|übrigens|autre chose|changeons|au fait"
    r"|otra cosa|cambiando de tema|por cierto)\b|换个话题|另外|另一个问题|顺便"
)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compiled when first needed: an import of the library should not pay for it."""
    return re.compile(pattern)


@dataclass(frozen=True)
class Standing:
    """Where a conversation is: the agent of its last turn, and the turns since it came there."""

    agent_id: str
    turns: int = 1
    has_switched: bool = False

    def after(self, agent_id: str) -> "Standing":
        """Where it is after a turn that `agent_id` answers."""
        if agent_id == self.agent_id:
            return replace(self, turns=self.turns + 1)
        return Standing(agent_id, 1, has_switched=True)


def pull(query: str, standing: Standing) -> tuple[float, str]:
    """What to add to the log-odds of the agent of the last turn, and why."""
    head = query[:400]
    weight, reasons = STAY, []
    if _compiled(_NEW_TOPIC).search(head):
        weight += NEW_TOPIC
        reasons.append("it says that it is about something else")
    elif _compiled(_LEANING).search(head[:200]):
        weight += LEANING
        reasons.append("it leans on what was said")
    if len(head) < 80 and len(head.split()) <= SHORT_WORDS:
        weight += SHORT
        reasons.append("it is short")
    if standing.has_switched and standing.turns <= RESTLESS_TURNS:
        weight += RESTLESS
        reasons.append("the agent has just changed")
    return weight, ", ".join(reasons)


class Sessions:
    """The standings of the conversations asked last, by `session_id`. Thread-safe."""

    def __init__(self, most: int = SESSIONS) -> None:
        self._lock = threading.Lock()
        self._standings: LRUCache[str, Standing] = LRUCache(most)

    def of(self, session_id: str) -> Standing | None:
        """Where a conversation is; None for one that is new or was forgotten."""
        with self._lock:
            return self._standings.get(session_id)

    def note(self, session_id: str, agent_id: str) -> None:
        """A turn of it is answered by an agent."""
        with self._lock:
            known = self._standings.get(session_id)
            self._standings[session_id] = known.after(agent_id) if known else Standing(agent_id)

    def export(self) -> Mapping[str, Standing]:
        """All of them, for a look."""
        with self._lock:
            return dict(self._standings)
