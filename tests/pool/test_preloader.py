"""What is likely to be asked next is loaded ahead, when that costs nobody anything."""

from collections.abc import Collection, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from engines import TEXT, Clock, MakeEngine, names, parts, settle
from helpers import config_with, registry_with, wait_until
from pools import Holder, World, spec, waiting_for_memory

from orion_oie import ModelInfo, OrionInferenceEngine, PredictionStats, WorkerError
from orion_oie.backends.base import Footprint, LoadSpec
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.cancellation import CancelScope
from orion_oie.engine.build import resolved
from orion_oie.errors import InsufficientMemoryError
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.pool.budget import MemoryBudget
from orion_oie.pool.files import ModelFiles
from orion_oie.pool.footprint_ledger import FootprintLedger
from orion_oie.pool.pool import ModelPool
from orion_oie.pool.preloader import Preloader
from orion_oie.pool.sizes import ModelSizes
from orion_oie.pool.variants import VariantSelector
from orion_oie.telemetry.event_log import EventLog

AGENTS = {"A": ["a"], "B": ["b"], "C": ["c"]}
MIB = 2**20
QUANTIZATION = {"quantization": "q4", "size_mb": 1, "min_ram_gb": 0.1}


# -- the engine: habits of a session, and what comes of them


def engine_of(make_engine: MakeEngine, budget: int = 100, **settings: Any) -> OrionInferenceEngine:
    """Models of 60 MiB; by default the budget has room for one."""
    backend = FakeBackend(
        {"*": FakeAnswer(TEXT)}, footprints=dict.fromkeys("abc", 60 * MIB), **settings
    )
    return make_engine(backend, AGENTS, budget=budget * MIB)


def ask(engine: OrionInferenceEngine, agents: str, session: str | None = "s") -> Any:
    """Ask the agents in turn, each when all is quiet; returns the last result."""
    result = None
    for agent in agents:
        settle(engine)
        result = engine.infer("Hello?", agent=agent, session_id=session)
    settle(engine)
    return result


def here(engine: OrionInferenceEngine) -> set[str]:
    return {stats.model.model_id for stats in engine.stats().models.values()}


def test_the_next_model_is_loaded_ahead(make_engine: MakeEngine) -> None:
    """A user who goes from A to B and back again finds the next model in memory, though there is
    room for one only; it counts as a hit, and the load is told."""
    engine = engine_of(make_engine)
    ask(engine, "ABABA")
    assert here(engine) == {"b"}
    before = engine.stats().prediction
    result = ask(engine, "B")
    assert not result.receipt.cold_load
    assert result.receipt.evicted == []
    after = engine.stats().prediction
    assert after.hits == before.hits + 1
    assert after.hit_rate is not None
    assert here(engine) == {"a"}
    event = next(e for e in engine.export_logs() if e["event"] == "model.loading_ahead")
    assert event["probability"] >= 0.3
    assert {event["key"], event["agent_id"]} <= {"a@q4", "b@q4", "A", "B"}


def test_sessions_have_habits_of_their_own(make_engine: MakeEngine) -> None:
    """Who always goes from A to C gets C ahead, though others go from A to B."""
    engine = engine_of(make_engine)
    for _ in range(3):
        ask(engine, "AB", "one")
        ask(engine, "AC", "two")
    ask(engine, "A", "two")
    assert here(engine) == {"c"}
    ask(engine, "A", "one")
    assert here(engine) == {"b"}


def test_a_load_in_vain_is_counted(make_engine: MakeEngine) -> None:
    """A model that was loaded ahead and evicted unused is wasted, and the request that needed
    another one is a miss."""
    engine = engine_of(make_engine)
    ask(engine, "ABABA")
    before = engine.stats().prediction
    assert before.predictions == before.hits + 1  # the last one waits for its user
    assert before.wasted == 0
    result = ask(engine, "C")
    assert result.receipt.evicted == ["b@q4"]
    after = engine.stats().prediction
    assert (after.wasted, after.misses) == (1, before.misses + 1)


