"""The router's way to the embedding model: nobody waits for it for long, and nobody gives way."""

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    BOUND_S,
    Clock,
    Running,
    config_with,
    no_more_threads,
    registry_with,
    run_all,
    wait_until,
)
from internals import models_of
from minilm import minilm_folder, write_minilm

from orion_oie.backends.base import LoadSpec
from orion_oie.backends.fake import FakeBackend, FakeModel
from orion_oie.cancellation import CancelScope, DeadlineTimer
from orion_oie.embeddings.shared import SharedEmbeddings
from orion_oie.engine.build import resolved
from orion_oie.engine.router_embedder import (
    PAUSE_S,
    RouterEmbedder,
)
from orion_oie.errors import (
    CircuitOpenError,
    ContextOverflowError,
    DeadlineExceededError,
    EngineClosedError,
    InsufficientMemoryError,
    OrionError,
    WorkerCrashedError,
    WorkerError,
)
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.registry import ModelRegistry
from orion_oie.pool.files import ModelFiles
from orion_oie.pool.memory_manager import MemoryManager
from orion_oie.pool.pool import ModelPool
from orion_oie.pool.variants import VariantSelector
from orion_oie.schemas.stats import BreakerState
from orion_oie.telemetry.event_log import EventLog

MIB = 2**20
KEY = "minilm@q4"
SIZES = {"minilm": 10 * MIB, "a": 50 * MIB, "b": 50 * MIB}


@dataclass
class Gated(FakeBackend):
    """Loads when its gate is open, and counts."""

    gate: threading.Event = field(default_factory=threading.Event)
    begun: list[str] = field(default_factory=list)

    def load(self, spec: LoadSpec, scope: CancelScope, on_progress: Any) -> FakeModel:
        self.begun.append(spec.key)
        assert self.gate.wait(BOUND_S)
        return super().load(spec, scope, on_progress)


def is_paused(embedder: RouterEmbedder) -> bool:
    """True while an embedder does not ask its model: no public call says so."""
    return embedder._breaker.stats().state is not BreakerState.CLOSED


def start_timer(embedder: RouterEmbedder) -> None:
    """Have the thread of its deadlines run already, so that only the next thread is refused."""
    embedder._deadlines.watch(CancelScope(), 1000.0)


def set_limit(embedder: RouterEmbedder, seconds: float) -> None:
    """Shorten its limit after the first load, which may take longer."""
    embedder._limit_s = seconds


def take_embeddings_away(embedder: RouterEmbedder) -> None:
    """Whatever still looks at the embeddings now fails: a look shows in nothing else."""
    embedder._embeddings = None  # type: ignore[assignment]


def set_load(pool: ModelPool, load: Any) -> None:
    """Have a pool load by another backend than the one that its world was built on."""
    pool._load = load


