"""The router as the engine uses it: what it is told, what it may load, and what is kept of it."""

import gc
import json
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from engines import TEXT, Clock, MakeEngine, names, parts
from helpers import all_stages_but, config_with, registry_with
from minilm import write_minilm
from tiny import write_tiny_llama

from orion_oie import (
    EngineConfig,
    InferenceResult,
    InvalidRequestError,
    ModelRegistry,
    OrionInferenceEngine,
    RequestCancelledError,
    UnknownAgentError,
)
from orion_oie.backends.base import Footprint, LoadSpec
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.errors import ModelCorruptError
from orion_oie.routing.base import RouteContext
from orion_oie.routing.feedback import FeedbackStore
from orion_oie.routing.hybrid import HybridRouter

MIB = 2**20
CODE = "Write a Python function that merges two sorted lists, with type hints and a docstring."
POEM = "Write a poem about the first snow of the year."
FOLLOW_UP = "Now make it shorter"
TRIO = {"conversation": ["a"], "code": ["b"], "creative": ["c"]}
DUO = {"code": ["b"], "data": ["d"]}  # as likely as each other for a router without weights
MINILM = "all-minilm-l6-v2"


def routed(engine: OrionInferenceEngine, query: str, **options: Any) -> Any:
    route = engine.infer(query, **options).receipt.route
    assert route is not None
    return route


# -- the default router and its settings


def test_the_default_router_is_the_hybrid_one(make_engine: MakeEngine) -> None:
    """Questions go to the agent of their topic, and the receipt says by which stages."""
    engine = make_engine(agents=TRIO)
    assert isinstance(engine.router, HybridRouter)
    code = routed(engine, CODE)
    assert (code.agent_id, code.stages[0]) == ("code", "linear")
    assert code.confidence > 0.5
    assert routed(engine, POEM).agent_id == "creative"
    assert engine.infer(CODE).confidence == code.confidence


def test_an_application_brings_its_own_router(make_engine: MakeEngine) -> None:
    """It is asked instead, and nothing of the default one is made."""
    own = HybridRouter(enable_linear=False, residency_s=0.0)
    engine = make_engine(agents=TRIO, router=own, weights="/nowhere/weights.npz")
    assert engine.router is own
    assert routed(engine, CODE).stages == ["start"]


def test_the_weights_can_be_left_out(make_engine: MakeEngine) -> None:
    """Then the hints of the registry decide."""
    hinted = {"models": {"primary": "b"}, "routing": {"keywords": {"snow": 3.0}}}
    agents = {"conversation": ["a"], "creative": ["c"], "skiing": hinted}
    engine = make_engine(agents=agents, stages=all_stages_but("linear"))
    route = routed(engine, "Is there snow?")
    assert (route.agent_id, route.stages) == ("skiing", ["start", "hints"])


def test_other_weights_can_be_named(make_engine: MakeEngine, tmp_path: Path) -> None:
    """A file of one's own training is read when the engine is made."""
    agents = {**TRIO, "gardening": ["g"]}
    trained = HybridRouter().fit([("When do I prune roses?", "gardening")] * 4, pull=0.1)
    path = trained.save(tmp_path / "weights.npz")
    engine = make_engine(agents=agents, weights=path)
    assert routed(engine, "When do I prune roses?").agent_id == "gardening"
    assert make_engine(agents=agents).plan("When do I prune roses?").route.agent_id != "gardening"


def test_weights_that_are_none_are_refused_at_once(make_engine: MakeEngine, tmp_path: Path) -> None:
    """The engine is not made: no question would be routed as it was meant."""
    (tmp_path / "weights.npz").write_bytes(b"nothing")
    for path in (tmp_path / "weights.npz", tmp_path / "missing.npz"):
        with pytest.raises(InvalidRequestError, match="weights"):
            make_engine(weights=path)


