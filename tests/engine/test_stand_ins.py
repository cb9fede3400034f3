"""Nothing is replaced in silence: the result, the statistics, the health and a warning say so."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engines import MakeEngine, delivered, ended, outcomes

from orion_oie import (
    EngineConfig,
    InvalidRequestError,
    ModelCorruptError,
    ModelNotFoundError,
    ModelRegistry,
    OrionInferenceEngine,
    OrionWarning,
    WorkerCrashedError,
)
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.engine.stand_ins import forget_warnings

LITE = {"models": {"primary": "big", "lite": "small", "fallback": ["other"]}}


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> Iterator[None]:
    forget_warnings()
    yield
    forget_warnings()


@pytest.fixture
def warned() -> Iterator[Callable[[], list[str]]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(one.message) for one in caught if one.category is OrionWarning]


def test_an_answer_says_who_stood_in(make_engine: MakeEngine, warned: Any) -> None:
    """Which model was wanted, in the result, its line, the counts and the health."""
    engine = make_engine(agents={"conversation": LITE}, missing=["big"])
    result = engine.infer("Hello?")
    assert (result.model_id, result.wanted_model_id, result.is_stand_in) == ("small", "big", True)
    assert "small@q4 in place of big" in repr(result)
    assert "big.gguf" in str(result.receipt)
    assert engine.stats().stand_ins == 1
    health = engine.health()
    assert health.status == "degraded"
    (reason,) = health.reasons
    assert "agent 'conversation' is answered by small in place of big" in reason
    assert "big.gguf" in reason
    (warning,) = warned()
    assert "big.gguf" in warning
    assert "stand_in='allow'" in warning


def test_the_wanted_model_is_no_stand_in(make_engine: MakeEngine, warned: Any) -> None:
    """Nothing is said when all is as it was asked for."""
    engine = make_engine(agents={"conversation": ["big", "small"]})
    result = engine.infer("Hello?")
    assert (result.wanted_model_id, result.is_stand_in) == ("big", False)
    assert (engine.stats().stand_ins, engine.health().status, warned()) == (0, "healthy", [])


def test_one_warning_for_each_agent_and_process(make_engine: MakeEngine, warned: Any) -> None:
    """A second question and a second engine are not warned again; another agent is."""
    agents = {"conversation": LITE, "code": {"models": {"primary": "far", "lite": "small"}}}
    for _ in range(2):
        engine = make_engine(agents=agents, missing=["big", "far"])
        for agent in ("conversation", "code", "conversation"):
            engine.infer("Hello?", agent=agent)
    assert len(warned()) == 2


def test_the_warning_points_to_the_program(make_engine: MakeEngine) -> None:
    """Its line is the one that asked."""
    engine = make_engine(agents={"conversation": LITE}, missing=["big"])
    with pytest.warns(OrionWarning) as caught:
        engine.infer("Hello?")
    assert caught[0].filename == __file__


def test_a_preload_says_it_too(make_engine: MakeEngine) -> None:
    """Another model is loaded than the agent's own."""
    engine = make_engine(agents={"conversation": LITE}, missing=["big"])
    with pytest.warns(OrionWarning, match=r"big\.gguf") as caught:
        assert engine.preload("conversation").model_id == "small"
    assert caught[0].filename == __file__