class World:
    """The parts around an embedder, over a fake backend."""

    def __init__(self, folder: Path, limit_s: float = BOUND_S, **config: Any) -> None:
        self.folder = folder
        variants = {"q4": {"source": {"path": "minilm.gguf"}}}
        models = {"minilm": {"type": "embedding", "variants": variants}}
        agents = {"conversation": ["a"], "second": ["b"], "third": ["minilm"]}
        self.registry: ModelRegistry = registry_with(folder, agents, models)
        self.registry.remove_agent("third")  # it was there for its model
        self.backend = Gated(footprints=SIZES)
        self.backend.gate.set()
        self.clock = Clock()
        self.config = resolved(config_with(cache_dir=folder / "cache", **config))
        cache = ModelCache(self.config.download.cache_dir)
        self.events = EventLog(100)
        files = ModelFiles(self.registry, self.config, cache, self.backend.footprint, self.clock)
        self.memory = MemoryManager(
            self.config, self.backend, self.backend.load, self.events, cache.root, files=files
        )
        self.pool = self.memory.pool
        self.variants = VariantSelector(
            self.registry,
            self.config,
            files,
            self.memory.sizes,
            self.memory.budget.bytes,
            self.pool.is_resident,
        )
        self.shared = SharedEmbeddings(self.registry, self.config, self.variants, self.pool)
        self.embedder = RouterEmbedder(
            self.shared, self.memory, DeadlineTimer(), self.events, self.clock, limit_s
        )

    @property
    def degraded(self) -> list[str]:
        """What was reported of failures."""
        return [
            f"{event['stage']}: {event['error'].partition(': ')[2]}"
            for event in self.events.export()
            if event["event"] == "router.degraded"
        ]

    @property
    def is_paused(self) -> bool:
        """True while the embedder does not ask its model."""
        return is_paused(self.embedder)

    def use(self, agent_id: str) -> Any:
        """Hold the model of an agent."""
        candidate = self.variants.candidates(agent_id)[0]
        return self.pool.acquire(candidate.load_spec, CancelScope())

    def close(self) -> None:
        self.backend.gate.set()
        self.shared.close()
        self.memory.close()
        self.pool.close(0.0)


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(limit_s: float = BOUND_S, **config: Any) -> World:
        worlds.append(World(tmp_path, limit_s, **config))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def test_it_embeds(make_world: Callable[..., World]) -> None:
    """The first call loads the model; from then on it is loaded."""
    world = make_world()
    assert (world.embedder.is_ready(), world.embedder.is_loaded()) == (True, False)
    vectors = world.embedder.embed(["one two", "three"])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0)
    assert world.embedder.is_loaded()
    world.embedder.embed(["four"])
    assert world.backend.begun == [KEY]
    assert world.degraded == []


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        (None, "minilm"),
        ("MiniLM", "minilm"),
        ("sentence-transformers:sentence-transformers/All-MiniLM-L6-v2", "all-minilm-l6-v2"),
        ("sentence-transformers:all-MiniLM-L6-v2", "all-minilm-l6-v2"),
        ("sentence-transformers:/models/E5-small/", "e5-small"),
    ],
)
def test_its_name(make_world: Callable[..., World], setting: str | None, name: str) -> None:
    """Weights are trained for a model by this name, wherever it comes from."""
    assert make_world(embeddings={"model": setting}).embedder.name == name


def test_whether_it_is_here_is_looked_at_now_and_then(make_world: Callable[..., World]) -> None:
    """Each question asks, so most answers are remembered; what was fetched meanwhile is seen."""
    world = make_world()
    file = world.folder / "minilm.gguf"
    file.unlink()
    assert not world.embedder.is_ready()
    file.touch()
    assert not world.embedder.is_ready()
    world.clock.tick(5.0)
    assert world.embedder.is_ready()
    file.unlink()
    assert world.embedder.is_ready()
    with pytest.raises(OrionError, match="not on this machine"):
        world.embedder.embed(["x"])
    assert not world.embedder.is_ready()  # a failure makes it look again
    assert not world.embedder.is_loaded()


def test_nothing_is_fetched(make_world: Callable[..., World]) -> None:
    """A model that could be fetched is not here."""
    source = {"url": "https://example.org", "shards": ["m.gguf"]}
    variant = {"quantization": "q4", "size_mb": 7, "min_ram_gb": 0.1, "source": source}
    world = make_world(download={"auto": True}, embeddings={"model": "far"})
    model = world.registry.model("minilm").model_dump(mode="json", exclude_defaults=True)
    world.registry.add_model("far", {**model, "variants": {"q4": variant}})
    assert not world.embedder.is_ready()
    assert not world.embedder.is_loaded()
    assert world.backend.begun == []


