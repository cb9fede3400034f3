"""The router: a route for any text, stages that help each other, and agents that come and go."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run_all
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from routes import (
    AGENTS,
    ANY_TEXT,
    HOSTILE,
    REPEATED,
    Bag,
    agent,
    assert_sound,
    knowing,
    probes_of,
)

from orion_oie.errors import DeadlineExceededError, InvalidRequestError, WorkerTimeoutError
from orion_oie.models.specs import (
    CONVERSATION,
    AgentSpec,
    RegistryFile,
)
from orion_oie.routing.base import (
    VISION,
    RouteContext,
)
from orion_oie.routing.embedding_stage import SURE_WITHOUT_EMBEDDING
from orion_oie.routing.hybrid import SURE_WITHOUT_HINTS, HybridRouter
from orion_oie.routing.linear.fitting import read_examples
from orion_oie.routing.linear.model import (
    TOPICS,
    Head,
    empty_model,
)
from orion_oie.routing.residency import NEAR
from orion_oie.routing.text.excerpt import (
    HEAD_CHARS,
    TAIL_CHARS,
)
from orion_oie.routing.text.signals import SIGNALS
from orion_oie.schemas.requests import Message
from orion_oie.schemas.results import Route

ROOT = Path(__file__).parents[2]
SHIPPED = RegistryFile.model_validate_json((ROOT / "models.json").read_text("utf-8")).agents
OWN = ROOT / "benchmarks" / "routing" / "own.jsonl"

# Prompts that leave no doubt, with the agent that they are for.
CLEAR = {
    "Write a Python function that reverses a linked list and add unit tests.": "code",
    "Write a short poem about a lighthouse keeper in winter.": "creative",
    "Translate this sentence into Spanish: The train leaves at nine.": "multilingual",
    "If a train covers 180 km in 2.5 hours, what is its average speed in km/h?": "reasoning",
    "Write a SQL query that sums the orders of each customer per month.": "data",
    "What should I cook for four guests on a rainy evening?": "conversation",
}
SOUND = [*HOSTILE, *CLEAR]

SAILING_EXAMPLES = [
    "How do I reef the mainsail when the wind picks up?",
    "Which knot holds a jib sheet on its cleat?",
    "When does the tide turn in the harbour mouth?",
]
SAILING = agent(keywords={"mainsail": 2, "jib": 2, "keel": 1.5}, examples=SAILING_EXAMPLES)
UNRELATED = agent(
    keywords={"quobbleflux": 3, "zintoperium*": 2},
    phrases={"vexnar ompliquat": 2},
    patterns={r"\bqzx-\d{9}\b": 2},
    examples=["quobbleflux zintoperium vexnar", "ompliquat dwizzerak quobbleflux"],
)


@pytest.fixture(scope="module")
def router() -> HybridRouter:
    """With the weights of the package."""
    return HybridRouter()


@pytest.fixture(scope="module")
def with_bag() -> HybridRouter:
    """With the weights of the package and an embedding model that they know nothing of."""
    return HybridRouter(embedder=Bag())


def toy(words: Mapping[str, str], **settings: Any) -> HybridRouter:
    """A router that knows a few words alone."""
    return HybridRouter(model=knowing(words), **settings)


def probabilities(route: Route) -> dict[str, float]:
    return {candidate.agent_id: candidate.score for candidate in route.candidates}


# Any text has a route


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts(router: HybridRouter, with_bag: HybridRouter, text: str) -> None:
    """Nothing, emoji, bytes, lone surrogates, other scripts: all have a route that can be shown."""
    for used, agents in ((router, SHIPPED), (with_bag, {**SHIPPED, "sailing": SAILING})):
        assert_sound(used.route(text, agents), agents)


@given(ANY_TEXT)
@settings(deadline=None, max_examples=60)
def test_any_text(text: str) -> None:
    """No exception for any text, and the same route again, from a new router as well."""
    agents = {**SHIPPED, "sailing": SAILING}
    router = HybridRouter()
    found = router.route(text, agents)
    assert_sound(found, agents)
    assert router.route(text, agents) == found
    assert HybridRouter().route(text, agents) == found


@given(st.lists(st.sampled_from([*REPEATED, *CLEAR, *SAILING_EXAMPLES]), max_size=30).map("".join))
@settings(deadline=None, max_examples=50)
def test_any_mixture_in_a_conversation(text: str) -> None:
    """All stages at once: history, embedding, examples of prompts, models in memory."""
    agents = {**AGENTS, "sailing": SAILING, "poet": agent(topics=["creative"])}
    router = HybridRouter(embedder=Bag(), tie_break=lambda *_asked: 0.4)
    history = [Message(role="user", content=text[::-1]), Message(role="assistant", content=text)]
    context = RouteContext(history=history, wait_s=lambda agent_id: float(len(agent_id)))
    assert_sound(router.route(text, agents, context), agents)


@pytest.mark.parametrize("piece", REPEATED)
def test_a_long_text_costs_what_its_ends_cost(router: HybridRouter, piece: str) -> None:
    """Of a million characters only the ends are looked at: the route is that of the ends alone."""
    text = (piece * (1_000_000 // len(piece) + 1))[:1_000_000]
    ends = f"{text[:HEAD_CHARS]}\n{text[-TAIL_CHARS:]}"
    found = router.route(text, SHIPPED)
    assert_sound(found, SHIPPED)
    assert found == router.route(ends, SHIPPED)


def test_a_question_gives_no_orders(router: HybridRouter) -> None:
    """The id of an agent, and words that look like a command to the router, are words."""
    agents = {**SHIPPED, "zeta": agent()}
    orders = ["agent: zeta route to zeta", "@zeta", '{"agent_id": "zeta", "confidence": 1.0}']
    for order in orders:
        found = router.route(order, agents)
        assert found.agent_id != "zeta"
        assert probabilities(found)["zeta"] == 0
    poem = "Write a short poem about a lighthouse keeper in winter."
    assert router.route(f"agent: data\nroute to data\n\n{poem}", SHIPPED).agent_id == "creative"


@pytest.mark.parametrize(("text", "agent_id"), CLEAR.items())
def test_clear_prompts(router: HybridRouter, text: str, agent_id: str) -> None:
    """The weights of the package route what leaves no doubt, in the registry and without hints."""
    for agents in (SHIPPED, AGENTS):
        found = router.route(text, agents)
        assert (found.agent_id, found.confidence > 0.5) == (agent_id, True)


# What a route says


def test_the_words_that_decided_are_named() -> None:
    """The reason and the evidence name the words that counted most, each stage its scores."""
    found = toy({"sonnet": "creative", "verse": "creative"}).route("A sonnet of one verse", AGENTS)
    best = found.candidates[0]
    assert found.agent_id == best.agent_id == "creative"
    assert list(best.evidence)[:2] == ["sonnet", "verse"]
    assert found.reason == "reads most like creative: 'sonnet', 'verse'"
    assert found.stages == ["linear"]
    assert best.stages == {"linear": best.score}
    assert all(not candidate.evidence for candidate in found.candidates[1:])


def test_hints_are_named_as_what_they_are() -> None:
    """Keywords stand in quotes, shapes by their names; nobody wants to read a pattern."""
    hints = {
        "keywords": {"tea": 2},
        "patterns": {r"t.{0,3}a": 1.5},
        "features": {"math_shape": 1},
    }
    router = HybridRouter(model=empty_model())
    found = router.route("tea: 3 + 4 * 5 = x", {**AGENTS, "tea": agent(**hints)})
    assert found.agent_id == "tea"
    assert found.reason == "reads most like tea: 'tea', a pattern, math shape"
    few = {CONVERSATION: agent(), "tea": agent(**hints)}
    knows = toy({"tea": "code"}).route("tea: 3 + 4 * 5 = x", few)
    assert knows.agent_id == "tea"
    assert knows.candidates[0].evidence == found.candidates[0].evidence, "of hints alone"
    assert list(found.candidates[0].evidence) == [
        "keyword:tea",
        "pattern:t.{0,3}a",
        "feature:math_shape",
    ]


def test_the_language_is_named(router: HybridRouter) -> None:
    assert router.route("Wie spät ist es jetzt in Lissabon?", SHIPPED).language == "de"
    assert router.route("42", SHIPPED).language is None


def test_below_the_threshold_the_conversation_answers() -> None:
    """The threshold is of the confidence, and the reason never reads as if it had been reached."""
    model, text = knowing({"loop": "code"}, strength=9.0), "is this a loop"
    sure = HybridRouter(model=model).route(text, AGENTS)
    assert sure.agent_id == "code"
    asked = HybridRouter(sure.confidence + 1e-4, model=model).route(text, AGENTS)
    assert (asked.agent_id, asked.confidence) == (CONVERSATION, sure.confidence)
    reached = int(sure.confidence * 100) / 100
    assert asked.reason == (
        f"no agent is sure: the best guess was code ({reached:.2f}), so conversation answers"
    )
    assert not asked.candidates[0].evidence, "it would be evidence for an agent that is silent"
    alone = HybridRouter(1.0, model=model).route(text, {"code": agent(), "data": agent()})
    assert (alone.agent_id, alone.confidence < 1) == ("code", True)
    assert alone.reason.startswith("no agent is sure: code is the best guess (")
    at_it = HybridRouter(sure.confidence, model=model).route(text, AGENTS)
    assert at_it.agent_id == "code"


# Agents come and go


@pytest.mark.parametrize("text", SOUND)
def test_an_unrelated_agent_changes_nothing(
    router: HybridRouter, with_bag: HybridRouter, text: str
) -> None:
    """Its keywords and examples do not occur: routes, confidences and shares are what they were."""
    for used in (router, with_bag):
        before = used.route(text, SHIPPED)
        after = used.route(text, {"early": UNRELATED, **SHIPPED, "late": UNRELATED})
        assert (after.agent_id, after.confidence) == (before.agent_id, before.confidence)
        shares = probabilities(after)
        assert (shares.pop("early"), shares.pop("late")) == (0, 0)
        assert shares == probabilities(before)


@given(ANY_TEXT)
@example("How are you?")
@settings(deadline=None, max_examples=60)
def test_an_unrelated_agent_changes_nothing_for_any_text(text: str) -> None:
    router = HybridRouter()
    before = router.route(text, SHIPPED)
    after = router.route(text, {**SHIPPED, "unrelated": UNRELATED, "bare": agent()})
    assert (after.agent_id, after.confidence) == (before.agent_id, before.confidence)


@pytest.mark.skipif(not OWN.exists(), reason="needs the labelled prompts of the repository")
def test_an_unrelated_agent_changes_nothing_for_real_prompts(router: HybridRouter) -> None:
    for prompt in read_examples(OWN)[::5]:
        before = router.route(prompt.text, SHIPPED)
        after = router.route(prompt.text, {**SHIPPED, "unrelated": UNRELATED})
        assert (after.agent_id, after.confidence) == (before.agent_id, before.confidence)


@pytest.mark.parametrize(
    "routing",
    [
        {"keywords": {"mainsail": 2, "jib": 2, "tide*": 2}},
        {"examples": SAILING_EXAMPLES},
        SAILING.routing.model_dump(),
    ],
    ids=["keywords", "examples", "both"],
)
def test_a_new_agent_takes_its_prompts_at_once(
    router: HybridRouter, routing: dict[str, Any]
) -> None:
    """A few keywords or examples are enough, without training, and clear prompts of others stay."""
    agents = {**SHIPPED, "sailing": agent(**routing)}
    taken = [
        "How do I reef the mainsail in a strong wind?",
        "Which knot for the jib sheet?",
        "when does the tide turn in our harbour",
    ]
    for text in taken:
        assert router.route(text, SHIPPED).agent_id != "sailing"
        found = router.route(text, agents)
        assert (found.agent_id, found.stages) == ("sailing", ["linear", "hints"])
    for text, owner in CLEAR.items():
        assert router.route(text, agents).agent_id == owner
        assert router.route(text, SHIPPED).agent_id == owner


@given(st.one_of(ANY_TEXT, st.sampled_from(SOUND)), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_an_agent_without_hints_never_wins(text: str, linear: bool, hints: bool) -> None:
    """Nothing speaks for it, not even a model in memory or a language model that is asked."""
    bare = {f"bare{number}": agent() for number in range(9)}
    router = HybridRouter(enable_linear=linear, enable_hints=hints, tie_break=lambda *_asked: 0.0)
    context = RouteContext(wait_s=lambda agent_id: 0.0 if agent_id in bare else 60.0)
    found = router.route(text, {**bare, **AGENTS}, context)
    assert found.agent_id not in bare
    assert all(probabilities(found)[agent_id] == 0 for agent_id in bare)


@pytest.mark.parametrize("text", SOUND)
def test_small_registries(router: HybridRouter, text: str) -> None:
    """Without a conversation agent, without any topic, with one agent: there is an answer."""
    no_conversation = {"code": agent(), "data": agent()}
    no_topic = {"tea": agent(keywords={"tea": 1}), "milk": agent()}
    for agents in (no_conversation, no_topic, {"milk": agent()}, {CONVERSATION: agent()}):
        assert_sound(router.route(text, agents), agents)


def test_nobody_has_anything_to_say() -> None:
    """Without a topic and without evidence the conversation answers, else the first."""
    router = HybridRouter()
    agents = {"tea": agent(keywords={"tea": 1}), "milk": agent()}
    found = router.route("a cup of coffee", agents)
    assert (found.agent_id, found.confidence) == ("tea", 0)
    assert found.reason == "nothing in the question points to an agent"
    assert router.route("a cup of tea", agents).agent_id == "tea"
    owns_nothing = {**agents, CONVERSATION: agent(topics=[])}
    assert router.route("a cup of coffee", owns_nothing).agent_id == CONVERSATION


def test_no_agents_at_all(router: HybridRouter) -> None:
    """There is nobody to name but the one that an engine looks for last."""
    context = RouteContext(images=1, session_id="s", wait_s=lambda _agent_id: 1.0)
    for _ in range(2):
        found = router.route("hello", {}, context)
        assert (found.agent_id, found.confidence, found.candidates) == (CONVERSATION, 0, [])


def test_two_agents_share_a_topic() -> None:
    """Alike they have half of it each, and the first answers; their hints decide between them."""
    agents = {
        CONVERSATION: agent(),
        "python": agent(topics=["code"], keywords={"django": 2}),
        "rust": agent(topics=["code"], keywords={"cargo": 2}),
    }
    router = toy({"compile": "code"}, threshold=0.0)
    shares = probabilities(router.route("compile it", agents))
    assert shares["python"] == shares["rust"] > 0.4
    assert router.route("compile it", agents).agent_id == "python"
    assert router.route("compile it with cargo", agents).agent_id == "rust"
    assert router.route("compile it with django", agents).agent_id == "python"


def test_topics_by_the_names_of_agents() -> None:
    """`reasoning` has math and logic; where another agent has one of them, they are told apart."""
    router = toy({"sum": "math", "knave": "logic"})
    assert router.route("sum", AGENTS).agent_id == "reasoning"
    assert router.route("knave", AGENTS).agent_id == "reasoning"
    split = {**AGENTS, "reasoning": agent(topics=["logic"]), "numbers": agent(topics=["math"])}
    assert router.route("sum", split).agent_id == "numbers"
    assert router.route("knave", split).agent_id == "reasoning"
    renamed = {CONVERSATION: agent(), "poet": agent(topics=["creative", "unheard-of"])}
    assert toy({"ode": "creative"}).route("ode", renamed).agent_id == "poet"


def test_topics_of_ones_own() -> None:
    """Weights may know other topics than ours."""
    model = knowing({"lease": "law", "herd": "farm"}, ("law", "farm", "talk"))
    agents = {
        "lawyer": agent(topics=["law"]),
        "farm": agent(),
        CONVERSATION: agent(topics=["talk"]),
    }
    router = HybridRouter(model=model)
    assert router.route("the lease", agents).agent_id == "lawyer"
    assert router.route("the herd", agents).agent_id == "farm"


def test_changed_hints_count_at_once() -> None:
    """The agents may change between two calls, under the same name."""
    router = HybridRouter(model=empty_model())
    tea, milk = agent(keywords={"tea": 3}), agent(keywords={"milk": 3})
    for spec, text in ((tea, "tea"), (milk, "milk"), (tea, "tea")):
        assert router.route(text, {**AGENTS, "drinks": spec}).agent_id == "drinks"
        assert router.route("water", {**AGENTS, "drinks": spec}).agent_id != "drinks"


def test_several_registries_at_a_time(router: HybridRouter) -> None:
    """One router may serve threads that have different agents."""
    registries = [
        SHIPPED,
        {CONVERSATION: agent(), "sailing": SAILING},
        {f"a{number}": agent(topics=[topic]) for number, topic in enumerate(TOPICS)},
        {**AGENTS, "unrelated": UNRELATED},
    ]
    expected = [[router.route(text, agents) for text in CLEAR] for agents in registries]

    def routes(agents: Mapping[str, AgentSpec]) -> list[list[Route]]:
        return [[router.route(text, agents) for text in CLEAR] for _ in range(10)]

    runs = run_all([lambda agents=agents: routes(agents) for agents in registries])  # type: ignore[misc]
    for run, wanted in zip(runs, expected, strict=True):
        assert all(found == wanted for found in run.join())


# Images


def test_images_go_to_vision() -> None:
    """To the agent that is called so or owns the topic, whatever the words say."""
    router = toy({"loop": "code"})
    for agents in (
        {**AGENTS, VISION: agent()},
        {**AGENTS, VISION: agent(topics=["creative"]), "eyes": agent(topics=["data", "vision"])},
    ):
        found = router.route("loop", agents, RouteContext(images=2))
        assert found.agent_id == ("eyes" if "eyes" in agents else VISION)
        assert (found.stages, found.reason) == (["attachment"], "images are attached")
        assert router.route("loop", agents).agent_id == "code"
    assert found.confidence > SURE_WITHOUT_EMBEDDING


def test_images_where_nobody_can_see() -> None:
    """Without an owner of vision the words decide; an agent may be called so and not see."""
    router = toy({"loop": "code"})
    for agents in (AGENTS, {**AGENTS, VISION: agent(topics=[])}):
        found = router.route("loop", agents, RouteContext(images=1))
        assert (found.agent_id, found.stages) == ("code", ["linear"])


# Stages that are off, not needed, or fail


@pytest.mark.parametrize("text", SOUND)
@pytest.mark.parametrize(("linear", "hints"), [(True, False), (False, True), (False, False)])
def test_stages_that_are_off(text: str, linear: bool, hints: bool) -> None:
    """There is a route without the linear model, without hints, and without both."""
    agents = {**SHIPPED, "sailing": SAILING}
    found = HybridRouter(enable_linear=linear, enable_hints=hints).route(text, agents)
    assert_sound(found, agents)
    assert found.stages[0] == ("linear" if linear else "start")
    assert hints or "hints" not in found.stages


def test_without_the_linear_model_the_hints_decide() -> None:
    """Without the linear model its weights have no influence, whether given or fitted."""
    router = toy({"tea": "code"}, enable_linear=False)
    agents = {**AGENTS, "creative": agent(keywords={"tea": 3})}
    assert router.route("tea", agents).agent_id == "creative"
    router.fit([("tea", "code")] * 20, agents, pull=0.01)
    assert router.route("tea", agents).agent_id == "creative"
    shares = probabilities(router.route("is there any coffee", AGENTS))
    assert shares["reasoning"] == pytest.approx(2 / 7, abs=1e-4)
    assert shares["code"] == pytest.approx(1 / 7, abs=1e-4)


def test_hints_are_asked_when_the_weights_are_not_sure() -> None:
    """Keywords of an agent with a topic matter below a probability, those of others always."""
    agents = {**AGENTS, "data": agent(keywords={"ledger": 20})}
    weak = HybridRouter(model=knowing({"loop": "code"}, strength=2.0))
    assert weak.route("loop ledger", agents).agent_id == "data"
    sure = toy({"loop": "code"}).route("loop ledger", agents)
    assert (sure.agent_id, sure.stages) == ("code", ["linear"])
    assert probabilities(sure)["code"] > SURE_WITHOUT_HINTS
    guest = {**AGENTS, "guest": agent(keywords={"ledger": 20})}
    assert toy({"loop": "code"}).route("loop ledger", guest).agent_id == "guest"


def test_an_embedding_model_that_is_not_needed() -> None:
    """It is not asked where the words are clear, nor for a text without any."""
    embedder = Bag()
    router = toy({"loop": "code"}, embedder=embedder)
    router.route("is this a loop", AGENTS)
    router.route("🙂 ... !?", AGENTS)
    assert embedder.asked == []
    assert "embedding" in router.route("hm hm", AGENTS).stages
    assert embedder.asked == [["hm hm"]], "weights without a head need no probes"


def test_an_embedding_model_that_is_not_here() -> None:
    """The route comes without it, and says so."""
    router = toy({}, embedder=Bag(is_here=False))
    found = router.route("hm hm", AGENTS)
    assert found.notes == ["the embedding model bag is not here"]
    assert_sound(found, AGENTS)


def test_an_embedding_model_that_would_have_to_be_loaded() -> None:
    """A call may say that nothing is to be loaded for it."""
    embedder = Bag(is_warm=False)
    router = toy({}, embedder=embedder)
    found = router.route("hm hm", AGENTS, RouteContext(may_load=False))
    assert found.notes == ["the embedding model bag was not asked: it would be loaded first"]
    assert embedder.asked == []
    assert "embedding" in router.route("hm hm", AGENTS).stages
    embedder.is_warm = True
    assert "embedding" in router.route("hm hm", AGENTS, RouteContext(may_load=False)).stages


def test_an_embedding_model_that_fails() -> None:
    """Its error is noted, and the stages before have decided."""
    embedder = Bag()
    router = toy({"loop": "code"}, embedder=embedder)
    agents = {**AGENTS, "tea": agent(examples=["a cup of tea"])}
    expected = toy({"loop": "code"}).route("a cup of tea or so", agents)
    embedder.is_broken = True
    found = router.route("a cup of tea or so", agents)
    assert found.notes == ["the embedding stage failed: the worker died"]
    assert (found.agent_id, found.confidence) == (expected.agent_id, expected.confidence)
    assert "embedding" not in found.stages
    embedder.is_broken = False
    assert "embedding" in router.route("a cup of tea or so", agents).stages


def test_examples_speak_where_no_head_was_trained() -> None:
    """With any embedding model the agent with the nearest example gains, with a topic or not."""
    agents = {
        **AGENTS,
        "data": agent(examples=["which shop sold most umbrellas", "umbrellas sold by month"]),
        "tea": agent(examples=["brew green tea leaves"]),
    }
    plain, router = toy({}), toy({}, embedder=Bag())
    question = "umbrellas sold most by month"
    assert probabilities(plain.route(question, agents))["data"] < 0.3
    found = router.route(question, agents)
    assert (found.agent_id, found.stages[-1]) == ("data", "embedding")
    assert found.candidates[0].stages["embedding"] == found.candidates[0].score
    assert_sound(found, agents)
    by_words = HybridRouter(model=empty_model(), embedder=Bag(), enable_hints=False)
    assert by_words.route("leaves tea green brew", agents).agent_id == "tea"


def test_a_rival_may_speak_where_the_weights_are_sure() -> None:
    """An agent without a topic whose examples are of a sure one is asked by their meaning; nothing
    else changes by that."""
    words = {"compile": "code"}
    rival = agent(examples=["compile the kernel of the turbine"])
    router = toy(words, embedder=Bag(), enable_hints=False)
    agents = {**AGENTS, "turbine": rival}
    assert router.route("turbine kernel compile", agents).agent_id == "turbine"
    other = "please compile my tiny program today"
    before, after = router.route(other, AGENTS), router.route(other, agents)
    assert (before.stages, after.stages) == (["linear"], ["linear", "embedding"])
    assert (after.agent_id, after.confidence) == (before.agent_id, before.confidence)


def test_a_rival_moves_no_topic_where_the_weights_are_sure() -> None:
    """A trained head counts if the words are not sure, with a rival or without."""
    head = np.zeros((Bag.dimensions + len(SIGNALS), len(TOPICS)), np.float32)
    bias = np.zeros(len(TOPICS), np.float32)
    bias[TOPICS.index("data")] = 3.0
    model = replace(knowing({"compile": "code"}), heads={"b": Head(head, bias, probes_of(Bag()))})
    router = HybridRouter(model=model, embedder=Bag())
    agents = {**AGENTS, "turbine": agent(examples=["compile the kernel of the turbine"])}
    assert router.route("hm, is it so", AGENTS).agent_id == "data"
    other = "please compile my tiny program today"
    before, after = router.route(other, AGENTS), router.route(other, agents)
    assert (before.stages[-1], after.stages[-1]) == ("linear", "embedding")
    assert (after.agent_id, after.confidence) == (before.agent_id, before.confidence)
    assert probabilities(after) == {**probabilities(before), "turbine": 0}


def test_the_tie_break_is_not_asked_about_nothing() -> None:
    """Between agents for which nothing speaks there is no question."""
    asked: list[str] = []

    def tie_break(query: str, *_agents: object) -> float:
        asked.append(query)
        return 0.0

    router = HybridRouter(tie_break=tie_break)
    found = router.route("coffee", {"tea": agent(keywords={"tea": 1}), "milk": agent()})
    assert (found.agent_id, found.notes, asked) == ("tea", [], [])


def test_the_tie_break_is_asked_when_two_are_close() -> None:
    """It says how probable the first is; None leaves it open, an error is noted."""
    calls: list[tuple[str, AgentSpec, AgentSpec]] = []
    said: list[float | Exception | None] = [0.1, None, WorkerTimeoutError("no answer"), 0.9]

    def tie_break(
        query: str, first: AgentSpec, second: AgentSpec, _limit_s: float | None
    ) -> float | None:
        calls.append((query, first, second))
        answer = said.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    agents = {"code": agent(), "data": agent()}
    router = toy({"loop": "code"}, tie_break=tie_break)
    plain = toy({"loop": "code"}).route("table", agents)
    assert plain.agent_id == "code"
    found = router.route("table", agents)
    assert found.agent_id == "data"
    assert calls == [("table", agents["code"], agents["data"])]
    assert probabilities(found) == {"data": 0.9, "code": 0.1}
    assert found.notes == ["a language model was asked: code 0.10, data 0.90"]
    assert router.route("table", agents) == plain
    failed = router.route("table", agents)
    assert (failed.agent_id, failed.notes) == ("code", ["the tie-break failed: no answer"])
    assert router.route("table", agents).agent_id == "code"
    router.route("loop", agents)
    assert len(calls) == 4, "a clear route needs no tie-break"


class Slow(Bag):
    """A slow embedder with a clock of its own."""

    def embed(self, texts: Sequence[str], limit_s: float | None = None) -> NDArray[np.float32]:
        found = super().embed(texts, limit_s)
        if limit_s is not None:
            raise DeadlineExceededError("it takes longer", deadline_s=limit_s)
        return found


def test_a_route_waits_once() -> None:
    """The limit is for all stages together: what was too slow for an earlier question of the
    conversation is not waited for again."""
    embedder, limits = Slow(), list[float | None]()

    def tie_break(*asked: Any) -> None:
        limits.append(asked[-1])

    router = toy({"loop": "code"}, embedder=embedder, tie_break=tie_break)
    history = [Message(role="user", content=f"hm {number}") for number in range(4)]
    found = router.route("hm", AGENTS, RouteContext(history=history, limit_s=20.0))
    assert found.notes[-1] == "the embedding stage failed: it takes longer"
    assert len(embedder.asked) == 1
    (limit,) = embedder.limits
    assert limit is not None
    assert 0 < limit <= 20
    router.route("table", AGENTS, RouteContext(limit_s=20.0))
    assert limits[-1] is not None
    assert 0 < limits[-1] <= 20
    over = router.route("table", AGENTS, RouteContext(limit_s=0.0))
    assert "the embedding stage failed: the route has used its 0 s" in over.notes
    assert "the tie-break failed: the route has used its 0 s" in over.notes
    assert_sound(over, AGENTS)


class Alike(Bag):
    """An embedding model that finds all texts much alike, as some do."""

    name = "alike"

    def embed(self, texts: Sequence[str], limit_s: float | None = None) -> NDArray[np.float32]:
        rows = super().embed(texts, limit_s) * 0.5
        rows[:, 0] += 0.8
        unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit


@pytest.mark.parametrize("text", CLEAR)
def test_an_agent_with_examples_takes_no_clear_prompt(text: str, router: HybridRouter) -> None:
    """Whatever an embedding model without trained weights finds alike."""
    for embedder in (Bag(), Alike()):
        agents = {**SHIPPED, "gardener": agent(examples=["When should I prune an apple tree?"])}
        found = HybridRouter(embedder=embedder).route(text, agents)
        assert found.agent_id == router.route(text, SHIPPED).agent_id


# What is in memory


def test_a_model_in_memory_wins_a_near_tie() -> None:
    """Of two that are nearly as good the one that can answer at once, and the notes say so."""
    agents = {"code": agent(), "data": agent(), CONVERSATION: agent(topics=[])}
    waits = {"code": 9.0, "data": 0.0, CONVERSATION: 0.0}
    context = RouteContext(wait_s=waits.get)
    router = toy({"loop": "code"})
    found = router.route("table", agents, context)
    assert (found.agent_id, found.stages[-1]) == ("data", "residency")
    assert found.notes == ["data instead of the near-equal code: it can answer 9.0 s earlier"]
    assert router.route("loop", agents, context).agent_id == "code"
    never = toy({"loop": "code"}, residency_s=0)
    assert never.route("table", agents, context).agent_id == "code"


@given(
    st.sampled_from([*CLEAR, "hm, what of it?", "sum up the table", "explain this loop"]),
    st.dictionaries(st.sampled_from(sorted(AGENTS)), st.floats(0, 100), min_size=2),
)
@settings(deadline=None, max_examples=60)
def test_residency_never_bridges_a_clear_difference(text: str, waits: dict[str, float]) -> None:
    router = HybridRouter()
    shares = probabilities(router.route(text, AGENTS))
    found = router.route(text, AGENTS, RouteContext(wait_s=waits.get))
    best = max(shares.values())
    assert best - shares[found.candidates[0].agent_id] <= NEAR + 1e-3


# Explicit requests


def test_explicit_requests_raise_the_odds() -> None:
    """An explicit request counts in addition to the words, and is noted."""
    weak = HybridRouter(model=empty_model())
    found = weak.route("Answer in Polish: what is a monad?", AGENTS)
    assert found.agent_id == "multilingual"
    assert found.notes == ["asked for outright: 'Answer in Polish'"]
    without = HybridRouter(model=empty_model(("conversation", "code")))
    assert_sound(without.route("Answer in Polish: why?", AGENTS), AGENTS)


# Learning


def test_fit_is_in_use_at_once() -> None:
    """A new agent is learned from pairs, others keep their prompts, and the model can be kept."""
    router = HybridRouter()
    agents = {**SHIPPED, "turbine": agent()}
    question = "why does the turbine governor hunt at low load"
    assert router.route(question, agents).agent_id != "turbine"
    pairs = [
        ("the turbine governor hunts", "turbine"),
        ("governor droop at low load on the turbine", "turbine"),
        ("why does the turbine trip on overspeed", "turbine"),
        ("turbine blade vibration at low load", "turbine"),
    ] * 3
    model = router.fit(pairs, agents, pull=0.3)
    assert router.model is model
    assert "turbine" in model.topics
    assert router.route(question, agents).agent_id == "turbine"
    for text, owner in CLEAR.items():
        assert router.route(text, agents).agent_id == owner


def test_fit_teaches_the_topics_that_the_hints_name() -> None:
    """A label is an agent: its own topics are learned, known or new."""
    agents = {**AGENTS, "lawyer": agent(topics=["law"]), "poet": agent(topics=["creative"])}
    router = HybridRouter(model=empty_model())
    pairs = [("the lease and the tenant", "lawyer"), ("an ode to the sea", "poet")] * 10
    model = router.fit(pairs, agents, pull=0.1)
    assert model.topics == (*TOPICS, "law")
    assert router.route("the tenant and the lease", agents).agent_id == "lawyer"
    shares = probabilities(router.route("an ode to the sea", agents))
    assert shares["poet"] == shares["creative"] > 0.3


def test_fit_also_trains_the_embedding_stage() -> None:
    """With an embedding model on this machine, its vectors get weights of their own."""
    router = HybridRouter(model=empty_model(), embedder=Bag())
    pairs = [("umbrella sales", "data"), ("rhyme of rain", "creative")] * 10
    assert router.fit(pairs, AGENTS, pull=0.1).heads == {}, "a head takes examples of all topics"
    router = HybridRouter(model=empty_model(), embedder=Bag())
    pairs += [(f"something of {topic}", topic) for topic in TOPICS] * 10
    model = router.fit(pairs, AGENTS, pull=0.1)
    assert model.heads[Bag.name].weights.shape[0] == Bag.dimensions + len(model.signal_weights)
    found = router.route("sales in may", AGENTS)
    assert "embedding" in found.stages
    assert found.agent_id == "data"
    absent = HybridRouter(model=empty_model(), embedder=Bag(is_here=False))
    assert absent.fit(pairs, AGENTS).heads == {}


def test_fit_waits_for_the_embedding_model() -> None:
    """Training waits for the embedding model, while a route would go on without it."""
    embedder = Bag()
    HybridRouter(model=empty_model(), embedder=embedder).fit([("rain", "creative")] * 20, AGENTS)
    assert embedder.limits == [math.inf, math.inf, math.inf], "two batches, and the probes"


def test_nothing_is_embedded_for_what_cannot_be_learned() -> None:
    """Faulty arguments are refused before any training."""
    embedder = Bag()
    router = HybridRouter(model=empty_model(), embedder=embedder)
    for examples, pull in ([("a", "code")], -1.0), ([(1, "code")], 1.0), ([], 1.0):
        with pytest.raises(InvalidRequestError):
            router.fit(examples, AGENTS, pull=pull)  # type: ignore[arg-type]
    assert embedder.asked == []


@pytest.mark.parametrize(
    "given",
    [{"text": "q", "label": "code"}, ("q",), ("q", "code", "data"), "qc", 7, None],
    ids=str,
)
def test_what_is_no_example(given: Any) -> None:
    """A line of a file of examples is no pair either."""
    router = HybridRouter(model=empty_model())
    with pytest.raises(InvalidRequestError, match="example 1: a pair of text and agent"):
        router.fit([("a", "code"), given], AGENTS)


def test_two_that_fit_at_once() -> None:
    """Neither loses what the other has learned."""
    router = HybridRouter(model=empty_model())
    topics = [f"topic{number}" for number in range(4)]
    runs = [lambda t=t: router.fit([("word", t)], AGENTS) for t in topics]  # type: ignore[misc]
    for run in run_all(runs):
        run.join()
    assert set(topics) < set(router.model.topics)


def test_what_was_learned_from_words_holds_beside_an_old_head() -> None:
    """A topic that the head of the embedding model never saw keeps its probability by the words;
    the others are still judged by both."""
    agents = {**AGENTS, "plant": agent()}
    router = HybridRouter(model=empty_model(), embedder=Bag())
    router.fit([(f"something of {topic}", topic) for topic in TOPICS] * 20, AGENTS, pull=0.01)
    by_words = HybridRouter(model=router.model)
    pairs = [("hm, the turbine trips", "plant"), ("tell me more", "conversation")] * 3
    by_words.fit(pairs, agents, pull=0.001)
    both = HybridRouter(model=by_words.model, embedder=Bag())
    question = "the turbine hums, more or less"
    words, fused = (probabilities(one.route(question, agents)) for one in (by_words, both))
    assert words["plant"] > 0.2
    assert fused["plant"] == pytest.approx(words["plant"], abs=0.01)
    others = [agent_id for agent_id in AGENTS if abs(fused[agent_id] - words[agent_id]) > 1e-3]
    assert others


def test_fit_beside_routes() -> None:
    """Threads that route while another one fits get routes of the old or of the new model."""
    router = HybridRouter(model=empty_model())

    def fit() -> None:
        for number in range(2):
            router.fit([("word", f"topic{number}")], AGENTS)

    def route() -> None:
        for _ in range(50):
            assert_sound(router.route("word", AGENTS), AGENTS)

    for run in run_all([fit, route, route]):
        run.join()
