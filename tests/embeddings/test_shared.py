"""One embedding model for the whole engine: it counts in the budget like any other."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import worker_processes
from engines import MakeEngine, parts
from helpers import config_with, run_all, wait_until
from minilm import minilm_folder, write_minilm
from tiny import write_tiny_llama

from orion_oie import (
    EngineClosedError,
    EngineConfig,
    InsufficientMemoryError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelRegistry,
    OrionInferenceEngine,
)
from orion_oie.embeddings.pooled import PooledEmbedder
from orion_oie.embeddings.service import EmbeddingService

MIB = 2**20
KEY = "minilm@f16"
TEXTS = ["The sky is blue.", "A cat sleeps.", "The heavens are azure."]


def embedder_of(engine: OrionInferenceEngine) -> object:
    """The embedder behind an engine's service, which shows the same for all kinds."""
    return parts(engine).embeddings.service()._embedder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    write_minilm(folder / "minilm.gguf")
    write_tiny_llama(folder / "tiny.gguf", token_bias={"<|im_end|>": -40})
    return folder


def registry_of(folder: Path, **embedding: Any) -> ModelRegistry:
    """A conversation model and, unless told otherwise, one that embeds."""

    def model(file: str, name: str, **fields: Any) -> dict[str, Any]:
        source = {"path": file}
        variant = {"quantization": "F16", "size_mb": 45, "min_ram_gb": 0.1, "source": source}
        base = {"name": name, "license": "x", "context_length": 512}
        return {**base, "variants": {name: variant}, **fields}

    models = {
        "tiny": model("tiny.gguf", "v"),
        "minilm": model("minilm.gguf", "f16", type="embedding") | embedding,
    }
    agent = {
        "name": "C",
        "description": "",
        "system_prompt": "Be brief.",
        "models": {"primary": "tiny"},
    }
    content = {"version": "1", "models": models, "agents": {"conversation": agent}}
    return ModelRegistry.parse(json.dumps(content), base=folder)


def config_of(tmp_path: Path, **settings: Any) -> EngineConfig:
    common: dict[str, Any] = {
        "cache_dir": tmp_path / "cache",
        "slots": 1,
        "threads": 1,
        "context_length": 256,
        "keep_spare_worker": False,
    }
    return config_with(**{**common, **settings})


@pytest.fixture(scope="module")
def engine(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OrionInferenceEngine]:
    """With room for everything."""
    config = config_of(tmp_path_factory.mktemp("shared"))
    with OrionInferenceEngine(registry_of(folder), config) as engine:
        yield engine


def pids() -> set[int]:
    return {process.pid for process in worker_processes()}


