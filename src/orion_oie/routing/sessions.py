"""The agent that a conversation is with, and the conditions under which it changes.

A turn stays with the agent of the previous turn unless it clearly needs another one: the odds of
that agent are raised before the best is chosen. They are raised more for a short turn and soon
after a change of agents, less for a turn that announces a new topic. The numbers were fitted on
conversations (see docs/routing.md). Stores agents, never text, and has no clock.
"""

import math
import threading
from dataclasses import dataclass, replace

from cachetools import LRUCache

from orion_oie.routing.text.compiled import compiled

SESSIONS = 10_000

# Added to the log-odds of the agent that answered last, fitted on conversations_train.jsonl: short
# turns mostly continue the topic, long ones say as much as a first turn.
STAY, LESS_BY_LENGTH = 8.8, 1.6  # the latter is subtracted for each e-fold of 1 + words
SHORT, SHORT_WORDS = 5.05, 6
NEW_TOPIC = -1.0
RESTLESS, RESTLESS_TURNS = 2.2, 2
_MAX_CHARS = 1000  # of a turn; the rest is not read

_NEW_TOPIC = (
    r"(?i)\b(?:something (?:else|different|completely)|(?:different|new|another|other|unrelated)"
    r" (?:topic|question|subject|thing|task|matter)|change (?:of )?(?:topic|subject)|by the way|btw"
    r"|unrelated|on another note|switching|moving on|forget (?:that|it|about)|separately"
    r"|andere[srn]? (?:thema|frage)|etwas anderes|übrigens|autre chose|changeons|au fait"
    r"|otra cosa|cambiando de tema|por cierto)\b|换个话题|另外|另一个问题|顺便"
)


@dataclass(frozen=True)
class ConversationState:
    """The agent of the last turn of a conversation, and the number of its turns in a row."""

    agent_id: str
    turns: int = 1
    has_switched: bool = False

    def after(self, agent_id: str) -> "ConversationState":
        """The state after a turn that `agent_id` answers."""
        if agent_id == self.agent_id:
            return replace(self, turns=self.turns + 1)
        return ConversationState(agent_id, 1, has_switched=True)


def stay_log_odds(query: str, state: ConversationState) -> tuple[float, str]:
    """The gain in log-odds of the agent of the last turn, at least 0, and the reasons for it."""
    head = query[:_MAX_CHARS]
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
    """The states of the most recent conversations, by `session_id`. Thread-safe."""

    def __init__(self, max_sessions: int = SESSIONS) -> None:
        self._lock = threading.Lock()
        self._states: LRUCache[str, ConversationState] = LRUCache(max_sessions)

    def of(self, session_id: str) -> ConversationState | None:
        """The state of a conversation; None for one that is new or was evicted."""
        with self._lock:
            return self._states.get(session_id)

    def note(self, session_id: str, agent_id: str) -> None:
        """Record that an agent answered a turn of the conversation."""
        with self._lock:
            known = self._states.get(session_id)
            self._states[session_id] = (
                known.after(agent_id) if known else ConversationState(agent_id)
            )