def test_an_engine_is_made_without_numpy() -> None:
    """The router's weights are paid for by the first question."""
    program = (
        "import sys; from orion_oie import OrionInferenceEngine as E, EngineConfig as C;"
        "from orion_oie.backends.fake import FakeBackend;"
        "e = E(config=C(stand_in='allow'), backend=FakeBackend());"
        "print('numpy' in sys.modules, e.router.threshold);"
        "e.infer('Hello?'); print('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False 0.25\nTrue\n", "")


def test_the_log_does_not_quote_the_question(make_engine: MakeEngine) -> None:
    """The reason of a route names words of the question: it is told like one."""

    def told(**config: Any) -> Any:
        engine = make_engine(agents=TRIO, **config)
        engine.infer(CODE)
        return next(e for e in engine.export_logs() if e["event"] == "request.routed")

    event = told()
    assert (event["agent_id"], event["stages"][0]) == ("code", "linear")
    assert "Python" not in json.dumps(event)
    assert "ython" in told(include_content=True)["text"]


# -- conversations


def test_a_conversation_stays_with_its_agent(make_engine: MakeEngine) -> None:
    """A turn that says little goes where the last one went, in its session alone."""
    engine = make_engine(agents=TRIO)
    engine.infer(CODE, session_id="one")
    stayed = routed(engine, FOLLOW_UP, session_id="one")
    assert (stayed.agent_id, stayed.stages[-1]) == ("code", "session")
    for options in ({}, {"session_id": "two"}):
        assert "session" not in routed(engine, FOLLOW_UP, **options).stages


def test_a_conversation_may_change_its_agent(make_engine: MakeEngine) -> None:
    """A question that is clearly for another agent goes there."""
    engine = make_engine(agents=TRIO)
    engine.infer(CODE, session_id="one")
    poem = (
        "Something else: write a long and tender poem about the first snow of the year, in rhyme."
    )
    left = routed(engine, poem, session_id="one")
    assert left.agent_id == "creative"
    assert "leaves code" in left.reason


def test_a_history_tells_where_a_conversation_is(make_engine: MakeEngine) -> None:
    """Also without a session."""
    engine = make_engine(agents=TRIO)
    history = [{"role": "user", "content": CODE}, {"role": "assistant", "content": "def merge..."}]
    route = routed(engine, FOLLOW_UP, conversation_history=history)
    assert (route.agent_id, route.stages[-1]) == ("code", "session")


def test_a_plan_leaves_no_trace_in_a_conversation(make_engine: MakeEngine) -> None:
    """What was only planned was not said; what was said is planned with."""
    engine = make_engine(agents=TRIO)
    assert engine.plan(CODE, session_id="one").route.agent_id == "code"
    assert "session" not in engine.plan(FOLLOW_UP, session_id="one").route.stages
    engine.infer(CODE, session_id="one")
    planned = engine.plan(FOLLOW_UP, session_id="one").route
    assert planned.stages[-1] == "session"
    assert planned == routed(engine, FOLLOW_UP, session_id="one")


def test_a_named_agent_is_not_questioned(make_engine: MakeEngine) -> None:
    """The router is not asked."""
    engine = make_engine(agents=TRIO)
    route = routed(engine, CODE, agent="creative", session_id="one")
    assert (route.agent_id, route.confidence, route.stages) == ("creative", 1.0, [])


def test_a_conversation_goes_on_with_the_agent_that_was_named(make_engine: MakeEngine) -> None:
    """Whoever names it once need not do so again; a plan that names one says nothing."""
    engine = make_engine(agents=TRIO)
    engine.infer(CODE, agent="creative", session_id="one")
    engine.plan(CODE, agent="code", session_id="one")
    stayed = routed(engine, FOLLOW_UP, session_id="one")
    assert (stayed.agent_id, stayed.stages[-1]) == ("creative", "session")
    engine.infer(CODE, agent="code")
    assert "session" not in routed(engine, FOLLOW_UP).stages


