"""A plan says what a request would do, does none of it, and is right."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import worker_processes
from engines import TEXT, Clock, MakeEngine, outcomes, parts
from helpers import Held, config_with, registry_with, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny_llama

from orion_oie import (
    EngineClosedError,
    InsufficientMemoryError,
    InvalidRequestError,
    ModelRegistry,
    OrionInferenceEngine,
    Plan,
    UnknownAgentError,
    WorkerError,
)
from orion_oie.backends.fake import FakeAnswer, FakeBackend

MIB = 2**20
AGENTS = {"conversation": ["a"], "second": ["b"], "third": ["c"]}
SIZES = {"a": 60 * MIB, "b": 60 * MIB, "c": 30 * MIB}


def engine_of(make_engine: MakeEngine, backend: Any = None, **config: Any) -> OrionInferenceEngine:
    if backend is None:
        backend = FakeBackend({"*": FakeAnswer(TEXT)}, footprints=SIZES)
    settings = {"budget": 100 * MIB, "predictive": False, **config}
    return make_engine(backend, AGENTS, **settings)


def files_of(*folders: Path) -> dict[Path, tuple[int, int]]:
    """All files, with what a write would change."""
    found = {}
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file():
                found[file] = (file.stat().st_mtime_ns, file.stat().st_size)
    return found


def facts(engine: OrionInferenceEngine) -> dict[str, Any]:
    """All statistics but those of the machine, which others change."""
    stats = engine.stats()
    return {
        "counts": stats.requests,
        "models": stats.models,
        "reserved": stats.memory.reserved_bytes,
        "prediction": stats.prediction,
        "breakers": stats.breakers,
        "events": engine.export_logs(),
    }


def save_footprints(engine: OrionInferenceEngine) -> None:
    """Write down now what the last load took: it would be written within a second, in between."""
    parts(engine).memory._ledger.save()


def test_a_plan_touches_nothing(make_engine: MakeEngine, tmp_path: Path) -> None:
    """No load, no eviction, no file, no count, no event: everything is as it was."""
    engine = engine_of(make_engine, cache_dir=tmp_path / "cache")
    engine.infer("Hello?")
    parts(engine).memory.monitor.stop()
    save_footprints(engine)
    before = facts(engine), files_of(tmp_path)
    for agent in (None, *AGENTS):
        engine.plan("Hello?", agent=agent, session_id="one")
    assert (facts(engine), files_of(tmp_path)) == before
    assert before[0]["reserved"] == 60 * MIB


def test_a_plan_says_what_would_be_loaded(make_engine: MakeEngine) -> None:
    """Route, model, variant and its reason, what it needs, and that there is room."""
    plan = engine_of(make_engine).plan("Hello?", agent="second")
    assert plan.route.agent_id == "second"
    assert plan.model is not None
    assert (plan.model.model_id, plan.model.role) == ("b", "primary")
    assert plan.model.variant.variant == "q4"
    assert "fits" in plan.model.variant.reason
    assert plan.model.variant.reduction == pytest.approx(1 - 4.89 / 32, abs=0.05)
    assert (plan.model.needed_bytes, plan.model.is_measured) == (60 * MIB, False)
    assert (plan.model.is_here, plan.model.is_loaded) == (True, False)
    assert (plan.loads, plan.evicts, plan.waits_for, plan.fetch_bytes) == (True, [], [], 0)
    assert plan.load_s is not None
    assert plan.load_s > 0
    assert plan.answer_in_s == plan.load_s
    assert (plan.budget_bytes, plan.reserved_bytes, plan.waiting) == (100 * MIB, 0, 0)
    assert [one.model_id for one in plan.considered] == ["b"]


def test_a_plan_finds_its_route(make_engine: MakeEngine) -> None:
    """Without an agent the router is asked, as for an answer."""
    engine = engine_of(make_engine)
    assert engine.plan("Hello?").route == engine.infer("Hello?").receipt.route


def test_a_plan_for_what_is_in_memory_loads_nothing(make_engine: MakeEngine) -> None:
    """What is there answers at once."""
    engine = engine_of(make_engine)
    engine.infer("Hello?")
    plan = engine.plan("Hello?")
    assert plan.model is not None
    assert plan.model.is_loaded
    assert (plan.loads, plan.load_s, plan.reserved_bytes) == (False, 0.0, 60 * MIB)
    assert plan.answer_in_s == 0.0


def test_a_plan_names_who_goes(make_engine: MakeEngine) -> None:
    """Idle models that would be evicted are named, and then they are."""
    engine = engine_of(make_engine)
    engine.infer("Hello?")
    assert engine.plan("Hello?", agent="third").evicts == []
    assert engine.plan("Hello?", agent="second").evicts == ["a@q4"]
    assert engine.infer("Hello?", agent="second").receipt.evicted == ["a@q4"]


def test_a_plan_names_who_is_in_the_way(make_engine: MakeEngine) -> None:
    """A model in use is not evicted but waited for, behind those that wait already."""
    held = Held(FakeAnswer(TEXT))
    engine = engine_of(make_engine, FakeBackend({"a": held}, footprints=SIZES))
    running = engine.submit("Hello?")
    held.wait_for()
    waiting = engine.submit("Hello?", agent="second")
    wait_until(lambda: waiting.queue_position == 1)
    plan = engine.plan("Hello?", agent="second")
    assert (plan.loads, plan.evicts, plan.waits_for) == (True, [], ["a@q4"])
    assert plan.load_s is not None
    assert plan.answer_in_s is None
    assert plan.waiting == 1
    held.let_go.set()
    assert running.result(10).model_id == "a"
    assert waiting.result(10).receipt.evicted == ["a@q4"]


def test_a_load_is_measured_and_then_planned_with(make_engine: MakeEngine, tmp_path: Path) -> None:
    """The time that a load took is what the next one is expected to take."""
    backend = FakeBackend({"*": FakeAnswer(TEXT)}, footprints=SIZES, load_delay_s=0.05)
    engine = engine_of(make_engine, backend, cache_dir=tmp_path / "cache")
    guess = engine.plan("Hello?").load_s
    assert guess == pytest.approx(0.3)  # files without content: the start of a process
    waited_s = engine.infer("Hello?").timings.load_ms / 1e3
    engine.unload("conversation")
    measured = engine.plan("Hello?").load_s
    assert measured is not None
    assert 0.05 <= measured <= waited_s


def test_a_plan_says_what_would_be_fetched(make_engine: MakeEngine) -> None:
    """What is not here costs its size, and nobody knows how long that takes; without leave to
    fetch, no model would answer."""
    source = {"url": "https://example.org", "shards": ["a.gguf"]}
    variant = {"quantization": "q4", "size_mb": 7, "min_ram_gb": 0.1, "source": source}
    models = {"a": {"variants": {"q4": variant}}}
    backend = FakeBackend(footprints=SIZES)
    fetching = make_engine(backend, {"conversation": ["a"]}, models=models, download={"auto": True})
    plan = fetching.plan("Hello?")
    assert plan.model is not None
    assert not plan.model.is_here
    assert (plan.loads, plan.fetch_bytes, plan.load_s) == (True, 7_000_000, None)
    assert plan.answer_in_s is None
    refusing = make_engine(backend, {"conversation": ["a"]}, models=models)
    plan = refusing.plan("Hello?")
    assert plan.model is None
    assert "not downloaded" in plan.considered[0].why_not


def test_a_plan_for_what_never_fits(make_engine: MakeEngine) -> None:
    """The chain goes on behind a model that is too large, and says why; with nothing else, no model
    would answer, and none does."""
    engine = engine_of(make_engine, budget=40 * MIB)
    plan = engine.plan("Hello?")
    assert plan.model is None
    assert "of a budget of" in plan.considered[0].why_not
    with pytest.raises(InsufficientMemoryError):
        engine.infer("Hello?")
    assert engine.plan("Hello?", agent="third").model is not None


def test_a_plan_knows_what_is_pinned(make_engine: MakeEngine) -> None:
    """Room that pinned models hold is no room: the next of the chain would answer, and does."""
    agents = {"conversation": ["a"], "second": ["b", "c"]}
    backend = FakeBackend({"*": FakeAnswer(TEXT)}, footprints=SIZES)
    engine = make_engine(backend, agents, budget=100 * MIB, pinned=["conversation"])
    engine.infer("Hello?")
    plan = engine.plan("Hello?", agent="second")
    assert plan.model is not None
    assert (plan.model.model_id, plan.evicts) == ("c", [])
    assert "pinned" in plan.considered[0].why_not
    result = engine.infer("Hello?", agent="second")
    assert (result.model_id, result.receipt.evicted) == ("c", [])


def test_what_is_in_memory_answers_though_it_turned_out_to_be_large(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    """A model that was seen to take more than the budget is not refused while it is there."""
    engine = engine_of(make_engine, cache_dir=tmp_path / "cache")
    engine.infer("Hello?")
    loaded = parts(engine).variants.candidates("conversation")[0].load_spec
    parts(engine).memory.sizes.note_peak(loaded, 120 * MIB)
    plan = engine.plan("Hello?")
    assert plan.model is not None
    assert (plan.model.is_measured, plan.model.is_loaded, plan.loads) == (True, True, False)
    assert not engine.infer("Hello?").receipt.cold_load
    engine.unload("conversation")
    assert engine.plan("Hello?").model is None


def test_a_plan_knows_what_is_paused(make_engine: MakeEngine) -> None:
    """A model that failed again and again would be passed over while it is paused."""
    clock = Clock()
    errors = {"b": [WorkerError("no luck") for _ in range(3)]}
    backend = FakeBackend({"*": FakeAnswer(TEXT)}, footprints=SIZES, load_errors=errors)
    engine = make_engine(backend, {"second": ["b", "a"], "conversation": ["a"]}, clock=clock)
    for _ in range(3):
        assert engine.infer("Hello?", agent="second").model_id == "a"
    rejected = engine.stats().breakers["b:load"].rejected
    plan = engine.plan("Hello?", agent="second")
    assert plan.model is not None
    assert plan.model.model_id == "a"
    assert "paused for 30.0 s" in plan.considered[0].why_not
    assert engine.stats().breakers["b:load"].rejected == rejected
    clock.now_s += 31
    plan = engine.plan("Hello?", agent="second")
    assert plan.model is not None
    assert plan.model.model_id == "b"
    assert engine.infer("Hello?", agent="second").model_id == "b"


def test_a_plan_knows_who_stands_in(make_engine: MakeEngine) -> None:
    """While the full model is not in memory, the lite one would answer."""
    agents = {"conversation": {"models": {"primary": "a", "lite": "c"}}}
    engine = make_engine(
        FakeBackend({"*": FakeAnswer(TEXT)}, footprints=SIZES), agents, budget=100 * MIB
    )
    plan = engine.plan("Hello?")
    assert plan.model is not None
    assert (plan.model.model_id, plan.model.role) == ("c", "lite")
    assert "loaded in the background" in plan.considered[0].why_not
    handle = engine.submit("Hello?")
    assert handle.result(10).model_id == "c"
    assert outcomes(handle)[0] == ("a", "primary", "loading")
    handle.complete_loading.result(10)
    plan = engine.plan("Hello?")
    assert plan.model is not None
    assert (plan.model.model_id, plan.loads) == ("a", False)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"agent": "nobody"}, UnknownAgentError),
        ({"temperature": -1}, InvalidRequestError),
        ({"conversation_history": [{"role": "system", "content": "x"}]}, InvalidRequestError),
        ({"system_prompt": "\ud800"}, InvalidRequestError),
        ({"grammar": "root ::= nothing"}, InvalidRequestError),
        ({"query": ""}, InvalidRequestError),
    ],
)
def test_a_plan_refuses_what_an_answer_refuses(
    make_engine: MakeEngine, options: dict[str, Any], error: type[Exception]
) -> None:
    """A wrong request is as wrong for a plan, in the same words."""
    engine = engine_of(make_engine)
    call = {"query": "Hello?", **options}
    with pytest.raises(error) as planned:
        engine.plan(**call)
    with pytest.raises(error) as asked:
        engine.infer(**call)
    assert str(planned.value) == str(asked.value)


def test_a_closed_engine_plans_nothing(make_engine: MakeEngine) -> None:
    """It says that it is closed."""
    engine = engine_of(make_engine)
    engine.shutdown()
    with pytest.raises(EngineClosedError):
        engine.plan("Hello?")


def check_that_it_is_so(plan: Plan, engine: OrionInferenceEngine, agent: str) -> None:
    """What was planned is what happens."""
    if plan.model is None:
        with pytest.raises(InsufficientMemoryError):
            engine.infer("Hello?", agent=agent)
        return
    result = engine.infer("Hello?", agent=agent)
    assert (result.model_id, result.variant) == (plan.model.model_id, plan.model.variant.variant)
    assert result.receipt.cold_load is plan.loads
    assert result.receipt.evicted == plan.evicts
    assert result.receipt.variant is not None
    if plan.loads:
        assert result.receipt.variant.reserved_bytes == plan.model.needed_bytes
    assert result.receipt.variant.reason == plan.model.variant.reason
    assert plan.waits_for == []


@settings(max_examples=40, deadline=None)
@given(
    st.fixed_dictionaries({name: st.integers(1, 120) for name in "abc"}),
    st.lists(st.sampled_from(["first", "second", "third"]), min_size=1, max_size=8),
    st.sets(st.sampled_from(["first", "second", "third"])),
)
def test_plans_are_right(
    tmp_path_factory: pytest.TempPathFactory,
    sizes_mb: dict[str, int],
    agents: list[str],
    pinned: set[str],
) -> None:
    """Whatever models take, whatever is pinned, in any order: what was planned is what happens."""
    folder = tmp_path_factory.mktemp("plans")
    registry = registry_with(
        folder, {"first": ["a", "b"], "second": ["b", "c"], "third": ["c", "a"]}
    )
    footprints = {name: size * MIB for name, size in sizes_mb.items()}
    config = config_with(budget=100 * MIB, pinned=sorted(pinned), predictive=False)
    backend = FakeBackend({"*": FakeAnswer("Yes.")}, footprints=footprints)
    with OrionInferenceEngine(registry, config, backend=backend, clock=Clock()) as engine:
        for agent in agents:
            check_that_it_is_so(engine.plan("Hello?", agent=agent), engine, agent)


# -- the real thing


def test_plans_of_a_real_model_are_right(tmp_path: Path) -> None:
    """On real files: headers are read and nothing else is done; the answer comes as planned, and
    from then on what was measured is planned with."""
    models = {}
    for name, tensors in (("a", "F16"), ("b", "Q8_0")):
        write_tiny_llama(tmp_path / f"{name}.gguf", weights=tensors, context_length=512)
        source = {"path": f"{name}.gguf"}
        variant = {"quantization": tensors, "size_mb": 1, "min_ram_gb": 0.1, "source": source}
        base = {"name": name, "license": "x", "context_length": 512}
        models[name] = {**base, "variants": {"v": variant}}
    agents = {
        name: {
            "name": name,
            "description": "",
            "system_prompt": "Be brief.",
            "models": {"primary": model},
        }
        for name, model in (("conversation", "a"), ("second", "b"))
    }
    content = {"version": "1", "models": models, "agents": agents}
    registry = ModelRegistry.parse(json.dumps(content), base=tmp_path)
    config = config_with(
        cache_dir=tmp_path / "cache",
        slots=1,
        threads=1,
        context_length=512,
        budget=120 * MIB,
        keep_spare_worker=False,
        predictive=False,
    )
    engine = OrionInferenceEngine(registry, config)
    try:
        before = files_of(tmp_path)
        plan = engine.plan("Hello?", agent="conversation")
        assert plan.model is not None
        assert plan.model.needed_bytes is not None
        assert 40 * MIB < plan.model.needed_bytes < 120 * MIB
        assert worker_processes() == []
        assert files_of(tmp_path) == before
        result = engine.infer("Hello?", agent="conversation", max_tokens=2)
        assert result.receipt.variant is not None
        assert result.receipt.variant.reserved_bytes == plan.model.needed_bytes
        plan = engine.plan("Hello?", agent="second")
        assert plan.evicts == ["a@v"]
        result = engine.infer("Hello?", agent="second", max_tokens=2)
        assert result.receipt.evicted == ["a@v"]
        plan = engine.plan("Hello?", agent="conversation")
        assert plan.load_s is not None
        assert 0 < plan.load_s < 30
    finally:
        engine.shutdown()
