"""The agents that may answer a question: pure functions.

Without an image nobody can look at one, so an agent that owns the topic `vision` and nothing else
takes no part, and the probability of that topic goes to the others. A registry that has only such
agents keeps them, since somebody has to answer.
"""

from collections.abc import Mapping

from orion_oie.models.specs import AgentSpec
from orion_oie.routing.base import VISION


def owns_only_vision(agent_id: str, spec: AgentSpec) -> bool:
    """True if the hints of an agent list the topic `vision` alone, or its id stands for that."""
    topics = spec.routing.topics
    return agent_id == VISION if topics is None else set(topics) == {VISION}


def candidates(agents: Mapping[str, AgentSpec], images: int) -> Mapping[str, AgentSpec]:
    """The agents that may answer a question with that number of images, in their order."""
    if images:
        return agents
    found = {a: spec for a, spec in agents.items() if not owns_only_vision(a, spec)}
    return found or agents


def hidden_topics(candidates: Mapping[str, AgentSpec], images: int) -> frozenset[str]:
    """The topics that no question of the kind can have, given the agents that may answer it."""
    if images or all(owns_only_vision(a, spec) for a, spec in candidates.items()):
        return frozenset()
    return frozenset((VISION,))