def test_any_stage_can_be_left_out(make_engine: MakeEngine) -> None:
    """Each by a setting, and then the route shows nothing of it."""
    hinted = {"models": {"primary": "c"}, "routing": {"keywords": {"hm": 3.0}}}
    agents = {**TRIO, "multilingual": ["a"], "skiing": hinted}
    asked = "hm, translate it into Dutch, will you"
    route = routed(make_engine(agents=agents), asked)
    assert {"linear", "hints"} <= set(route.stages)
    assert any("asks for multilingual" in note for note in route.notes)
    without = routed(make_engine(agents=agents, stages=all_stages_but("hints", "explicit")), asked)
    assert (without.stages, without.notes) == (["linear"], [])
    engine = make_engine(agents=agents, stages=all_stages_but("sessions"))
    engine.infer(CODE, session_id="one")
    history = [{"role": "user", "content": CODE}]
    follow_up = routed(engine, FOLLOW_UP, session_id="one", conversation_history=history)
    assert "session" not in follow_up.stages


def test_who_stands_in_is_who_has_answered(make_engine: MakeEngine) -> None:
    """Where no model of an agent is here, the conversation goes on with the one that answered."""
    code = {"models": {"primary": "b"}, "fallback_agent": "conversation"}
    engine = make_engine(agents={**TRIO, "code": code}, missing=["b"])
    result = engine.infer(CODE, session_id="one")
    assert result.receipt.route is not None
    assert (result.receipt.route.agent_id, result.agent_id) == ("code", "conversation")
    stayed = routed(engine, FOLLOW_UP, session_id="one")
    assert (stayed.agent_id, stayed.stages[-1]) == ("conversation", "session")


def test_only_who_has_answered_is_remembered(make_engine: MakeEngine) -> None:
    """A turn that failed before anybody read of it moves no conversation; one that was cancelled
    halfway does."""
    backend = FakeBackend({"*": FakeAnswer(TEXT), "b": FakeAnswer(TEXT, delay_s=0.01)})
    engine = make_engine(backend, {**TRIO, "vision": ["v"]})
    engine.infer(POEM, session_id="one")
    with pytest.raises(InvalidRequestError, match="image"):
        engine.infer("What is this?", images=[b"x"], session_id="one")
    handle = engine.submit(CODE, session_id="one")
    handle.cancel()
    with pytest.raises(RequestCancelledError):
        handle.result(10)
    assert routed(engine, FOLLOW_UP, session_id="one").agent_id == "creative"
    handle = engine.stream(CODE, session_id="one")
    next(iter(handle))
    handle.cancel()
    with pytest.raises(RequestCancelledError):
        handle.result(10)
    assert routed(engine, FOLLOW_UP, session_id="one").agent_id == "code"


# -- images


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG")
    return path


def test_images_go_to_the_agent_that_sees(make_engine: MakeEngine, image: Path) -> None:
    """The plan shows the route; the answer is refused, because no model reads images, and none is
    loaded to find that out."""
    backend = FakeBackend({"*": FakeAnswer(TEXT)})
    engine = make_engine(backend, {"conversation": ["a"], "vision": ["v"]})
    given = [str(image), image, image.read_bytes()]
    plan = engine.plan("What is this?", images=given)
    assert (plan.route.agent_id, plan.route.stages) == ("vision", ["attachment"])
    assert plan.model is None
    assert {one.why_not for one in plan.considered} == {"it cannot read images"}
    handle = engine.submit("What is this?", images=given)
    with pytest.raises(InvalidRequestError, match="with 3 images, and no model of agent 'vision'"):
        handle.result(10)
    assert handle.receipt is not None
    assert handle.receipt.route == plan.route
    assert backend.loaded == []
    assert engine.plan("Hello, how are you?").route.agent_id == "conversation"