def test_a_user_may_come_while_the_model_is_loaded_ahead(make_engine: MakeEngine) -> None:
    """It is loaded once, and that is a hit, too."""
    engine = engine_of(make_engine, load_delay_s=0.05)
    ask(engine, "ABAB")
    engine.infer("Hello?", agent="A", session_id="s")
    wait_until(lambda: any(one.is_loading for one in engine.stats().models.values()))
    before = engine.stats().prediction
    result = engine.infer("Hello?", agent="B", session_id="s")
    assert result.receipt.cold_load
    assert engine.stats().prediction.hits == before.hits + 1
    settle(engine)
    assert names(engine).count("model.loaded") == names(engine).count("pool.evicted") + 1


def test_nothing_is_loaded_ahead_when_switched_off(make_engine: MakeEngine) -> None:
    """Then nothing is predicted at all, and the statistics say that it is off."""
    backend = FakeBackend({"*": FakeAnswer(TEXT)}, footprints=dict.fromkeys("abc", 60 * MIB))
    engine = make_engine(backend, AGENTS, budget=100 * MIB, predictive=False)
    ask(engine, "ABABAB")
    assert here(engine) == {"b"}
    assert len(backend.loaded) == 6
    stats = engine.stats().prediction
    assert (stats.enabled, stats.predictions, stats.misses) == (False, 0, 6)


def test_what_cannot_be_loaded_is_written_off(make_engine: MakeEngine) -> None:
    """A load ahead that fails is no hit to come; the next request tries again."""
    errors: dict[str, list[Any]] = {"b": []}
    engine = engine_of(make_engine, budget=200, load_errors=errors)
    ask(engine, "ABAB")
    engine.unload("B")
    errors["b"].append(WorkerError("no luck"))
    before = engine.stats().prediction
    ask(engine, "A")
    after = engine.stats().prediction
    assert (after.predictions, after.wasted) == (before.predictions + 1, before.wasted + 1)
    assert "model.load_failed" in names(engine)
    assert ask(engine, "B").receipt.cold_load
    assert engine.stats().prediction.hits == before.hits


def test_a_paused_model_is_not_loaded_ahead(make_engine: MakeEngine) -> None:
    """While its breaker is open nothing makes room for it."""
    clock = Clock()
    errors: dict[str, list[Any]] = {"b": []}
    backend = FakeBackend(
        {"*": FakeAnswer(TEXT)},
        footprints=dict.fromkeys("abc", 60 * MIB),
        load_errors=errors,
    )
    engine = make_engine(backend, AGENTS, budget=100 * MIB, clock=clock)
    ask(engine, "ABAB")
    engine.unload("B")
    errors["b"] += [WorkerError("no luck") for _ in range(3)]
    for _ in range(3):
        with pytest.raises(WorkerError):
            engine.infer("Hello?", agent="B", session_id="s")
    before = engine.stats().prediction.predictions
    ask(engine, "A")
    assert here(engine) == {"a"}
    assert engine.stats().prediction.predictions == before
    clock.now_s += 31
    ask(engine, "A")
    assert here(engine) == {"b"}


def break_prediction(monkeypatch: pytest.MonkeyPatch, engine: OrionInferenceEngine) -> None:
    """Put a bug into the prediction of an engine: no request brings one about."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(parts(engine).preloader._predictor, "predict", fail)


def test_trouble_with_loading_ahead_harms_no_answer(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in it is told as an event, and the thread that serves goes on serving."""
    engine = make_engine(FakeBackend({"*": FakeAnswer(TEXT)}), AGENTS, slots=1, max_models=1)
    break_prediction(monkeypatch, engine)
    for agent in "ABABABAB":
        assert engine.infer("Hello?", agent=agent).content == TEXT
    settle(engine)
    assert names(engine).count("preload.trouble") == 7  # after the first, nothing can follow


# -- the preloader alone: when it is not wise


def models_of(name: str) -> dict[str, Any]:
    """With the variant that the world of the pool's tests knows."""
    source = {"path": f"{name}.gguf"}
    return {"variants": {"v": {**QUANTIZATION, "source": source}}}


