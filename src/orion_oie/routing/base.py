"""The contract of a router: given a question, name the agent and say why.

A router never raises for any text, never takes unbounded time, and never loads a language model.
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
    """What is known besides the question.

    images: how many are attached. session_id and history: the conversation so far; a router may
    remember which agent answered in a session, but no text. wait_s: seconds until the model of an
    agent could answer, 0 when it is in memory, None when it cannot be said. is_trial: nothing is
    to be remembered of this call. may_load: whether an embedding model may be loaded for it.
    limit_s: for how many seconds the stages may be waited for, None as long as they usually may.
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
    """Chooses an agent; the agents may change between calls."""

    def route(
        self, query: str, agents: Mapping[str, AgentSpec], context: RouteContext = NO_CONTEXT
    ) -> Route:
        """The agent for `query` among `agents`, with scores and a confidence in [0, 1]."""
        ...


@runtime_checkable
class SessionRouter(Router, Protocol):
    """A router for which the agent that answered last counts. An engine asks it for routes that are
    trials, and tells it of the turns that were answered."""

    def note(self, session_id: str, agent_id: str) -> None:
        """A turn of the session was answered, by this agent."""
        ...
