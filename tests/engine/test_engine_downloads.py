"""An engine whose models come over HTTP: what it fetches, when, and what it says of that."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import outcomes
from helpers import config_with, wait_until
from loopback import (
    LoopbackRequest,
    LoopbackServer,
    Misbehaviour,
)
from tiny import write_tiny_llama

from orion_oie import (
    DigestMismatchError,
    EngineConfig,
    Event,
    ModelNotFoundError,
    ModelRegistry,
    OrionInferenceEngine,
)

BOUND_S = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    bias = {"<|im_end|>": -40.0}
    size = {"layers": 4, "width": 256, "ffn": 1024, "heads": 8, "kv_heads": 4}
    write_tiny_llama(folder / "full.gguf", context_length=1024, token_bias=bias, **size)
    write_tiny_llama(folder / "lite.gguf", context_length=1024, token_bias=bias)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[LoopbackServer]:
    with LoopbackServer(folder, bytes_per_s=8e6) as server:
        yield server


def registry_of(server: LoopbackServer, folder: Path, **source: Any) -> ModelRegistry:
    """One agent: its primary model is on the server, its lite one here."""

    def model(source: dict[str, Any]) -> dict[str, Any]:
        variant = {"quantization": "f16", "size_mb": 7, "min_ram_gb": 0.1, "source": source}
        return {"name": "M", "license": "x", "context_length": 512, "variants": {"v": variant}}

    remote = {"url": server.url, "shards": ["full.gguf"], **source}
    content = {
        "version": "1",
        "models": {"full": model(remote), "lite": model({"path": str(folder / "lite.gguf")})},
        "agents": {
            "conversation": {
                "name": "C",
                "description": "talks",
                "system_prompt": "Be brief.",
                "models": {"primary": "full", "lite": "lite"},
            }
        },
    }
    return ModelRegistry.parse(json.dumps(content), base=folder)


def config_of(tmp_path: Path, **settings: Any) -> EngineConfig:
    return config_with(cache_dir=tmp_path / "cache", slots=2, **settings)


def test_nothing_is_fetched_unasked(server: LoopbackServer, folder: Path, tmp_path: Path) -> None:
    """By default the lite model answers, the receipt says why, and nothing is asked for."""
    with OrionInferenceEngine(registry_of(server, folder), config_of(tmp_path)) as engine:
        handle = engine.submit("Hi", max_tokens=2)
        assert handle.result(BOUND_S).model_id == "lite"
        assert outcomes(handle)[0] == ("full", "primary", "unavailable")
        assert handle.receipt is not None
        assert "not downloaded from http://127.0.0.1" in handle.receipt.considered[0].reason
    assert server.requests == []


def test_lite_first_then_full(server: LoopbackServer, folder: Path, tmp_path: Path) -> None:
    """With `download.auto` the lite model answers at once, the full one arrives meanwhile and
    answers the next request."""
    config = config_of(tmp_path, download={"auto": True})
    events: list[Event] = []
    with OrionInferenceEngine(registry_of(server, folder), config) as engine:
        engine.subscribe(events.append)
        handle = engine.submit("Hi", max_tokens=2)
        assert handle.result(BOUND_S).model_id == "lite"
        assert outcomes(handle)[0] == ("full", "primary", "loading")
        assert handle.complete_loading.result(BOUND_S).model_id == "full"
        again = engine.infer("Hi", max_tokens=2)
        assert again.model_id == "full"
        assert again.receipt.load is not None
        assert again.receipt.load.mode == "progressive"
        assert again.receipt.load.shards_loaded == again.receipt.load.shards == 8
    steps = [e.fields for e in events if e.name == "model.loading" and e.fields["key"] == "full@v"]
    phases = list(dict.fromkeys(step["phase"] for step in steps))
    assert phases == ["initializing", "downloading", "loading_shard", "ready", "complete"]
    size = (folder / "full.gguf").stat().st_size
    assert steps[-1]["bytes_loaded"] == steps[-1]["bytes_total"] == size
    assert any(step["bytes_per_s"] and step["seconds_left"] is not None for step in steps)


def test_the_lite_model_answers_until_all_is_here(folder: Path, tmp_path: Path) -> None:
    """A model that is mapped but still empty is not ready: nobody waits for its last byte."""
    late = threading.Event()

    def hold(request: LoopbackRequest) -> Misbehaviour | None:
        if request.range is not None and (request.range[0] or 0) > 3_000_000:
            assert late.wait(BOUND_S)
        return None

    with LoopbackServer(folder, misbehave=hold) as server:
        config = config_of(tmp_path, download={"auto": True})
        with OrionInferenceEngine(registry_of(server, folder), config) as engine:
            engine.infer("Hi", max_tokens=2)
            wait_until(
                lambda: any(
                    model.model.model_id == "full" and not model.is_loading
                    for model in engine.stats().models.values()
                ),
                BOUND_S,
            )
            handle = engine.submit("Hi", max_tokens=2)
            assert handle.result(BOUND_S).model_id == "lite"
            late.set()
            handle.complete_loading.result(BOUND_S)
            assert engine.infer("Hi", max_tokens=2).model_id == "full"


def test_a_request_waits_for_what_has_no_stand_in(
    server: LoopbackServer, folder: Path, tmp_path: Path
) -> None:
    """With the sequential strategy the full model is fetched, loaded, and answers."""
    config = config_of(tmp_path, download={"auto": True}, strategy="sequential")
    with OrionInferenceEngine(registry_of(server, folder), config) as engine:
        result = engine.infer("Hi", max_tokens=2)
        assert result.model_id == "full"
        assert result.receipt.cold_load
        assert result.timings.load_ms > 500
        assert result.receipt.load is not None
        assert result.receipt.load.mode == "sequential"


def test_the_registry_says_how_a_model_is_taken_apart(
    server: LoopbackServer, folder: Path, tmp_path: Path
) -> None:
    """The variant's own `sharding` goes over that of the configuration."""
    data = registry_of(server, folder).data.model_dump(mode="json", exclude_defaults=True)
    variant = data["models"]["full"]["variants"]["v"]
    variant["sharding"] = {"num_shards": 3, "initial_shards": 2}
    registry = ModelRegistry.parse(json.dumps(data), base=folder)
    config = config_of(tmp_path, download={"auto": True}, lite_first=False)
    events: list[Event] = []
    with OrionInferenceEngine(registry, config) as engine:
        engine.subscribe(events.append)
        report = engine.infer("Hi", max_tokens=2).receipt.load
    assert report is not None
    assert (report.mode, report.shards, report.shards_loaded) == ("progressive", 3, 3)
    steps = [event.fields for event in events if event.name == "model.loading"]
    assert next(s["shards_loaded"] for s in steps if s["phase"] == "loading_shard") >= 2


