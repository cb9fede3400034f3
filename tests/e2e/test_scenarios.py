"""Ten scenarios on the real model, through the public interface only."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from orion_oie import (
    BreakerConfig,
    BreakerState,
    EngineConfig,
    InferenceResult,
    MemoryConfig,
    ModelCorruptError,
    ModelRegistry,
    OrionInferenceEngine,
)

LITE = "smollm2-135m-instruct"


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def model(path: Path, version: str = "1.0") -> dict[str, object]:
    variant = {
        "quantization": "Q4_1",
        "size_mb": 98.4,
        "min_ram_gb": 0.5,
        "source": {"path": str(path)},
    }
    return {
        "name": path.stem,
        "version": version,
        "license": "apache-2.0",
        "context_length": 8192,
        "variants": {"q4_1": variant},
    }


def agent(primary: str, *fallback: str) -> dict[str, object]:
    return {
        "name": primary,
        "description": primary,
        "system_prompt": "You are a helpful assistant.",
        "models": {"primary": primary, "fallback": list(fallback)},
    }


@pytest.fixture
def two_models(smollm2: Path, tmp_path: Path) -> ModelRegistry:
    """Two models with files of their own, an agent for each, and a conversation agent."""
    for name in ("alpha", "beta"):
        shutil.copy(smollm2, tmp_path / f"{name}.gguf")
    content = {
        "version": "1",
        "models": {
            "alpha": model(tmp_path / "alpha.gguf", "2.1"),
            "beta": model(tmp_path / "beta.gguf", "3.4"),
        },
        "agents": {
            "first": agent("alpha", "beta"),
            "second": agent("beta"),
            "conversation": agent("beta"),
        },
    }
    path = tmp_path / "models.json"
    path.write_text(json.dumps(content))
    return ModelRegistry.load(path)


def ask(engine: OrionInferenceEngine, question: str, **options: object) -> InferenceResult:
    return engine.infer(question, **{"max_tokens": 12, "temperature": 0.0, **options})


def test_1_the_lite_model_is_loaded_and_answers(smollm2: Path) -> None:
    """With nothing downloaded, an agent answers from its lite model and the receipt says so."""
    with OrionInferenceEngine() as engine:
        result = ask(engine, "Why is the sky blue?", agent="conversation", max_tokens=48)
        outcomes = {c.model_id: (c.role, c.outcome) for c in result.receipt.considered}
        assert "blue" in result.content or "light" in result.content
        assert result.model_id == LITE
        assert result.receipt.cold_load
        assert outcomes[LITE] == ("lite", "answered")
        assert ("primary", "unavailable") in outcomes.values()
        assert list(engine.stats().models) == [f"{LITE}@q4_1"]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Write a Python function that reverses a string.", "code"),
        ("Solve the equation 3x + 5 = 20.", "reasoning"),
        ("Write a poem about autumn leaves.", "creative"),
        ("¿Cuál es la capital de Perú?", "multilingual"),
        ("SELECT name FROM users WHERE age > 30 -- explain this query", "data"),
        ("Hello, how are you today?", "conversation"),
    ],
)
def test_2_questions_reach_the_right_agent(smollm2, shared_engine, question, expected) -> None:
    """Each question is answered by the agent made for it, from one loaded copy."""
    result = ask(shared_engine, question, max_tokens=4)
    assert result.agent_id == expected
    assert len(shared_engine.stats().models) == 1


@pytest.fixture(scope="module")
def shared_engine():
    with OrionInferenceEngine() as engine:
        yield engine


def test_3_switching_between_models(two_models: ModelRegistry) -> None:
    """Two agents on two models: each answers from its own, in its own process."""
    with OrionInferenceEngine(
        two_models, EngineConfig(memory=MemoryConfig(max_models=2))
    ) as engine:
        assert ask(engine, "Hello?", agent="first").model_id == "alpha"
        assert ask(engine, "Hello?", agent="second").model_id == "beta"
        again = ask(engine, "Hello?", agent="first")
        assert again.model_id == "alpha"
        assert not again.receipt.cold_load
        assert len({stats.pid for stats in engine.stats().models.values()}) == 2


def test_4_the_least_recently_used_model_is_unloaded(two_models: ModelRegistry) -> None:
    """With room for one model, the other goes; the receipt and an event name it."""
    evicted: list[str] = []
    with OrionInferenceEngine(
        two_models, EngineConfig(memory=MemoryConfig(max_models=1))
    ) as engine:
        engine.subscribe(
            lambda e: evicted.append(e.fields["key"]) if e.name == "pool.evicted" else None
        )
        ask(engine, "Hello?", agent="first")
        result = ask(engine, "Hello?", agent="second")
        assert result.receipt.evicted == ["alpha@q4_1"]
        assert evicted == ["alpha@q4_1"]
        assert list(engine.stats().models) == ["beta@q4_1"]


def test_5_tokens_are_streamed(smollm2, shared_engine) -> None:
    """Text comes in many pieces, before the end, and joins to the content."""
    handle = shared_engine.stream(
        "Tell me about the sea.", agent="conversation", max_tokens=24, temperature=0.0
    )
    events = list(handle)
    result = handle.result()
    assert len(events) > 10
    assert "".join(event.text for event in events) == result.content
    assert [event.index for event in events] == list(range(len(events)))
    assert events[0].elapsed_ms < events[-1].elapsed_ms < result.timings.total_ms


def test_6_the_breaker_opens_falls_back_and_recovers(two_models, tmp_path, smollm2) -> None:
    """Weights that llama.cpp refuses: three failures open the breaker, the fallback answers all
    along, and after the reset timeout a repaired model is used again."""
    clock = Clock()
    file = tmp_path / "alpha.gguf"
    file.write_bytes(file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    config = EngineConfig(
        memory=MemoryConfig(max_models=2), breaker=BreakerConfig(reset_timeout_s=30)
    )
    with OrionInferenceEngine(two_models, config, clock=clock) as engine:
        for _ in range(3):
            result = ask(engine, "Hello?", agent="first")
            assert result.model_id == "beta"
            assert result.receipt.considered[0].outcome == "failed"
            assert ModelCorruptError.__name__ in str(result.receipt.considered[0].error)
        assert engine.stats().breakers["alpha:load"].state is BreakerState.OPEN
        assert engine.health().status == "degraded"
        assert ask(engine, "Hello?", agent="first").receipt.considered[0].outcome == "circuit_open"

        shutil.copy(smollm2, file)
        assert ask(engine, "Hello?", agent="first").model_id == "beta"
        clock.now += 31
        assert ask(engine, "Hello?", agent="first").model_id == "alpha"
        assert engine.stats().breakers["alpha:load"].state is BreakerState.CLOSED
        assert engine.health().status == "healthy"


def test_7_the_hardware_is_detected(smollm2, shared_engine) -> None:
    """The receipt names device and threads; the statistics name the machine."""
    model_info = ask(shared_engine, "Hello?").receipt.model
    found = shared_engine.stats().hardware
    assert model_info.device in {name for one in found.devices for name in (one.name, one.kind)}
    assert model_info.threads == found.usable_cores
    assert 1 <= found.usable_cores <= found.logical_cores
    assert found.machine


def test_8_the_timings_add_up(smollm2) -> None:
    """Waits, load and first token are reported, bounded by each other and by the total."""
    with OrionInferenceEngine() as engine:
        cold = ask(engine, "Hello?", agent="conversation", max_tokens=24)
        warm = ask(engine, "Hello?", agent="conversation", max_tokens=24)
    for result in (cold, warm):
        timings = result.timings
        before = timings.route_ms + timings.queue_ms + timings.load_ms
        assert 0 < before < timings.ttft_ms < timings.total_ms
        states = result.receipt.state_ms
        assert sum(states.values()) <= timings.total_ms + 1
        assert states["inferencing"] > timings.total_ms - timings.ttft_ms - 1
        assert timings.tokens_per_second > 0
    assert cold.timings.load_ms > 10 * warm.timings.load_ms
    assert warm.usage.cached_tokens == warm.usage.prompt_tokens - 1


def test_9_logs_are_structured_and_discreet(smollm2, caplog) -> None:
    """The events of a request are there by name, in order, without a word of what was said."""
    with (
        caplog.at_level(logging.INFO, logger="orion_oie"),
        OrionInferenceEngine() as engine,
    ):
        result = ask(engine, "Why is the sky blue?", agent="conversation")
        exported = engine.export_logs()
    names = [event["event"] for event in exported if event["request_id"]]
    assert [n for n in names if n != "request.state"] == [
        "request.received",
        "request.routed",
        "request.succeeded",
    ]
    text = json.dumps(exported) + "".join(str(record.__dict__) for record in caplog.records)
    assert "sky" not in text
    assert result.content not in text
    (line,) = [text for text in caplog.messages if text.startswith("request.succeeded ")]
    assert "agent_id=conversation" in line
    loaded = next(event for event in exported if event["event"] == "model.loaded")
    assert set(loaded) == {"event", "at", "request_id", "key", "pid", "load_ms"}


def test_10_results_name_model_versions(two_models: ModelRegistry) -> None:
    """Result and receipt carry version, variant, quantization and licence of what answered."""
    with OrionInferenceEngine(two_models) as engine:
        result = ask(engine, "Hello?", agent="first")
    assert (result.model_version, result.variant) == ("2.1", "q4_1")
    info = result.receipt.model
    assert (info.version, info.quantization, info.license) == ("2.1", "Q4_1", "apache-2.0")
    assert info.size_bytes == 98362432