def test_an_engine_embeds(engine: OrionInferenceEngine) -> None:
    """Unit vectors in the order of the texts, in which what means the same lies close."""
    vectors = engine.embed(TEXTS)
    assert vectors.shape == (3, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    near = vectors @ vectors.T
    assert near[0, 2] > near[0, 1] + 0.2
    assert np.allclose(engine.embed(TEXTS[::-1]), vectors[::-1], atol=1e-2)


def test_the_embedding_model_is_in_the_books(engine: OrionInferenceEngine) -> None:
    """It is a model like others: with a process, with memory that is reserved, idle when it is."""
    engine.embed(TEXTS, user="search")
    engine.embed(["Something else."], user="memory")
    stats = engine.stats()
    assert stats.models[KEY].pid in pids()
    assert (stats.models[KEY].users, stats.models[KEY].is_loading) == (0, False)
    assert stats.models[KEY].memory_bytes
    reserved = stats.models[KEY].reserved_bytes
    assert 45 * MIB < reserved == stats.memory.reserved_bytes
    assert parts(engine).memory.pool.settled()[KEY]  # so what it takes now is written down
    assert stats.models[KEY].memory_bytes <= reserved
    assert stats.embeddings is not None
    assert (stats.embeddings.model_bytes, stats.embeddings.misses) == (reserved, 4)  # type: ignore[attr-defined]
    assert stats.embeddings.users == 3  # type: ignore[attr-defined]
    assert "minilm" not in stats.breakers or stats.breakers["minilm:load"].failures == 0


def test_many_threads_share_one_model(engine: OrionInferenceEngine) -> None:
    """However many ask at once, there is one model and one process."""
    runs = run_all([lambda n=n: engine.embed([f"text {n}", TEXTS[0]]) for n in range(6)])
    first = engine.embed(TEXTS[:1])[0]
    for run in runs:
        assert float(run.join()[1] @ first) > 0.999
    assert list(engine.stats().models) == [KEY]
    assert len(worker_processes()) == 1


def test_it_does_not_answer_questions(engine: OrionInferenceEngine) -> None:
    """The conversation model answers beside it."""
    engine.embed(TEXTS)
    assert engine.infer("Hello?", max_tokens=2).model_id == "tiny"
    assert engine.stats().models.keys() == {KEY, "tiny@v"}
    engine.unload("conversation")


def test_statistics_survive_the_files(
    engine: OrionInferenceEngine, folder: Path, tmp_path: Path
) -> None:
    """Who deletes the file of a model that is in memory still gets statistics."""
    engine.embed(TEXTS)
    file = folder / "minilm.gguf"
    file.rename(tmp_path / "gone")
    try:
        assert engine.stats().embeddings is not None
        parts(engine).files.look_again()  # as the memory manager does every two seconds
        with pytest.raises(ModelNotFoundError, match=r"minilm\.gguf: there is no such file"):
            engine.embed(["a text that is not in the cache"])
    finally:
        (tmp_path / "gone").rename(file)


def test_a_killed_worker_is_replaced(engine: OrionInferenceEngine) -> None:
    """A worker that died is noticed, or replaced once: the texts get their vectors."""
    engine.embed(TEXTS)
    pid = engine.stats().models[KEY].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert engine.embed(["a new text"]).shape == (1, 384)
    assert engine.stats().models[KEY].pid != pid


def test_it_makes_room_and_comes_back(folder: Path, tmp_path: Path) -> None:
    """Where one model has room, the embedding model goes for a question when it is idle, and comes
    back for the next text; what is in the cache needs no model."""
    registry = registry_of(folder)
    with OrionInferenceEngine(registry, config_of(tmp_path)) as looking:
        model = looking.plan("Hello?").model
        embedder = parts(looking).variants.embedding_spec("minilm")
        sizes = parts(looking).memory.sizes
        assert model is not None
        assert model.needed_bytes is not None
        needed = max(model.needed_bytes, sizes.max_bytes(embedder))
    others = pids()
    config = config_of(tmp_path, budget=needed + 8 * MIB, predictive=False)
    with OrionInferenceEngine(registry, config) as engine:
        before = engine.embed(TEXTS)
        result = engine.infer("Hello?", max_tokens=2)
        assert result.receipt.evicted == [KEY]
        assert list(engine.stats().models) == ["tiny@v"]
        assert np.allclose(engine.embed(TEXTS), before, atol=1e-2)
        assert list(engine.stats().models) == ["tiny@v"]
        assert engine.embed(["a new text"]).shape == (1, 384)
        assert list(engine.stats().models) == [KEY]
        wait_until(lambda: pids() - others == {engine.stats().models[KEY].pid})


def test_it_can_be_named(folder: Path, tmp_path: Path) -> None:
    """`embedding_model` names a model of the registry; one that is none is refused, as is one that
    writes."""
    config = config_of(tmp_path, embeddings={"model": "minilm"})
    with OrionInferenceEngine(registry_of(folder), config) as engine:
        assert parts(engine).variants.embedding_spec("minilm").files == (folder / "minilm.gguf",)
        assert engine.stats().embeddings is None
    config = config_of(tmp_path, embeddings={"model": "minilmm"})
    with (
        OrionInferenceEngine(registry_of(folder), config) as engine,
        pytest.raises(ModelNotFoundError, match="did you mean 'minilm'"),
    ):
        engine.embed(TEXTS)
    config = config_of(tmp_path, embeddings={"model": "tiny"})
    with (
        OrionInferenceEngine(registry_of(folder), config) as engine,
        pytest.raises(InvalidRequestError, match="'tiny' is a causal-lm"),
    ):
        engine.embed(TEXTS)


def test_sentence_transformers_can_be_named(folder: Path, tmp_path: Path) -> None:
    """With a folder of its own, inside this process: nothing is in the pool, and what it computes
    is what the other one does."""
    pytest.importorskip("sentence_transformers")
    name = f"sentence-transformers:{minilm_folder()}"
    with OrionInferenceEngine(registry_of(folder), config_of(tmp_path)) as engine:
        in_worker = engine.embed(TEXTS)
    config = config_of(tmp_path, embeddings={"model": name})
    with OrionInferenceEngine(registry_of(folder), config) as engine:
        in_process = engine.embed(TEXTS, user="search")
        assert (in_worker * in_process).sum(axis=1).min() > 0.999
        assert engine.stats().models == {}
        assert engine.stats().embeddings is not None


def test_without_a_model_it_says_what_to_do(make_engine: MakeEngine) -> None:
    """A registry without any: both ways out are named."""
    engine = make_engine()
    with pytest.raises(ModelNotFoundError, match=r"type 'embedding'.*sentence-transformers:NAME"):
        engine.embed(TEXTS)
    assert engine.stats().embeddings is None


def test_the_packaged_registry_has_one(tmp_path: Path) -> None:
    """Nothing is fetched unless asked for: until then, the command that does it is named."""
    with (
        OrionInferenceEngine(config=config_of(tmp_path)) as engine,
        pytest.raises(
            ModelNotFoundError, match=r": not downloaded .*'orion-oie pull all-minilm-l6-v2'$"
        ),
    ):
        engine.embed(TEXTS)


def test_a_model_that_is_not_here_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    """It is fetched by a command that is named."""
    source = {"url": "https://example.org", "shards": ["m.gguf"]}
    variant = {"quantization": "F16", "size_mb": 45, "min_ram_gb": 0.1, "source": source}
    registry = registry_of(folder, variants={"f16": variant})
    with (
        OrionInferenceEngine(registry, config_of(tmp_path)) as engine,
        pytest.raises(ModelNotFoundError, match="'orion-oie pull minilm'") as caught,
    ):
        engine.embed(TEXTS)
    assert caught.value.details["model_id"] == "minilm"


def test_a_model_that_does_not_fit_says_so(folder: Path, tmp_path: Path) -> None:
    """The budget is the same for all."""
    config = config_of(tmp_path, budget=10 * MIB)
    with (
        OrionInferenceEngine(registry_of(folder), config) as engine,
        pytest.raises(InsufficientMemoryError, match=f"{KEY} needs"),
    ):
        engine.embed(TEXTS)


def test_a_closed_engine_embeds_nothing(folder: Path, tmp_path: Path) -> None:
    """Neither with a service that was used, nor with one that was not; nor does a service that
    somebody kept."""
    others = pids()
    for is_used in (False, True):
        engine = OrionInferenceEngine(registry_of(folder), config_of(tmp_path))
        if is_used:
            engine.embed(TEXTS)
        service = parts(engine).embeddings.service()
        engine.shutdown()
        with pytest.raises(EngineClosedError):
            engine.embed(TEXTS)
        with pytest.raises(EngineClosedError):
            service.embed(["a new text"])
        with pytest.raises(EngineClosedError):
            parts(engine).embeddings.service()
        assert pids() == others


def test_the_service_is_made_once(folder: Path, tmp_path: Path) -> None:
    """Threads that are the first at the same time get the same one."""
    with OrionInferenceEngine(registry_of(folder), config_of(tmp_path)) as engine:
        runs = run_all([parts(engine).embeddings.service for _ in range(8)])
        services = {id(run.join()) for run in runs}
        assert services == {id(parts(engine).embeddings.service())}
        assert isinstance(parts(engine).embeddings.service(), EmbeddingService)
        assert isinstance(embedder_of(engine), PooledEmbedder)
