"""The attachment stage: a question that comes with an image goes to the agent that owns `vision`,
whatever its words say. A pure function."""

from collections.abc import Mapping

from orion_oie.models.specs import AgentSpec
from orion_oie.routing.base import VISION, RouteContext
from orion_oie.routing.profiles import topics_of
from orion_oie.schemas.results import Route, RouteCandidate

_CONFIDENCE = 0.97


def image_route(agents: Mapping[str, AgentSpec], context: RouteContext) -> Route | None:
    """The route of a question with images; None without any, or if no agent looks at images."""
    if not context.images:
        return None
    owner = next((a for a, spec in agents.items() if topics_of(a, spec, (VISION,))), None)
    if owner is None:
        return None
    return Route(
        agent_id=owner,
        confidence=_CONFIDENCE,
        reason="an image is attached" if context.images == 1 else "images are attached",
        candidates=[RouteCandidate(agent_id=owner, score=_CONFIDENCE)],
        stages=["attachment"],
    )