def test_a_model_that_is_not_what_it_should_be(
    server: LoopbackServer, folder: Path, tmp_path: Path
) -> None:
    """The lite model goes on answering, and who waits for the full one hears why."""
    registry = registry_of(server, folder, sha256=["0" * 64])
    with OrionInferenceEngine(registry, config_of(tmp_path, download={"auto": True})) as engine:
        handle = engine.submit("Hi", max_tokens=2)
        assert handle.result(BOUND_S).model_id == "lite"
        with pytest.raises(DigestMismatchError):
            handle.complete_loading.result(BOUND_S)
        assert engine.infer("Hi", max_tokens=2).model_id == "lite"


def test_pull(server: LoopbackServer, folder: Path, tmp_path: Path) -> None:
    """`pull` fetches what an agent needs, tells how far it is, and the next answer is its."""
    events: list[Event] = []
    with OrionInferenceEngine(registry_of(server, folder), config_of(tmp_path)) as engine:
        engine.subscribe(events.append)
        (path,) = engine.pull("conversation")
        assert path.read_bytes() == (folder / "full.gguf").read_bytes()
        assert engine.pull("full") == engine.pull("full@v") == (path,)
        assert engine.pull("lite") == (folder / "lite.gguf",)
        for wrong in ("fulll", "full@w", "conversatio"):
            with pytest.raises(ModelNotFoundError, match=r"did you mean|it has v"):
                engine.pull(wrong)
        engine.preload("conversation")
        assert engine.infer("Hi", max_tokens=2).model_id == "full"
    assert "model.fetched" in {event.name for event in events}
    assert len([r for r in server.requests if r.range == (0, 0)]) == 1


def test_a_forgotten_download_ends_with_the_engine(
    server: LoopbackServer, folder: Path, tmp_path: Path
) -> None:
    """A shutdown in the middle leaves what arrived, and the next engine goes on from there."""
    config = config_of(tmp_path, download={"auto": True})
    registry = registry_of(server, folder)
    size = (folder / "full.gguf").stat().st_size
    with OrionInferenceEngine(registry, config) as engine:
        engine.infer("Hi", max_tokens=2)
        wait_until(lambda: server.bytes_sent > size // 2)
        engine.shutdown(0.0)
    sent = server.bytes_sent
    with OrionInferenceEngine(registry, config) as engine:
        handle = engine.submit("Hi", max_tokens=2)
        handle.complete_loading.result(BOUND_S)
    assert server.bytes_sent - sent < size
    assert list((tmp_path / "cache" / "models").rglob("full.gguf"))