class House:
    """A preloader over a real pool whose loads are recorded and counted."""

    def __init__(self, folder: Path, *, budget: int = 100, is_enabled: bool = True) -> None:
        self.world = World()
        self.world.sizes = dict.fromkeys("abc", 60)
        self.is_calm = True
        self.is_waiting = False
        self.paused: set[str] = set()
        self.loaded: list[tuple[str, tuple[str, ...]]] = []
        self.clock = Clock()
        config = resolved(config_with(predictive=is_enabled))
        sizes = ModelSizes(self.footprint, FootprintLedger())
        self.pool = ModelPool(
            self.world.load,
            None,
            on_evicted=self.note_gone,
            size_of=sizes.max_bytes,
            budget_bytes=lambda: budget,
        )
        registry = registry_with(folder, AGENTS, {name: models_of(name) for name in "abc"})
        cache = ModelCache(folder / "cache")
        variants = VariantSelector(
            registry,
            config,
            ModelFiles(registry, config, cache, self.footprint),
            sizes,
            lambda: budget,
            self.pool.is_resident,
        )
        self.preloader = Preloader(
            config,
            variants,
            self.pool,
            MemoryBudget(budget),
            EventLog(100),
            is_calm=lambda: self.is_calm,
            is_anything_waiting=lambda: self.is_waiting,
            is_paused=lambda model_id: model_id in self.paused,
            load_ahead=self.load_ahead,
            clock=self.clock,
        )

    def footprint(self, spec: LoadSpec) -> Footprint:
        size = self.world.sizes[spec.info.model_id]
        return Footprint(size, kv_bytes=0, compute_bytes=0, process_bytes=0)

    def note_gone(self, key: str) -> None:
        self.preloader.note_gone(key)

    def load_ahead(self, wanted: LoadSpec, may_evict: Collection[str]) -> "Future[ModelInfo]":
        self.loaded.append((wanted.info.model_id, tuple(may_evict)))
        future: Future[ModelInfo] = Future()
        try:
            with self.pool.acquire(wanted, CancelScope(), may_evict=may_evict):
                future.set_result(wanted.info)
        except InsufficientMemoryError as error:
            future.set_exception(error)
        return future

    def use(self, agent: str) -> None:
        """One request, from its beginning to its end."""
        self.preloader.note_request(agent, "s")
        wanted = spec(agent.lower())
        with self.pool.acquire(wanted, CancelScope()) as lease:
            self.preloader.note_use(wanted.key, is_cold=lease.is_cold)

    def learn(self, agents: str = "ABABA") -> None:
        for agent in agents:
            self.use(agent)

    def consider(self, after: str = "A") -> list[str]:
        """What is loaded after an answer."""
        before = len(self.loaded)
        self.preloader.consider(after, "s")
        return [model_id for model_id, _ in self.loaded[before:]]

    @property
    def stats(self) -> PredictionStats:
        return self.preloader.stats()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    for gate in house.world.gates.values():
        gate.set()
    house.pool.close(0.0)


def test_it_is_wise_when_nothing_speaks_against_it(house: House) -> None:
    """The control for what follows: it loads b, at the cost of a and of nothing else."""
    house.learn()
    assert house.consider() == ["b"]
    assert house.loaded == [("b", ("a@v",))]
    assert set(house.pool.residents()) == {"b@v"}
    house.use("B")
    assert (house.stats.predictions, house.stats.hits, house.stats.wasted) == (1, 1, 0)


def test_nothing_is_loaded_ahead_while_memory_is_short(house: House) -> None:
    """What is not calm is left alone."""
    house.learn()
    house.is_calm = False
    assert house.consider() == []


def test_nothing_is_loaded_ahead_while_something_waits(house: House) -> None:
    """Those who are here come before those who may come."""
    house.learn()
    house.is_waiting = True
    assert house.consider() == []


def test_nothing_is_loaded_ahead_of_habits(house: House) -> None:
    """One step is no habit."""
    house.learn("AB")
    assert house.consider() == []


def test_nothing_is_loaded_twice(house: House) -> None:
    """What is in memory, or on its way there, is not loaded ahead."""
    house.world.sizes["b"] = 40  # so that there is room for both
    house.learn("ABAB")
    assert house.consider() == []
    house.pool.unload("b@v")
    gate = house.world.gate("b")
    coming = Holder(house.pool, "b")
    wait_until(lambda: house.world.loads.count("b") == 2)
    assert house.consider() == []
    gate.set()
    coming.wait()
    coming.let_go()
    house.pool.unload("b@v")
    assert house.consider() == ["b"]