@pytest.mark.parametrize("agent", [None, "conversation"])
def test_images_are_never_left_out(make_engine: MakeEngine, image: Path, agent: str | None) -> None:
    """Also where no agent is for images, or another one is named, nobody answers as if there were
    none."""
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match="with an image, and no model of agent 'conver"):
        engine.infer("What is this?", images=[image], agent=agent)
    assert engine.infer("Hello?", images=[]).content == TEXT


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["/nowhere/image.png"], r"images\[0\]: there is no file '/nowhere/image.png'"),
        (["."], r"images\[0\]: there is no file '\.'"),
        ([b"x", "\0"], r"images\[1\]: there is no file"),
        ([b""], r"images\[0\] is empty"),
        ([b"x"] * 17, "images: .*at most 16"),
        ([3], r"images\.0: .*a path or the bytes of a file are needed, got 3"),
        ([None], r"images\.0: .*a path or the bytes of a file are needed, got None"),
        ("image.png", "images: .*valid list"),
    ],
)
def test_images_that_are_none_are_refused(
    make_engine: MakeEngine, images: Any, message: str
) -> None:
    """Before anything is routed, in a line that says which."""
    engine = make_engine()
    for ask in (engine.plan, engine.infer):
        with pytest.raises(InvalidRequestError, match=message) as caught:
            ask("What is this?", images=images)
        assert "\n" not in str(caught.value)
    assert "request.routed" not in names(engine)


