"""The reason of a route is about the agent that answers, whatever the stages did before."""

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st
from routes import AGENTS, ANY_TEXT, REPEATED, Bag, agent, assert_honest, knowing

from orion_oie.errors import WorkerTimeoutError
from orion_oie.models.specs import AgentSpec
from orion_oie.routing.base import VISION, RouteContext
from orion_oie.routing.hybrid import HybridRouter
from orion_oie.routing.keyword import KeywordRouter
from orion_oie.schemas.requests import Message

WORDS = {"loop": "code", "sonnet": "creative", "table": "data", "sum": "math", "knave": "logic"}
REGISTRIES: list[Mapping[str, AgentSpec]] = [
    AGENTS,
    {**AGENTS, VISION: agent(keywords={"photo": 3})},
    {**AGENTS, "tea": agent(keywords={"tea": 3, "loop": 2}, examples=["a cup of green tea"])},
    {"code": agent(keywords={"loop": 1}), "data": agent(), "tea": agent(keywords={"tea": 1})},
    {**AGENTS, "poet": agent(topics=["creative"]), "rust": agent(topics=["code"])},
]
PHRASES = [
    *(*WORDS, "tea", "photo", "and then?", "Answer in Polish: why?", "in SQL", "by the way,"),
    *("write a poem about a table", "a cup of tea", "what is the sum of it", "hm hm", ""),
]
texts = st.one_of(
    st.lists(st.sampled_from([*PHRASES, *REPEATED]), max_size=6).map(" ".join), ANY_TEXT
)
registries = st.sampled_from(REGISTRIES)


@given(
    st.lists(texts, min_size=1, max_size=4),
    registries,
    st.floats(0, 1.1),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]),
    st.dictionaries(st.sampled_from([*AGENTS, "tea", "rust"]), st.floats(0, 30)),
    st.sampled_from([NotImplemented, "session", "history"]),
    st.integers(0, 1),
    st.booleans(),
)
@settings(deadline=None, max_examples=250)
def test_a_reason_is_one_for_the_agent_that_answers(
    turns: list[str],
    agents: Mapping[str, AgentSpec],
    threshold: float,
    stages: tuple[bool, bool, bool, bool],
    said: float | None,
    waits: Mapping[str, float],
    conversation: object,
    images: int,
    is_trained: bool,
) -> None:
    """For all texts, registries, thresholds, stages and conversations."""
    linear, explicit, hints, embeddings = stages

    def tie_break(*_asked: object) -> float | None:
        if said == 0.3:
            raise WorkerTimeoutError("no answer")
        return said

    router = HybridRouter(
        threshold,
        model=knowing(WORDS, strength=6.0) if is_trained else None,
        embedder=Bag() if embeddings else None,
        enable_linear=linear,
        enable_explicit=explicit,
        enable_hints=hints,
        tie_break=tie_break,
    )
    history: list[Message] = []
    for turn in turns:
        context = RouteContext(
            images=images if turn is turns[-1] else 0,
            session_id="s" if conversation == "session" else None,
            history=tuple(history) if conversation == "history" else (),
            wait_s=waits.get,
        )
        found = router.route(turn, agents, context)
        assert_honest(found)
        history.append(Message(role="user", content=turn))


@given(texts, registries, st.floats(0, 1.1))
@settings(deadline=None, max_examples=100)
def test_a_reason_of_hints_is_one_for_the_agent_that_answers(
    text: str, agents: Mapping[str, AgentSpec], threshold: float
) -> None:
    """Without a model, too."""
    assert_honest(KeywordRouter(threshold).route(text, agents))


def test_what_was_asked_for_outright_is_no_reason_for_another_agent() -> None:
    """The note says which topic it was; the reason is silent about it."""
    router = HybridRouter(model=knowing({"sonnet": "creative"}))
    found = router.route("sonnet. Answer in Polish", AGENTS)
    assert found.agent_id == "creative"
    assert found.reason == "reads most like creative: 'sonnet'"
    assert found.notes == ["'Answer in Polish' asks for multilingual"]


def test_a_stage_that_is_overruled_gives_no_reason() -> None:
    """A turn that would stay, and then goes to one whose model is in memory, leaves."""
    agents = {"code": agent(), "data": agent(), "conversation": agent(topics=[])}
    router = HybridRouter(model=knowing({"loop": "code"}), enable_explicit=False)
    router.route("loop", agents, RouteContext(session_id="s"))
    context = RouteContext(session_id="s", wait_s={"code": 9.0, "data": 0.0}.get)
    found = router.route("hm " * 235, agents, context)
    assert found.agent_id == "data"
    assert "leaves code, which answered last" in found.notes
    assert "data instead of the near-equal code: it can answer 9.0 s earlier" in found.reason