def test_what_is_as_likely_is_not_evicted(house: House) -> None:
    """After A come B and C alike: neither makes room for the other."""
    house.learn("ABACABACABACA")
    with house.pool.acquire(spec("c"), CancelScope()):
        pass
    assert set(house.pool.residents()) == {"c@v"}
    assert house.consider() == []


def test_what_is_in_use_is_not_evicted(house: House) -> None:
    """However likely another model is, nobody loses the one he has."""
    house.learn()
    with house.pool.acquire(spec("a"), CancelScope()):
        assert house.consider() == []
    assert house.consider() == ["b"]


def test_what_is_pinned_is_not_evicted(house: House) -> None:
    """A pinned model makes no room for what may come."""
    house.learn()
    house.pool.pin("a@v")
    assert house.consider() == []


def test_a_model_that_is_paused_is_passed_over(house: House) -> None:
    """It would evict others for a load that is refused."""
    house.learn()
    house.paused.add("b")
    assert house.consider() == []


def test_what_is_not_here_is_not_fetched_ahead(house: House, tmp_path: Path) -> None:
    """A model without files is none to load ahead."""
    house.learn()
    (tmp_path / "b.gguf").unlink()
    assert house.consider() == []


# -- the pool's part: at once and at no other cost, or not at all


def held(pool: ModelPool, name: str, leave: Collection[str]) -> tuple[str, ...]:
    with pool.acquire(spec(name), CancelScope(), is_patient=True, may_evict=leave) as lease:
        return lease.evicted


def test_a_load_ahead_waits_for_nobody() -> None:
    """While what is in use would have to become idle, while others wait for room, or while there
    is no memory, it is refused at once, and nothing is left of it."""
    world = World()
    world.sizes = {"a": 60, "b": 60, "c": 60}
    memory = [True]
    pool = ModelPool(
        world.load,
        size_of=world.size_of,
        budget_bytes=lambda: 100,
        has_memory=lambda: memory[0],
    )
    busy = Holder(pool, "a")
    busy.wait()
    with pytest.raises(InsufficientMemoryError, match="just now"):
        held(pool, "b", {"a@v"})
    waiting = Holder(pool, "c")
    wait_until(lambda: waiting_for_memory(pool))
    with pytest.raises(InsufficientMemoryError, match="just now"):
        held(pool, "b", {"a@v"})
    assert waiting_for_memory(pool) == 1
    busy.let_go()
    waiting.wait()
    waiting.let_go()
    memory[0] = False
    with pytest.raises(InsufficientMemoryError, match="just now"):
        held(pool, "b", {"c@v"})
    assert world.loads == ["a", "c"]
    memory[0] = True
    assert held(pool, "b", {"c@v"}) == ("c@v",)
    pool.close(0.0)


def test_a_load_ahead_evicts_nobody_else() -> None:
    """What is used since it was decided on stays."""
    world = World()
    world.sizes = {"a": 60, "b": 60, "c": 60}
    pool = ModelPool(world.load, size_of=world.size_of, budget_bytes=lambda: 100)
    assert held(pool, "a", ()) == ()
    with pytest.raises(InsufficientMemoryError, match="just now"):
        held(pool, "b", {"c@v"})
    assert set(pool.residents()) == {"a@v"}
    assert held(pool, "a", ()) == ()  # it is in memory
    pool.close(0.0)


def test_a_load_ahead_does_not_wait_for_what_leaves() -> None:
    """A model that is being unloaded comes back for who asks for it, not for who may ask."""
    world = World()
    world.sizes = {"a": 60}
    gate = world.gate("a")
    world.is_deaf = True
    pool = ModelPool(world.load, size_of=world.size_of, budget_bytes=lambda: 100)
    leaving = Holder(pool, "a")
    wait_until(lambda: world.loads == ["a"])
    leaving.cancel()  # the load goes on, nobody waits for it
    with pytest.raises(InsufficientMemoryError, match="just now"):
        held(pool, "a", ())
    gate.set()
    wait_until(lambda: not any(one.is_loading for one in pool.residents().values()))
    pool.close(0.0)
