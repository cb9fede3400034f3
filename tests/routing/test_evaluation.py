"""Evaluation of routers: figures checked by hand, and a minimum for our own router."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from routes import AGENTS, agent, knowing

from orion_oie.models.specs import (
    AgentSpec,
    RegistryFile,
)
from orion_oie.routing.base import NO_CONTEXT, VISION, RouteContext
from orion_oie.routing.evaluation import (
    CONFIDENT,
    Judged,
    agent_of,
    agents_of,
    bins,
    confusion,
    judged,
    right_among_surest,
    score,
)
from orion_oie.routing.hybrid import HybridRouter
from orion_oie.routing.linear.fitting import (
    Example,
    read_examples,
)
from orion_oie.routing.linear.model import TOPICS
from orion_oie.schemas.results import Route

ROOT = Path(__file__).parents[2]
OWN = ROOT / "benchmarks" / "routing" / "own.jsonl"


def one(confidence: float, went: str, *agents: str) -> Judged:
    route = Route(agent_id=went, confidence=confidence, reason="")
    return Judged(Example("", agents[0], agents), route, agents)


FOUND = [
    one(0.95, "code", "code"),
    one(0.91, "code", "code", "data"),
    one(0.99, "data", "code", "data"),  # acceptable, not the best
    one(0.93, "data", "code"),  # wrong
    one(0.60, "creative", "creative"),
    one(0.60, "creative", "conversation"),  # wrong
    one(0.55, "data", "data"),
    one(0.12, "conversation", "data"),  # wrong
]


def test_the_figures_by_hand() -> None:
    """Strict, lenient, the calibration error of ten bins, and what is reached at .55."""
    found = score(FOUND)
    assert found.count == 8
    assert found.strict == 4 / 8
    assert found.lenient == 5 / 8
    top = abs(0.75 - (0.95 + 0.91 + 0.99 + 0.93) / 4) * 4
    sixes, fives, ones = abs(0.5 - 0.6) * 2, abs(1 - 0.55) * 1, abs(0 - 0.12) * 1
    assert found.calibration_error == pytest.approx((top + sixes + fives + ones) / 8)
    assert CONFIDENT == 0.55
    assert found.confident_right == 5 / 7
    assert found.coverage == 7 / 8


def test_the_surest_by_hand() -> None:
    """The share of right ones among them, and the least confidence."""
    assert right_among_surest(FOUND, 0.5) == (3 / 4, 0.91)
    assert right_among_surest(FOUND, 1) == (5 / 8, 0.12)
    for found, share in (([], 0.5), (FOUND, 0.01)):
        with pytest.raises(ValueError, match="nothing to score"):
            right_among_surest(found, share)


def test_bins_by_hand() -> None:
    """Of equal width, in order, those that hold anything; 1 is in the last one."""
    found = bins([*FOUND, one(1.0, "code", "code"), one(0.0, "code", "code")])
    assert found == [
        (0.0, 1.0, 1),
        (0.12, 0.0, 1),
        (0.55, 1.0, 1),
        (0.6, 0.5, 2),
        (pytest.approx((0.95 + 0.91 + 0.99 + 0.93 + 1) / 5), 0.8, 5),
    ]
    assert bins(FOUND, 1) == [(pytest.approx(sum(f.route.confidence for f in FOUND) / 8), 5 / 8, 8)]
    assert bins([]) == []


def test_perfect_and_useless() -> None:
    assert score([one(1.0, "code", "code")] * 3).calibration_error == 0
    wrong = score([one(1.0, "code", "data")] * 3)
    assert (wrong.lenient, wrong.calibration_error, wrong.confident_right) == (0, 1, 0)
    unsure = score([one(0.2, "code", "code")])
    assert (unsure.coverage, unsure.confident_right) == (0, 0)


def test_nothing_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        score([])


def test_confusion_by_hand() -> None:
    """Any acceptable agent is right; a wrong route is missed by the best label."""
    assert confusion(FOUND) == {
        ("code", "code"): 2,
        ("data", "data"): 2,
        ("code", "data"): 1,
        ("creative", "creative"): 1,
        ("conversation", "creative"): 1,
        ("data", "conversation"): 1,
    }


def test_labels_stand_for_agents() -> None:
    """Topics of an agent that goes by another name are its; others are agents themselves."""
    assert [agent_of(label) for label in ("math", "logic", "code", "unheard-of")] == [
        "reasoning",
        "reasoning",
        "code",
        "unheard-of",
    ]


SPLIT = {
    "conversation": agent(),
    "mathematician": agent(topics=["math"]),
    "logic": agent(),
    "coder": agent(topics=["code", "data"]),
    "reviewer": agent(topics=["code"]),
    "creative": agent(topics=[]),
}


@pytest.mark.parametrize(
    ("label", "agents"),
    [
        ("mathematician", ("mathematician",)),  # an id
        ("math", ("mathematician",)),
        ("logic", ("logic",)),
        ("reasoning", ("mathematician", "logic")),  # nobody of that name: its topics
        ("code", ("coder", "reviewer")),
        ("data", ("coder",)),
        ("creative", ("creative",)),  # an id, whatever it owns
        ("vision", ("vision",)),  # nobody's
    ],
)
def test_labels_stand_for_agents_of_the_registry(label: str, agents: tuple[str, ...]) -> None:
    """Topics belong to whoever owns them there."""
    assert agents_of(label, SPLIT) == agents


def test_labels_of_the_packaged_registry() -> None:
    """Each label of ours means what it means without a registry."""
    registry = RegistryFile.model_validate_json((ROOT / "models.json").read_text("utf-8"))
    for label in (*TOPICS, *registry.agents):
        assert agents_of(label, registry.agents) == (agent_of(label),)


def test_a_registry_that_splits_topics_is_judged_by_its_own_agents() -> None:
    """All owners of the best label are best ones; the owner of another label is merely right."""
    examples = [
        Example("a", "math"),
        Example("b", "code", ("code", "math")),
        Example("c", "math", ("math", "code")),
        Example("d", "logic"),
    ]
    found = judged(Recording("reviewer"), examples, SPLIT)
    assert [item.agents for item in found] == [
        ("mathematician",),
        ("coder", "reviewer", "mathematician"),
        ("mathematician", "coder", "reviewer"),
        ("logic",),
    ]
    assert [item.is_best for item in found] == [False, True, False, False]
    assert [item.is_right for item in found] == [False, True, True, False]
    assert score(judged(Recording("mathematician"), examples[:1], SPLIT)).strict == 1


class Recording:
    """A router that keeps what it was told, and always takes the same agent."""

    def __init__(self, agent_id: str = "reasoning") -> None:
        self.agent_id = agent_id
        self.contexts: list[RouteContext] = []

    def route(
        self, query: str, agents: Mapping[str, AgentSpec], context: RouteContext = NO_CONTEXT
    ) -> Route:
        self.contexts.append(context)
        return Route(agent_id=self.agent_id, confidence=0.5, reason=query)


def test_each_example_is_routed_for_itself() -> None:
    """As a trial without a conversation, with as many images as it has."""
    router = Recording()
    examples = [Example("a", "math", ("math", "logic", "code")), Example("b", "data", images=2)]
    found = judged(router, examples, AGENTS)
    assert [item.agents for item in found] == [("reasoning", "code"), ("data",)]
    assert [(item.is_best, item.is_right) for item in found] == [(True, True), (False, False)]
    assert [item.route.reason for item in found] == ["a", "b"]
    assert router.contexts == [RouteContext(is_trial=True), RouteContext(images=2, is_trial=True)]


def test_a_router_is_judged() -> None:
    """The real one, on prompts that leave no doubt."""
    router = HybridRouter(model=knowing({"loop": "code", "sum": "math"}))
    examples = [
        Example("is this a loop", "code"),
        Example("is this a sum", "logic"),
        Example("x", "vision"),
    ]
    found = score(judged(router, examples, {**AGENTS, VISION: agent()}))
    assert (found.strict, found.coverage) == (1, 1)


@pytest.mark.skipif(not OWN.exists(), reason="needs the labelled prompts of the repository")
def test_the_weights_of_the_package_are_sane() -> None:
    """A floor far below what they reach, so that a broken file of weights is noticed."""
    registry = RegistryFile.model_validate_json((ROOT / "models.json").read_text("utf-8"))
    found = score(judged(HybridRouter(), read_examples(OWN), registry.agents))
    assert found.lenient >= 0.86
    assert found.strict >= 0.80
    assert found.calibration_error <= 0.10
    assert found.confident_right >= 0.88
    keywords = score(judged(HybridRouter(enable_linear=False), read_examples(OWN), registry.agents))
    assert 0.65 <= keywords.lenient < found.lenient
