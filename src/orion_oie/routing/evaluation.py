"""How good a router is: accuracy, calibration, confusion, on labelled prompts.

Strict: the route is an agent of the best label. Lenient: it is one of an acceptable label.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orion_oie.models.specs import AgentSpec
from orion_oie.routing.base import RouteContext, Router
from orion_oie.routing.linear.fitting import Example
from orion_oie.routing.profiles import AGENT_TOPICS, topics_of
from orion_oie.schemas.results import Route

_BINS = 10
CONFIDENT = 0.55


@dataclass(frozen=True)
class Judged:
    """One prompt, where it went, and the agents that could have had it, the best first: so many
    as `best_count` says, where several own the topic of its label."""

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
    """Shares in [0, 1]. `calibration_error`: the mean gap between confidence and the share of right
    (lenient) routes over ten bins of equal width, weighted by their sizes (Naeini et al., 2015);
    `confident_right`: the share of right ones at a confidence of 0.55 or more, and `coverage` the
    share of prompts that reach it."""

    count: int
    strict: float
    lenient: float
    calibration_error: float
    confident_right: float
    coverage: float


def judged(
    router: Router, examples: Iterable[Example], agents: Mapping[str, AgentSpec]
) -> list[Judged]:
    """Route every example, each for itself. A label that is no agent's id stands for all agents
    that own the topic of that name."""
    return [
        Judged(
            example,
            router.route(example.text, agents, RouteContext(images=example.images, is_trial=True)),
            tuple(dict.fromkeys(a for label in example.accepted for a in agents_of(label, agents))),
            len(agents_of(example.label, agents)),
        )
        for example in examples
    ]


def agents_of(label: str, agents: Mapping[str, AgentSpec]) -> tuple[str, ...]:
    """The agents that a label stands for: the one of that id, else those that own the topic, else
    the one that it stands for in the packaged registry, which `agents` may not have. `reasoning`
    is its topics, where no agent has that name."""
    if label in agents:
        return (label,)
    topics = (label, *AGENT_TOPICS.get(label, ()))
    owners = tuple(
        agent_id for agent_id, spec in agents.items() if topics_of(agent_id, spec, topics)
    )
    return owners or (agent_of(label),)


def agent_of(label: str) -> str:
    """The agent of the packaged registry that a label stands for: `math` and `logic` are
    `reasoning`'s."""
    return next((agent for agent, topics in AGENT_TOPICS.items() if label in topics), label)


def score(found: Sequence[Judged]) -> Score:
    """The figures of some judged prompts. Raises `ValueError` for none."""
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
    """The share of right routes among that share of the prompts, the surest ones, and the least
    confidence among them. Raises `ValueError` for none."""
    surest = sorted(found, key=lambda one: -one.route.confidence)[: round(share * len(found))]
    if not surest:
        raise ValueError("there is nothing to score")
    return _share(one.is_right for one in surest), surest[-1].route.confidence


def bins(found: Sequence[Judged], count: int = _BINS) -> list[tuple[float, float, int]]:
    """For each bin of confidence that has any: the mean confidence, the share of right ones, the
    size."""
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
    """How often a prompt that an agent should have went to another, as (should, did). A route to
    any acceptable agent counts as right."""
    return Counter(
        (one.route.agent_id if one.is_right else one.agents[0], one.route.agent_id) for one in found
    )


def _share(truths: Iterable[bool]) -> float:
    values = list(truths)
    return sum(values) / len(values) if values else 0.0
