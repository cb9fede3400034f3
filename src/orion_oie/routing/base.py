"""The contract of a router: given a question, name the agent and say why.

A router never raises for any text, never takes unbounded time, and never loads a model.
"""

from collections.abc import Mapping
from typing import Protocol

from orion_oie.schemas import Route
from orion_oie.specs import AgentSpec

CONVERSATION = "conversation"


class Router(Protocol):
    """Chooses an agent; the agents may change between calls."""

    def route(self, query: str, agents: Mapping[str, AgentSpec]) -> Route:
        """The agent for `query` among `agents`, with scores and a confidence in [0, 1]."""
        ...