def test_a_warning_that_is_an_error_raises(make_engine: MakeEngine) -> None:
    """As Python's filters promise; the request ends, and the next one is answered."""
    engine = make_engine(agents={"conversation": LITE}, missing=["big"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OrionWarning):
            engine.infer("Hello?")
        assert engine.infer("Hello?").is_stand_in
    assert engine.stats().running == 0


def test_what_to_fetch_is_named(warned: Any) -> None:
    """The packaged agents say how to fetch their models; a missing file has no such advice."""
    backend = FakeBackend({"*": FakeAnswer("yes")})
    with OrionInferenceEngine(backend=backend) as engine:
        engine.infer("Hello?", agent="code")
    assert "orion-oie pull code" in warned()[0]
    forget_warnings()
    registry = ModelRegistry.packaged()
    registry.add_model("mine", {"source": {"path": "/nowhere/mine.gguf"}})
    models = {"primary": "mine", "lite": "smollm2-135m-instruct"}
    registry.update_agent("code", models=models)
    with OrionInferenceEngine(registry, backend=backend) as engine:
        engine.infer("Hello?", agent="code")
    assert "/nowhere/mine.gguf" in warned()[-1]
    assert "pull" not in warned()[-1]


def test_allowed_in_silence(make_engine: MakeEngine, warned: Any) -> None:
    """No warning, and nothing in the health; the result still says it."""
    engine = make_engine(agents={"conversation": LITE}, missing=["big"], stand_in="allow")
    assert engine.infer("Hello?").is_stand_in
    assert (warned(), engine.health().status) == ([], "healthy")
    assert engine.stats().stand_ins == 1


@pytest.mark.parametrize("call", ["infer", "preload"])
def test_never_allowed(make_engine: MakeEngine, call: str) -> None:
    """The reason that the wanted model cannot answer is raised, and who could is named."""
    engine = make_engine(agents={"conversation": LITE}, missing=["big"], stand_in="error")
    with pytest.raises(ModelNotFoundError, match=r"big\.gguf.*small could.*stand_in"):
        engine.preload("conversation") if call == "preload" else engine.infer("Hello?")


def test_never_allowed_after_a_failure_either(make_engine: MakeEngine) -> None:
    """Fallbacks are stand-ins, too."""
    backend = FakeBackend(
        {"*": FakeAnswer("yes")}, load_errors={"main": [ModelCorruptError("bad")]}
    )
    engine = make_engine(backend, {"conversation": ["main", "spare"]}, stand_in="error")
    with pytest.raises(ModelCorruptError, match="bad"):
        engine.infer("Hello?")
    assert not engine.infer("Hello?").is_stand_in


def test_no_lite_model_while_it_loads_either(make_engine: MakeEngine) -> None:
    """The request waits for the model that it wants."""
    engine = make_engine(agents={"conversation": LITE}, stand_in="error")
    result = engine.infer("Hello?")
    assert (result.model_id, result.is_stand_in) == ("big", False)


def test_a_lite_model_that_answers_meanwhile_is_a_stand_in(make_engine: MakeEngine) -> None:
    """While the wanted one is loaded; then nobody stands in any more, and the health is good."""
    engine = make_engine(agents={"conversation": LITE})
    handle = ended(engine.submit("Hello?"))
    assert handle.result().is_stand_in
    assert "is being loaded" in engine.health().reasons[0]
    handle.complete_loading.result(10)
    assert not engine.infer("Hello?").is_stand_in
    assert engine.health().status == "healthy"


def test_a_model_that_failed_is_told(make_engine: MakeEngine) -> None:
    """A crash, a fallback: the health has the error until the wanted model answers again."""
    crash = FakeAnswer("", error=WorkerCrashedError("it died"))
    answers = {"main": [crash, crash, FakeAnswer("good")], "spare": FakeAnswer("spare")}
    engine = make_engine(FakeBackend(answers), {"conversation": ["main", "spare"]})
    assert engine.infer("Hello?").is_stand_in
    assert "it died" in engine.health().reasons[0]
    assert not engine.infer("Hello?").is_stand_in
    assert engine.health().status == "healthy"


# Whose fallbacks follow


def test_the_conversation_agent_follows_for_packaged_agents_alone() -> None:
    """An agent with models of its own has the fallbacks that were written down, and no others."""
    registry = ModelRegistry.packaged()
    before = [link.agent_id for link in registry.chain("creative")]
    assert before[-1] == "conversation"
    registry.update_agent("creative", system_prompt="Rhyme.")
    assert [link.agent_id for link in registry.chain("creative")] == before
    registry.add_model("mine", {"source": {"path": "/nowhere/mine.gguf"}})
    registry.update_agent("creative", models={"primary": "mine"})
    assert [link.model_id for link in registry.chain("creative")] == ["mine"]
    registry.update_agent("creative", fallback_agent="conversation")
    assert registry.chain("creative")[-1].agent_id == "conversation"
    registry.add_agent("new", {"models": {"primary": "mine", "fallback": ["qwen2.5-7b-instruct"]}})
    assert [link.model_id for link in registry.chain("new")] == ["mine", "qwen2.5-7b-instruct"]


def test_who_was_considered_is_the_chain(make_engine: MakeEngine) -> None:
    """The receipt of an agent without fallbacks has one model."""
    engine = make_engine(agents={"code": ["a"], "conversation": ["b"]}, missing=["a"])
    handle = ended(engine.submit("Hello?", agent="code"))
    with pytest.raises(ModelNotFoundError, match=r"a\.gguf"):
        handle.result()
    assert outcomes(handle) == [("a", "primary", "unavailable")]


# What people see


def test_a_result_is_its_answer(make_engine: MakeEngine) -> None:
    """As text the answer, as a value one line, the receipt a short table."""
    engine = make_engine({"*": FakeAnswer("One fine\nanswer. " * 9)})
    result = engine.infer("Hello?")
    assert str(result) == result.text == result.content
    assert repr(result).startswith("<InferenceResult conversation, main@q4, ")
    assert "\n" not in repr(result)
    assert len(repr(result)) < 200
    table = str(result.receipt).splitlines()
    labels = [line.split()[0] for line in table if not line.startswith("    ")]
    assert labels[:4] == ["request", "agent", "model", "primary"]
    assert max(map(len, table)) <= 110
    assert f"{result}" == result.content
    assert json.loads(result.model_dump_json())["is_stand_in"] is False


def test_an_answer_that_was_cut_off_says_so(make_engine: MakeEngine) -> None:
    """Where its text alone does not show it."""
    engine = make_engine({"*": FakeAnswer("word " * 50)})
    result = engine.infer("Hello?", max_tokens=3)
    assert result.receipt.finish_reason == "length"
    assert "not complete" in str(result.receipt)
    assert "not complete" not in str(engine.infer("Hello?", max_tokens=500).receipt)


def test_an_engine_says_what_is_loaded(make_engine: MakeEngine) -> None:
    """`print(engine)` names the models in memory."""
    engine = make_engine()
    assert repr(engine) == str(engine) == "<OrionInferenceEngine: 1 agents, 1 models, 0 loaded>"
    engine.infer("Hello?")
    assert str(engine).splitlines()[1].startswith("  main@q4: ")
    engine.shutdown()
    assert "closed" in str(engine)


def test_the_log_says_what_was_answered(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """At INFO a line has agent, model, tokens and time, and no word of the question."""
    caplog.set_level(logging.INFO)
    engine = make_engine()
    engine.infer("a secret question")
    delivered(engine)
    (line,) = [r.getMessage() for r in caplog.records if "request.succeeded" in r.getMessage()]
    for fact in ("agent_id=conversation", "model_id=main", "completion_tokens=", "total_ms="):
        assert fact in line
    assert "secret" not in caplog.text
    assert {r.name.partition(".")[0] for r in caplog.records} == {"orion_oie"}


def test_a_policy_that_there_is_not() -> None:
    """The allowed ones are named."""
    with pytest.raises(InvalidRequestError, match="'warn'"):
        EngineConfig(stand_in="never")