def test_a_slow_load_goes_on_without_the_route(make_world: Callable[..., World]) -> None:
    """Who waits too long hears so, and later ones at once; when the model is there it is used, also
    before the pause is over."""
    world = make_world(limit_s=0.05)
    world.backend.gate.clear()
    with pytest.raises(DeadlineExceededError, match=r"minilm did not answer within 0\.05 s"):
        world.embedder.embed(["x"])
    with pytest.raises(CircuitOpenError, match=r"did not answer .*; it is tried again in 30 s"):
        world.embedder.embed(["x"])
    world.clock.tick(PAUSE_S)
    with pytest.raises(DeadlineExceededError):
        world.embedder.embed(["x"])
    assert world.backend.begun == [KEY]
    assert len(world.degraded) == 1
    world.backend.gate.set()
    wait_until(world.embedder.is_loaded)
    wait_until(lambda: not world.is_paused)
    world.embedder.embed(["x"])
    assert world.backend.begun == [KEY]


def test_a_hurried_route_says_nothing_about_the_model(make_world: Callable[..., World]) -> None:
    """It goes without; the load goes on, and whoever has more time waits for it."""
    world = make_world()
    world.backend.gate.clear()
    with pytest.raises(DeadlineExceededError, match=r"did not answer within 0\.02 s"):
        world.embedder.embed(["x"], 0.02)
    assert world.degraded == []
    patient = Running(world.embedder.embed, ["x"])
    world.backend.gate.set()
    assert patient.join().shape == (1, 64)
    assert world.backend.begun == [KEY]


def test_who_has_all_the_time_waits(make_world: Callable[..., World]) -> None:
    """Also for a load that no route would wait for, and in the pause after a failure."""
    world = make_world(limit_s=0.02)
    world.backend.gate.clear()
    with pytest.raises(DeadlineExceededError):
        world.embedder.embed(["x"])
    patient = Running(world.embedder.embed, ["x"], math.inf)
    world.backend.gate.set()
    assert patient.join().shape == (1, 64)


def test_many_routes_load_it_once(make_world: Callable[..., World]) -> None:
    """All get their vectors."""
    world = make_world()
    runs = run_all([lambda n=n: world.embedder.embed([f"text {n}"]) for n in range(8)])
    assert all(run.join().shape == (1, 64) for run in runs)
    assert world.backend.begun == [KEY]


def test_a_failure_is_told_once_and_left_alone(make_world: Callable[..., World]) -> None:
    """The model is not tried for a while; when it works again, the next failure is told again."""
    world = make_world()
    world.backend.load_errors["minilm"] = [WorkerCrashedError("it died"), WorkerError("again")]
    with pytest.raises(WorkerCrashedError, match="it died"):
        world.embedder.embed(["x"])
    for _ in range(3):
        with pytest.raises(CircuitOpenError, match="it died; it is tried again in 30 s"):
            world.embedder.embed(["x"])
    assert world.backend.begun == [KEY]
    world.clock.tick(PAUSE_S)
    with pytest.raises(WorkerError, match="again"):
        world.embedder.embed(["x"])
    assert world.degraded == ["embedding: it died"]
    world.clock.tick(PAUSE_S)
    world.embedder.embed(["x"])
    world.pool.unload(KEY)
    world.backend.load_errors["minilm"] = [WorkerError("a third time")]
    with pytest.raises(WorkerError):
        world.embedder.embed(["y"])
    assert world.degraded == ["embedding: it died", "embedding: a third time"]


def test_models_in_memory_do_not_give_way_in_turns(make_world: Callable[..., World]) -> None:
    """Where the one would make the other leave, and the other the one, it is not loaded."""
    for limits in ({"budget": 55 * MIB}, {"max_models": 1}):
        world = make_world(**limits)
        with world.use("conversation"):
            pass
        with pytest.raises(InsufficientMemoryError, match=f"no memory for {KEY} beside"):
            world.embedder.embed(["x"])
        assert list(world.pool.residents()) == ["a@q4"]
        assert world.backend.begun == ["a@q4"]


