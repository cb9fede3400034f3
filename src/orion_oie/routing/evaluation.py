"""Evaluation of a router on labelled prompts: accuracy, calibration, confusion.

Strict: the agent belongs to the best label. Lenient: it belongs to an acceptable label.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orion_oie.models.specs import AgentSpec
from orion_oie.routing.base import VISION, RouteContext, Router
from orion_oie.routing.candidates import owns_only_vision
from orion_oie.routing.linear.fitting import Example
from orion_oie.routing.profiles import AGENT_TOPICS, topics_of
from orion_oie.schemas.results import Route

_BINS = 10
CONFIDENT = 0.55


@dataclass(frozen=True)
class Judged:
    """One prompt, its route, and its acceptable agents, best first. The first `best_count` of them
    belong to the best label: several, if several own its topic."""

    example: Example
    route: Route
    agents: tuple[str, ...]
    best_count: int = 1

    @property
    def is_best(self) -> bool:
        return self.route.agent_id in self.agents[: self.best_count]

    @property
    def is_right(self) -> bool:
        return self.route.agent_id in self.agents


@dataclass(frozen=True)
class Score:
    """Figures of a router as shares in [0, 1].

    calibration_error: mean gap between confidence and the share of right (lenient) routes over ten
    bins of equal width, weighted by their sizes (Naeini et al., 2015). confident_right: share of
    right routes among those of a confidence of 0.55 or more. coverage: share of the prompts that
    reach that confidence.
    """

    count: int
    strict: float
    lenient: float
    calibration_error: float
    confident_right: float
    coverage: float


def judged(
    router: Router, examples: Iterable[Example], agents: Mapping[str, AgentSpec]
) -> list[Judged]:
    """Route every example on its own, outside of any session. A label that is no agent's id stands
    for all agents that own the topic of that name. A prompt for an agent that only looks at images
    is asked with one."""
    return [
        Judged(
            example,
            router.route(
                example.text,
                agents,
                RouteContext(images=images_of(example, agents), is_trial=True),
            ),
            tuple(dict.fromkeys(a for label in example.accepted for a in agents_of(label, agents))),
            len(agents_of(example.label, agents)),
        )
        for example in examples
    ]


def images_of(example: Example, agents: Mapping[str, AgentSpec]) -> int:
    """The number of images that an example is asked with: its own, or one if its best label stands
    for looking at images, which nobody does without any."""
    spec = agents.get(example.label)
    needs_one = example.label == VISION if spec is None else owns_only_vision(example.label, spec)
    return max(example.images, int(needs_one))


def agents_of(label: str, agents: Mapping[str, AgentSpec]) -> tuple[str, ...]:
    """The agents that a label stands for: the agent of that id, else the owners of the topic, else
    the agent that it stands for in the packaged registry, even if `agents` lacks it. `reasoning`
    stands for its topics if no agent has that name."""
    if label in agents:
        return (label,)
    topics = (label, *AGENT_TOPICS.get(label, ()))
    owners = tuple(
        agent_id for agent_id, spec in agents.items() if topics_of(agent_id, spec, topics)
    )
    return owners or (agent_of(label),)


def agent_of(label: str) -> str:
    """The agent of the packaged registry that a label stands for: `reasoning` for `math` and
    `logic`, else the label itself."""
    return next((agent for agent, topics in AGENT_TOPICS.items() if label in topics), label)


def score(found: Sequence[Judged]) -> Score:
    """The figures of judged prompts. Raises `ValueError` if there are none."""
    if not found:
        raise ValueError("there is nothing to score")
    sure = [one for one in found if one.route.confidence >= CONFIDENT]
    return Score(
        len(found),
        _share(one.is_best for one in found),
        _share(one.is_right for one in found),
        sum(abs(right - mean) * size for mean, right, size in bins(found)) / len(found),
        _share(one.is_right for one in sure),
        len(sure) / len(found),
    )


def right_among_surest(found: Sequence[Judged], share: float) -> tuple[float, float]:
    """The share of right routes among the surest `share` of the prompts, and the least confidence
    among those. Raises `ValueError` if there are none."""
    surest = sorted(found, key=lambda one: -one.route.confidence)[: round(share * len(found))]
    if not surest:
        raise ValueError("there is nothing to score")
    return _share(one.is_right for one in surest), surest[-1].route.confidence


def bins(found: Sequence[Judged], count: int = _BINS) -> list[tuple[float, float, int]]:
    """(mean confidence, share of right routes, size) of each bin of confidence that has any."""
    held: dict[int, list[Judged]] = {}
    for one in found:
        held.setdefault(min(count - 1, int(one.route.confidence * count)), []).append(one)
    return [
        (
            sum(one.route.confidence for one in held[number]) / len(held[number]),
            _share(one.is_right for one in held[number]),
            len(held[number]),
        )
        for number in sorted(held)
    ]


def confusion(found: Sequence[Judged]) -> Counter[tuple[str, str]]:
    """Counts of (expected agent, chosen agent). A route to any acceptable agent counts as right."""
    return Counter(
        (one.route.agent_id if one.is_right else one.agents[0], one.route.agent_id) for one in found
    )


def _share(truths: Iterable[bool]) -> float:
    values = list(truths)
    return sum(values) / len(values) if values else 0.0
