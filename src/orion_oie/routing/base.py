"""The contract of a router: choose the agent for a question and give the reason.

A router raises for no text, takes a bounded time, and never loads a language model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from orion_oie.models.specs import AgentSpec
from orion_oie.schemas.requests import Message
from orion_oie.schemas.results import Route

VISION = "vision"


@dataclass(frozen=True)
class RouteContext:
    """The circumstances of a question.

    images: number of attached images. session_id, history: the conversation so far; a router may
    store which agent answered in a session, but no text. wait_s: seconds until the model of an
    agent could answer, 0 if it is in memory, None if unknown. is_trial: the router must not
    remember this call. may_load: an embedding model may be loaded for it. limit_s: seconds that
    all stages together may wait; None for their usual limits.
    """

    images: int = 0
    session_id: str | None = None
    history: Sequence[Message] = ()
    wait_s: Callable[[str], float | None] | None = None
    is_trial: bool = False
    may_load: bool = True
    limit_s: float | None = None


NO_CONTEXT = RouteContext()


class Router(Protocol):
    """Chooses an agent. The set of agents may change between calls."""

    def route(
        self, query: str, agents: Mapping[str, AgentSpec], context: RouteContext = NO_CONTEXT
    ) -> Route:
        """The agent for `query` among `agents`, with scores and a confidence in [0, 1]."""
        ...


@runtime_checkable
class SessionRouter(Router, Protocol):
    """A router that takes the agent that answered last into account. An engine requests its routes
    as trials and then reports the turns that were answered."""

    def note(self, session_id: str, agent_id: str) -> None:
        """Record that this agent answered a turn of the session."""
        ...