def test_a_file_that_cannot_be_read_is_no_image(
    make_engine: MakeEngine, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason of the system is passed on."""

    opened = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path == image:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InvalidRequestError, match=r"image\.png' cannot be read: Permission denied"):
        make_engine().plan("What is this?", images=[image])


# -- what is in memory


def test_of_equal_agents_the_one_in_memory_answers(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Nobody waits for a load that makes no difference; `residency_s=0` leaves it at that."""
    backend = FakeBackend({"*": FakeAnswer(TEXT)})
    settings = {"stages": all_stages_but("linear"), "cache_dir": tmp_path / "cache"}
    engine = make_engine(backend, DUO, **settings)
    assert engine.plan("Hm.").route.agent_id == "code"
    engine.preload("data")
    route = routed(engine, "Hm.")
    assert (route.agent_id, route.stages[-1]) == ("data", "residency")
    assert "data instead of the near-equal code" in route.reason
    assert backend.loaded == ["d@q4"]
    strict = make_engine(agents=DUO, residency_s=0.0, **settings)
    strict.preload("data")
    assert routed(strict, "Hm.").agent_id == "code"


def test_a_better_agent_is_worth_a_load(make_engine: MakeEngine) -> None:
    """What is clearly for another agent goes there, whatever is in memory."""
    engine = make_engine(agents=TRIO)
    engine.preload("creative")
    assert routed(engine, CODE).agent_id == "code"


class Picky(FakeBackend):
    """Knows that the files of `w` are no model."""

    def footprint(self, spec: LoadSpec) -> Footprint:
        if spec.info.model_id == "w":
            raise ModelCorruptError("no model")
        return super().footprint(spec)


def test_how_long_an_agent_would_take(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Nothing in memory, a load otherwise; nobody knows where something must be fetched, or where
    the files are no model."""
    source = {"url": "https://example.org", "shards": ["f.gguf"]}
    variant = {"quantization": "q4", "size_mb": 7, "min_ram_gb": 0.1, "source": source}
    lost = {"models": {"primary": "l"}, "fallback_agent": "conversation"}
    agents = {"conversation": ["a"], "far": ["f"], "wrong": ["w"], "lost": lost}
    engine = make_engine(
        Picky({"*": FakeAnswer(TEXT)}),
        agents,
        models={"f": {"variants": {"q4": variant}}},
        missing=["l"],
        download={"auto": True},
        cache_dir=tmp_path / "cache",
    )
    assert parts(engine).pipeline.wait_s("conversation") == pytest.approx(0.3)
    engine.infer("Hello?")
    assert parts(engine).pipeline.wait_s("conversation") == 0.0
    assert parts(engine).pipeline.wait_s("far") is None
    assert parts(engine).pipeline.wait_s("wrong") is None
    assert parts(engine).pipeline.wait_s("lost") == 0.0  # the conversation agent answers for it


# -- feedback


def test_feedback_is_kept_where_it_should_be(make_engine: MakeEngine, tmp_path: Path) -> None:
    """A line for each, which the training reads; the router learns from it."""
    path = tmp_path / "new" / "feedback.jsonl"
    engine = make_engine(agents={**TRIO, "gardening": ["g"]}, feedback=path)
    result = engine.infer("When do I prune roses?\nIn May?")
    assert not path.exists()
    result.feedback(correct_agent="gardening")
    engine.infer(POEM).feedback("creative")
    assert path.stat().st_mode & 0o077 == 0
    first, second = map(json.loads, path.read_text("utf-8").splitlines())
    assert first.keys() == {"text", "label", "routed", "confidence", "time"}
    assert first["text"] == "When do I prune roses?\nIn May?"
    assert (first["label"], first["routed"]) == ("gardening", result.agent_id)
    assert first["confidence"] == result.confidence
    assert (second["label"], second["routed"]) == ("creative", "creative")
    assert second["time"] >= first["time"] > 1.7e9
    examples = FeedbackStore(path).examples()
    assert [(one.text, one.label) for one in examples] == [
        ("When do I prune roses?\nIn May?", "gardening"),
        (POEM, "creative"),
    ]
    assert isinstance(engine.router, HybridRouter)
    engine.router.fit(examples * 3, engine.registry.agents, pull=0.1)
    assert engine.plan("When do I prune roses?").route.agent_id == "gardening"


def test_feedback_without_a_place_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Nothing is kept unless somebody says where: the setting is named."""
    result = make_engine().infer("Hello?")
    by_hand = InferenceResult.model_validate_json(result.model_dump_json())
    for one in (result, by_hand):
        with pytest.raises(InvalidRequestError, match=r"EngineConfig\.router\.feedback"):
            one.feedback("conversation")
    assert [path.name for path in tmp_path.iterdir()] == ["main.gguf"]


def test_feedback_names_an_agent(make_engine: MakeEngine, tmp_path: Path) -> None:
    """One that there is none of is refused, one that came later is known."""
    path = tmp_path / "feedback.jsonl"
    engine = make_engine(agents=TRIO, feedback=path)
    result = engine.infer(CODE)
    with pytest.raises(UnknownAgentError, match="did you mean 'code'"):
        result.feedback("coed")
    assert not path.exists()
    engine.registry.add_agent("coed", engine.registry.agent("code"))
    result.feedback("coed")
    assert json.loads(path.read_text("utf-8"))["label"] == "coed"


def test_feedback_that_cannot_be_written_says_so(make_engine: MakeEngine, tmp_path: Path) -> None:
    """A place that is no file is an error, not silence."""
    result = make_engine(feedback=tmp_path).infer("Hello?")
    with pytest.raises(InvalidRequestError, match=r"feedback cannot be kept: .*directory"):
        result.feedback("conversation")


def test_a_result_keeps_no_engine(tmp_path: Path) -> None:
    """It takes feedback when its engine is gone, and goes from process to process."""
    path = tmp_path / "feedback.jsonl"
    engine = OrionInferenceEngine(
        registry_with(tmp_path, TRIO),
        config_with(feedback=path),
        backend=FakeBackend(),
        clock=Clock(),
    )
    with engine:
        result = engine.infer(CODE)
    seen = weakref.ref(engine)
    del engine
    gc.collect()
    assert seen() is None
    result.feedback("creative")
    pickle.loads(pickle.dumps(result)).feedback("creative")
    assert [one.label for one in FeedbackStore(path).examples()] == ["creative"] * 2
    assert "Python" not in repr(result)
    assert "feedback" not in result.model_dump_json()


# -- the embedding stage, with a real model


def registry_of(folder: Path, embedding: str = "minilm.gguf") -> ModelRegistry:
    """A model that answers and one that embeds; an agent that owns no topic, by its examples."""

    def model(file: str, **fields: Any) -> dict[str, Any]:
        variant = {"quantization": "F16", "size_mb": 45, "min_ram_gb": 0.1}
        base = {"name": "m", "license": "x", "context_length": 512, **fields}
        return {**base, "variants": {"v": {**variant, "source": {"path": file}}}}

    def agent(examples: list[str]) -> dict[str, Any]:
        base = {"name": "A", "description": "", "system_prompt": "Be brief."}
        return {**base, "models": {"primary": "tiny"}, "routing": {"examples": examples}}

    models = {"tiny": model("tiny.gguf"), MINILM: model(embedding, type="embedding")}
    agents = {
        "conversation": agent([]),
        "gardening": agent(["When do I prune roses?", "Why do my tomatoes have brown leaves?"]),
        "sailing": agent(["How do I tack against the wind?", "Which knot holds a sail?"]),
    }
    content = {"version": "1", "models": models, "agents": agents}
    return ModelRegistry.parse(json.dumps(content), base=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routing")
    write_minilm(folder / "minilm.gguf")
    write_tiny_llama(folder / "tiny.gguf", token_bias={"<|im_end|>": -40})
    return folder


def config_of(tmp_path: Path, **settings: Any) -> EngineConfig:
    common: dict[str, Any] = {
        "cache_dir": tmp_path / "cache",
        "slots": 1,
        "threads": 1,
        "context_length": 256,
        "keep_spare_worker": False,
        "predictive": False,
    }
    return config_with(**{**common, **settings})


SICK = "My tomato plants look sick"  # like an example in sense, hardly in words


def test_the_embedding_model_is_asked(folder: Path, tmp_path: Path) -> None:
    """What means the same goes to the same agent; the model is the one that everybody shares, and
    what it says of the examples is kept for the next start."""
    config = config_of(tmp_path, stages=all_stages_but("linear"))
    with OrionInferenceEngine(registry_of(folder), config) as engine:
        route = routed(engine, SICK, max_tokens=1)
        assert (route.agent_id, route.stages) == ("gardening", ["start", "embedding"])
        stats = engine.stats()
        assert f"{MINILM}@v" in stats.models
        assert stats.embeddings is not None
        assert stats.embeddings.users == 1  # type: ignore[attr-defined]
        assert routed(engine, "Tacking upwind, how?", max_tokens=1).agent_id == "sailing"
        engine.embed(["something"], user="search")
        assert engine.stats().embeddings.users == 2  # type: ignore[union-attr]
        assert "router.degraded" not in names(engine)
    kept = sorted((tmp_path / "cache" / "router").iterdir())
    assert [path.suffix for path in kept] == [".npy"] * 3  # two agents', and a measure
    with OrionInferenceEngine(registry_of(folder), config) as engine:
        again = engine.plan(SICK).route
        assert (
            f"the embedding model {MINILM} was not asked: it would be loaded first" in again.notes
        )
        assert routed(engine, SICK, max_tokens=1).agent_id == route.agent_id
        assert engine.stats().embeddings.texts <= 2  # type: ignore[union-attr]  # not the examples


def test_weights_for_the_embedding_model_are_used(folder: Path, tmp_path: Path) -> None:
    """Those that come with the library are for all-MiniLM-L6-v2, by the name in the registry."""
    with OrionInferenceEngine(registry_of(folder), config_of(tmp_path)) as engine:
        assert isinstance(engine.router, HybridRouter)
        assert MINILM in engine.router.model.heads
        route = routed(engine, SICK, max_tokens=1)
        assert route.stages[-1] == "embedding"
        vector = engine.embed([SICK])[0]
        assert engine.router.model.vector_logits(MINILM, vector, _signals(SICK)) is not None


def _signals(text: str) -> Any:
    from orion_oie.routing.text.prompt import read

    return read(text).signals


def test_the_embedding_stage_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    """Then nothing is loaded for a route, and nothing said of it."""
    config = config_of(tmp_path, stages=all_stages_but("linear", "embeddings"))
    with OrionInferenceEngine(registry_of(folder), config) as engine:
        route = routed(engine, SICK, max_tokens=1)
        assert (route.stages, route.notes) == (["start"], [])
        assert list(engine.stats().models) == ["tiny@v"]


def test_a_plan_loads_no_embedding_model(folder: Path, tmp_path: Path) -> None:
    """It says that it would be; once it is in memory, the plan is the route."""
    config = config_of(tmp_path, stages=all_stages_but("linear"))
    with OrionInferenceEngine(registry_of(folder), config) as engine:
        history = [{"role": "user", "content": "How do I keep my plants alive?"}]
        for options in ({}, {"conversation_history": history}):
            route = engine.plan(SICK, **options).route
            assert route.stages[0] == "start"
            assert "embedding" not in route.stages
            assert (
                f"the embedding model {MINILM} was not asked: it would be loaded first"
                in route.notes
            )
        assert engine.stats().models == {}
        assert engine.stats().embeddings is None
        assert not (tmp_path / "cache" / "router").exists()
        answered = routed(engine, SICK, max_tokens=1)
        planned = engine.plan(SICK).route
        assert (planned.agent_id, planned.stages) == (answered.agent_id, answered.stages)


def test_a_broken_embedding_model_stops_nobody(folder: Path, tmp_path: Path) -> None:
    """Questions are routed without it; the receipt says so each time, an event once."""
    (folder / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    config = config_of(tmp_path, stages=all_stages_but("linear"))
    with OrionInferenceEngine(registry_of(folder, "broken.gguf"), config) as engine:
        for _ in range(3):
            route = routed(engine, SICK, max_tokens=1)
            assert route.stages == ["start"]
            assert any(note.startswith("the embedding stage failed: ") for note in route.notes)
        events = [e for e in engine.export_logs() if e["event"] == "router.degraded"]
        assert [event["stage"] for event in events] == ["embedding"]
        assert events[0]["error"].startswith("ModelCorruptError: ")
        with pytest.raises(ModelCorruptError):
            engine.embed(["something"])


def test_an_embedding_model_that_is_not_here_is_not_fetched(folder: Path, tmp_path: Path) -> None:
    """The route says that it is missing; that is no failure."""
    config = config_of(tmp_path, stages=all_stages_but("linear"), download={"auto": True})
    with OrionInferenceEngine(registry_of(folder, "missing.gguf"), config) as engine:
        route = routed(engine, SICK, max_tokens=1)
        assert route.stages == ["start"]
        assert f"the embedding model {MINILM} is not here" in route.notes
        assert "router.degraded" not in names(engine)
        assert list(engine.stats().models) == ["tiny@v"]


def test_a_fake_backend_embeds_too(make_engine: MakeEngine) -> None:
    """An application's tests run the whole way of a route."""
    engine = make_engine(
        agents=DUO, models={"d": {"type": "embedding"}}, stages=all_stages_but("linear")
    )
    vectors = engine.embed(["one two", "two one", "three"])
    assert vectors[0] @ vectors[1] == pytest.approx(1.0)
    assert vectors[0] @ vectors[2] < 0.9


def test_a_route_is_a_call_of_the_router(make_engine: MakeEngine) -> None:
    """What the engine tells it: images, session, history, what is in memory, whether it counts."""
    seen: list[RouteContext] = []

    class Noting(HybridRouter):
        def route(self, query: str, agents: Any, context: RouteContext = RouteContext()) -> Any:  # noqa: B008
            seen.append(context)
            return super().route(query, agents, context)

    engine = make_engine(agents=TRIO, router=Noting())
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    engine.infer("Hello?", session_id="one", conversation_history=history)
    engine.plan("Hello?", images=[b"x"])
    engine.infer("Hello?", deadline=30)
    asked, planned, hurried = seen
    assert (asked.limit_s, hurried.limit_s) == (None, 15)
    assert (asked.images, asked.session_id, asked.is_trial, asked.may_load) == (
        0,
        "one",
        True,
        True,
    )
    assert [message.content for message in asked.history] == ["Hi", "Hello"]
    assert asked.wait_s is not None
    assert asked.wait_s("conversation") == 0.0
    assert (planned.images, planned.session_id) == (1, None)
    assert (planned.is_trial, planned.may_load) == (True, False)
