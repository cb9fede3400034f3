"""Which agent a conversation is with, and when it moves to another.

A turn stays with the agent of the turn before unless it clearly asks otherwise: the odds of that
agent are raised before the best is chosen, more for a short turn, less for one that says that it is
about something else, and more again soon after a switch. The numbers were fitted on
conversations (see docs/routing.md). Remembers agents, no text; knows no clock.
"""

import math
import threading
from dataclasses import dataclass, replace

from cachetools import LRUCache

from orion_oie.routing.text.compiled import compiled

SESSIONS = 10_000

# Added to the log-odds of the agent that answered last, fitted on conversations_train.jsonl: short
# turns mostly go on, long ones are as good as first ones.
STAY, LESS_BY_LENGTH = 8.0, 1.46  # the second for each e-fold of 1 + words
SHORT, SHORT_WORDS = 4.6, 6
NEW_TOPIC = -1.0
RESTLESS, RESTLESS_TURNS = 2.0, 2
_LOOKED_AT = 1000  # characters

_NEW_TOPIC = (
    r"(?i)\b(?:something (?:else|different|completely)|(?:different|new|another|other|unrelated)"
    r" (?:topic|question|subject|thing|task|matter)|change (?:of )?(?:topic|subject)|by the way|btw"
    r"|unrelated|on another note|switching|moving on|forget (?:that|it|about)|separately"
    r"|andere[srn]? (?:thema|frage)|etwas anderes|übrigens|autre chose|changeons|au fait"
    r"|otra cosa|cambiando de tema|por cierto)\b|换个话题|另外|另一个问题|顺便"
)


@dataclass(frozen=True)
class ConversationState:
    """Where a conversation is: the agent of its last turn, and the turns since it came there."""

    agent_id: str
    turns: int = 1
    has_switched: bool = False

    def after(self, agent_id: str) -> "ConversationState":
        """Where it is after a turn that `agent_id` answers."""
        if agent_id == self.agent_id:
            return replace(self, turns=self.turns + 1)
        return ConversationState(agent_id, 1, has_switched=True)


def stay_log_odds(query: str, state: ConversationState) -> tuple[float, str]:
    """What to add to the log-odds of the agent of the last turn, and why. Never less than 0."""
    head = query[:_LOOKED_AT]
    words = len(head.split()) if head.isascii() else max(len(head.split()), len(head) // 4)
    weight, reasons = STAY - LESS_BY_LENGTH * math.log1p(words), []
    if words <= SHORT_WORDS:
        weight += SHORT
        reasons.append("the turn is short")
    if state.has_switched and state.turns <= RESTLESS_TURNS:
        weight += RESTLESS
        reasons.append("the agent has just changed")
    if compiled(_NEW_TOPIC).search(head):
        weight += NEW_TOPIC
        reasons.append("though it says that it is about something else")
    return max(0.0, weight), ", ".join(reasons)


class Sessions:
    """The states of the conversations asked last, by `session_id`. Thread-safe."""

    def __init__(self, most: int = SESSIONS) -> None:
        self._lock = threading.Lock()
        self._states: LRUCache[str, ConversationState] = LRUCache(most)

    def of(self, session_id: str) -> ConversationState | None:
        """Where a conversation is; None for one that is new or was forgotten."""
        with self._lock:
            return self._states.get(session_id)

    def note(self, session_id: str, agent_id: str) -> None:
        """A turn of it is answered by an agent."""
        with self._lock:
            known = self._states.get(session_id)
            self._states[session_id] = (
                known.after(agent_id) if known else ConversationState(agent_id)
            )
