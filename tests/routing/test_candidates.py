"""Who may answer: without an image, nobody who only looks at images."""

from typing import Any

import numpy as np
import pytest
from routes import AGENTS, agent, assert_sound, knowing

from orion_oie.models.specs import AgentSpec
from orion_oie.routing.attachment import image_route
from orion_oie.routing.base import NO_CONTEXT, VISION, RouteContext
from orion_oie.routing.candidates import candidates, hidden_topics, owns_only_vision
from orion_oie.routing.evaluation import images_of
from orion_oie.routing.hybrid import HybridRouter
from orion_oie.routing.linear.fitting import Example
from orion_oie.routing.linear.model import TOPICS, empty_model
from orion_oie.schemas.requests import Message

SEEING = {**AGENTS, VISION: agent()}
IMAGE = RouteContext(images=1)


def seeing_model() -> Any:
    """Sure that a photo is for `vision`, else that it is for code."""
    model = knowing({"photo": VISION, "loop": "code"})
    model.bias[TOPICS.index(VISION)] = 2.0
    return model


@pytest.mark.parametrize(
    ("agent_id", "routing", "expected"),
    [
        (VISION, {}, True),
        ("eyes", {"topics": [VISION]}, True),
        ("eyes", {"topics": [VISION, VISION]}, True),
        ("eyes", {"topics": [VISION, "data"]}, False),
        ("eyes", {"topics": [VISION, "maps"]}, False),  # a topic that no weights know
        (VISION, {"topics": ["creative"]}, False),
        (VISION, {"topics": []}, False),
        ("code", {}, False),
        ("eyes", {"keywords": {"photo": 3}}, False),
    ],
)
def test_who_only_looks_at_images(agent_id: str, routing: dict[str, Any], expected: bool) -> None:
    """By the topics of the hints, else by the id."""
    assert owns_only_vision(agent_id, agent(**routing)) is expected


def test_without_an_image_there_is_no_vision() -> None:
    """Neither the agent nor the topic, whatever the words, the hints and the memory say."""
    router = HybridRouter(
        model=seeing_model(), tie_break=lambda _query, first, *_rest: float(first is not None)
    )
    eager = {**AGENTS, VISION: agent(keywords={"photo": 50}, examples=["a photo of a loop"])}
    context = RouteContext(wait_s=lambda agent_id: 0.0 if agent_id == VISION else 60.0)
    for text in ("photo", "a photo of a loop", "what is in this photo?", ""):
        found = router.route(text, eager, context)
        assert_sound(found, eager)
        assert VISION not in {one.agent_id for one in found.candidates}
        assert found == router.route(text, AGENTS, context)
        assert sum(one.score for one in found.candidates) == pytest.approx(1, abs=1e-3)
    assert router.route("photo loop", eager).agent_id == "code"


def test_with_an_image_there_is_nothing_but_vision() -> None:
    """Whatever the words say; the first of several owners."""
    router = HybridRouter(model=seeing_model())
    eyes = {"eyes": agent(topics=[VISION, "code"]), **SEEING}
    for agents, expected in ((SEEING, VISION), (eyes, "eyes")):
        found = router.route("loop", agents, IMAGE)
        assert (found.agent_id, found.stages) == (expected, ["attachment"])
        assert found == image_route(agents, IMAGE)
    assert image_route(SEEING, NO_CONTEXT) is None
    assert image_route(AGENTS, IMAGE) is None


def test_an_agent_of_vision_and_more_answers_for_the_rest() -> None:
    """Its other topics are its own without an image as well; what it sees counts for nothing."""
    agents = {**AGENTS, "eyes": agent(topics=[VISION, "data"])}
    del agents["data"]
    router = HybridRouter(model=knowing({"photo": VISION, "table": "data", "loop": "code"}))
    assert router.route("table", agents).agent_id == "eyes"
    assert router.route("photo loop", agents).agent_id == "code"
    assert router.route("photo loop", agents, IMAGE).agent_id == "eyes"


@pytest.mark.parametrize(
    "agents",
    [
        {VISION: agent()},
        {"one": agent(topics=[VISION]), "two": agent(topics=[VISION], keywords={"photo": 2})},
    ],
    ids=["one", "two"],
)
def test_a_registry_of_eyes_alone_routes(agents: dict[str, AgentSpec]) -> None:
    """Somebody has to answer, with an image and without."""
    assert candidates(agents, 0) is agents
    assert hidden_topics(agents, 0) == frozenset()
    for context in (NO_CONTEXT, IMAGE, RouteContext(session_id="s")):
        found = HybridRouter().route("what is the capital of Peru?", agents, context)
        assert found.agent_id in agents
        assert found.confidence > 0.4  # two share it
    history = [Message(role="user", content="a photo")]
    assert_sound(HybridRouter().route("more", agents, RouteContext(history=history)), agents)


def test_a_guest_that_can_see_is_a_guest() -> None:
    """An agent without a topic whose examples are about photos takes part by its evidence; what it
    would share with `vision` is no reason to leave it out of the rest."""
    router = HybridRouter(model=seeing_model())
    guest = agent(keywords={"aphids": 3}, examples=["which aphids are these in the photo"])
    agents = {**SEEING, "gardener": guest}
    assert router.route("aphids on my beans", agents).agent_id == "gardener"
    assert router.route("aphids on my beans", agents, IMAGE).agent_id == VISION
    assert router.route("photo", {**AGENTS, "gardener": guest}, IMAGE).agent_id == "gardener"


def test_weights_that_know_only_vision() -> None:
    """All that they know is hidden without an image: the hints decide, else the conversation."""
    router = HybridRouter(model=empty_model((VISION,)))
    agents = {**SEEING, "tea": agent(keywords={"tea": 3})}
    for text in ("photo", "tea", ""):
        found = router.route(text, agents)
        assert_sound(found, agents)
        assert found.agent_id == "conversation"


def test_hidden_topics() -> None:
    assert hidden_topics(AGENTS, 0) == {VISION}
    assert hidden_topics(AGENTS, 1) == frozenset()
    assert hidden_topics({}, 0) == frozenset()
    assert list(candidates(SEEING, 0)) == list(AGENTS)
    assert candidates(SEEING, 1) is SEEING


def test_prompts_about_images_are_judged_with_one() -> None:
    """Those whose best label looks at images; the number that a prompt names is kept."""
    assert images_of(Example("x", VISION), SEEING) == 1
    assert images_of(Example("x", VISION), AGENTS) == 1
    assert images_of(Example("x", VISION, images=3), SEEING) == 3
    assert images_of(Example("x", "code", ("code", VISION)), SEEING) == 0
    assert images_of(Example("x", "code", images=2), SEEING) == 2
    eyes = {**AGENTS, "eyes": agent(topics=[VISION])}
    assert images_of(Example("x", "eyes"), eyes) == 1
    assert images_of(Example("x", VISION), {**AGENTS, VISION: agent(topics=["creative"])}) == 0


def test_masking_renormalizes() -> None:
    """The other topics keep their odds."""
    model = seeing_model()
    with_it = HybridRouter(model=model).route(
        "what is it then", {VISION: agent(topics=[VISION, "data"])}
    )
    assert with_it.candidates[0].score == 1
    found = HybridRouter(model=model).route("what is it then", SEEING)
    scores = {one.agent_id: one.score for one in found.candidates}
    assert scores["reasoning"] == pytest.approx(2 / 7, abs=1e-3)
    assert np.isclose(sum(scores.values()), 1, atol=1e-3)