def test_one_of_several_may_give_way(make_world: Callable[..., World]) -> None:
    """Where it fits beside each of them, the one that was idle for longest goes."""
    world = make_world(budget=105 * MIB)
    for agent_id in ("second", "conversation"):
        with world.use(agent_id):
            pass
    world.embedder.embed(["x"])
    assert sorted(world.pool.residents()) == ["a@q4", KEY]


def test_a_model_in_use_is_not_waited_for(make_world: Callable[..., World]) -> None:
    """A route does not stand behind an answer."""
    world = make_world(budget=105 * MIB)
    with world.use("conversation"), world.use("second"), pytest.raises(InsufficientMemoryError):
        world.embedder.embed(["x"])
    world.clock.tick(PAUSE_S)
    world.embedder.embed(["x"])


def test_without_threads_there_are_no_vectors(make_world: Callable[..., World]) -> None:
    """That is an error like others, which passes."""
    world = make_world()
    start_timer(world.embedder)
    with no_more_threads(), pytest.raises(WorkerError, match="no more threads"):
        world.embedder.embed(["x"])
    world.clock.tick(PAUSE_S)
    world.embedder.embed(["x"])


def test_a_closed_engine_is_no_failure(make_world: Callable[..., World]) -> None:
    """Who was waiting is let go, and nothing is told."""
    world = make_world()
    world.backend.gate.clear()
    running = Running(world.embedder.embed, ["x"])
    wait_until(lambda: world.backend.begun)
    world.shared.close()  # before the load ends: afterwards it might still be in time
    world.backend.gate.set()
    with pytest.raises(EngineClosedError):
        running.join()
    assert world.degraded == []


def test_a_hung_model_is_left_behind(make_world: Callable[..., World]) -> None:
    """A model in memory that does not answer in time is left alone like one that fails."""
    world = make_world()
    world.embedder.embed(["x"])
    set_limit(world.embedder, 0.05)
    model = models_of(world.backend)[0]

    def hang(_texts: Any, scope: CancelScope) -> Any:
        ended = threading.Event()
        scope.on_cancel(ended.set)
        assert ended.wait(BOUND_S)
        scope.check()

    model.embed = hang  # type: ignore[method-assign]
    with pytest.raises(DeadlineExceededError, match="did not answer within"):
        world.embedder.embed(["y"])
    with pytest.raises(CircuitOpenError):
        world.embedder.embed(["y"])


def test_asking_whether_it_is_here_costs_little(make_world: Callable[..., World]) -> None:
    """Nothing is looked at between two looks."""
    world = make_world()
    assert world.embedder.is_ready()
    take_embeddings_away(world.embedder)
    assert world.embedder.is_ready()


# -- real models


def test_a_text_that_is_too_long_is_its_own_fault(make_world: Callable[..., World]) -> None:
    """The others go on."""
    from orion_oie.backends.llama.host.loader import (
        LlamaBackend,
        LoaderSettings,
    )

    world = make_world(threads=1)
    write_minilm(world.folder / "minilm.gguf")
    backend = LlamaBackend(LoaderSettings(), cache=ModelCache(world.config.download.cache_dir))
    set_load(world.pool, backend.load)
    try:
        first = world.embedder.embed(["a text"])
        with pytest.raises(ContextOverflowError):
            world.embedder.embed(["word " * 600])
        assert np.allclose(world.embedder.embed(["a text"]), first, atol=1e-2)
        assert world.degraded == []
    finally:
        world.close()
        backend.kill_all()


def test_sentence_transformers_are_used_in_this_process(make_world: Callable[..., World]) -> None:
    """With nothing in the pool; what is loaded is known when it was loaded."""
    pytest.importorskip("sentence_transformers")
    world = make_world(
        limit_s=120.0, embeddings={"model": f"sentence-transformers:{minilm_folder()}"}
    )
    assert (world.embedder.is_ready(), world.embedder.is_loaded()) == (True, False)
    vectors = world.embedder.embed(["a dog", "a puppy", "a tax form"])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    assert world.embedder.is_loaded()
    assert world.pool.residents() == {}
