"""Under pressure what is idle goes and nothing else; what models take is seen and written down; and
nobody is watched, or kept, for longer than needed."""

import gc
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engines import TEXT, MakeEngine, names, parts
from helpers import BOUND_S, Held, Running, config_with, wait_until
from internals import idle_exit_s
from pools import spec, waiting_for_memory

from orion_oie import (
    InsufficientMemoryError,
    ModelCorruptError,
)
from orion_oie.backends.base import Footprint, LoadSpec
from orion_oie.backends.fake import FakeAnswer, FakeBackend, FakeModel
from orion_oie.cancellation import CancelScope
from orion_oie.hardware.pressure import PressureLevel
from orion_oie.hardware.probe import (
    ProcessMemory,
    SystemMemory,
)
from orion_oie.pool.budget import MemoryBudget
from orion_oie.pool.footprint_ledger import FILE_NAME
from orion_oie.pool.memory_manager import MemoryManager
from orion_oie.pool.pool import ModelPool
from orion_oie.telemetry.event_log import EventLog

GIB = 2**30
LOW, MEDIUM, HIGH, CRITICAL = PressureLevel
OFTEN_S = 0.005
NEVER_S = 3600.0
CALM_SAMPLES = 5  # the gauge's: so many until the level falls


class Machine(FakeBackend):
    """16 GiB, of which `others` take some; each model that is loaded takes its `sizes`."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = {name: size * GIB for name, size in sizes.items()}
        super().__init__({"*": FakeAnswer(TEXT)}, footprints=self.sizes)
        self.others = 6 * GIB
        self.workers: dict[int, FakeModel] = {}
        self.grown: dict[str, int] = {}
        self.error: OSError | None = None
        self.gate: threading.Event | None = None

    def load(self, spec: LoadSpec, scope: Any, on_progress: Any) -> FakeModel:
        if self.gate is not None:
            assert self.gate.wait(BOUND_S)
        model = super().load(spec, scope, on_progress)
        model.pid = 10**7 + len(self.workers)  # type: ignore[misc]  # more than there can be
        self.workers[model.pid] = model
        return model

    def taken(self, model: FakeModel) -> int:
        name = model.info.model_id
        return self.grown.get(name, self.sizes[name]) if model.is_alive() else 0

    def read_system(self) -> SystemMemory:
        if self.error is not None:
            raise self.error
        taken = sum(map(self.taken, self.workers.values()))
        return SystemMemory(16 * GIB, max(0, 16 * GIB - self.others - taken))

    def read_process(self, pid: int) -> ProcessMemory | None:
        if pid == os.getpid():
            return ProcessMemory(GIB // 8, 0, 0)
        model = self.workers[pid]
        return ProcessMemory(self.taken(model), 0, 0) if model.is_alive() else None

    @property
    def here(self) -> set[str]:
        return {model.info.model_id for model in self.workers.values() if model.is_alive()}

    def seams(self, interval_s: float) -> dict[str, Any]:
        return {
            "interval_s": interval_s,
            "read_system": self.read_system,
            "read_process": self.read_process,
        }


def set_pressure_wait(pool: ModelPool, seconds: float) -> None:
    """Shorten the patience of a load under pressure: the engine's constant is minutes."""
    pool._pressure_wait_s = seconds


def make_stale(budget: MemoryBudget) -> None:
    """Age the last reading of the machine by more than the second for which it is kept."""
    budget._noted_at = 0.0


def watch_by(manager: MemoryManager) -> None:
    """Start the watch as a load does, at a moment of the test's choice."""
    manager._watch()


class House:
    """A housemanager of a machine. Unless told otherwise it looks when it is told to."""

    def __init__(
        self, folder: Path, machine: Machine, interval_s: float = NEVER_S, **config: Any
    ) -> None:
        self.machine = machine
        self.events = EventLog(100)
        self.gone: list[str] = []
        self.manager = MemoryManager(
            config_with(**config),
            machine,
            machine.load,
            self.events,
            folder,
            on_evicted=self.gone.append,
            **machine.seams(interval_s),
        )
        self.pool = self.manager.pool
        self.users = ExitStack()

    def use(self, name: str) -> None:
        """Load it, if it is not there, have an answer, and be done."""
        wanted = spec(name)
        with self.pool.acquire(wanted, CancelScope()):
            self.pool.note_answer(wanted.key)

    def hold(self, name: str) -> None:
        """Use it until the end."""
        self.users.enter_context(self.pool.acquire(spec(name), CancelScope()))

    def look(self, times: int = 1) -> PressureLevel:
        for _ in range(times):
            self.manager.monitor.sample_now()
        return self.manager.monitor.level

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.events.export()]

    def event(self, name: str) -> dict[str, Any]:
        return next(event for event in self.events.export() if event["event"] == name)

    def close(self) -> None:
        if self.machine.gate is not None:
            self.machine.gate.set()
        self.users.close()
        self.manager.close()
        self.pool.close(0.0)


MakeHouse = Callable[..., House]


@pytest.fixture
def make_house(tmp_path: Path) -> Iterator[MakeHouse]:
    houses: list[House] = []

    def make(machine: Machine, interval_s: float = NEVER_S, **config: Any) -> House:
        houses.append(House(tmp_path / "cache", machine, interval_s, **config))
        return houses[-1]

    yield make
    for house in houses:
        house.close()


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "orion-memory"]


@pytest.fixture(autouse=True)
def nobody_watches() -> Iterator[None]:
    """Neither before a test nor after it."""
    wait_until(lambda: not watchers())
    yield
    wait_until(lambda: not watchers())


# -- pressure


def test_high_pressure_frees_what_is_idle(make_house: MakeHouse) -> None:
    """Without any load, as many of the idle models go as bring the level down again: the longest
    unused first, but none that is in use or pinned. It is told, with advice."""
    house = make_house(Machine(a=1, b=1, c=1, d=1, e=1))
    house.hold("a")
    house.use("b")
    house.pool.pin("b@v")
    for name in "cde":
        house.use(name)
    assert house.look() is LOW
    house.machine.others = 16 * GIB - 5 * GIB - GIB  # one is available
    assert house.look() is HIGH
    assert house.machine.here == {"a", "b"}  # wanted were 3
    assert house.gone == ["c@v", "d@v", "e@v"]
    relieved = house.event("memory.relieved")
    assert (relieved["pressure"], relieved["keys"]) == ("high", ["c@v", "d@v", "e@v"])
    pressure = house.event("memory.pressure")
    assert (pressure["old"], pressure["new"]) == ("low", "high")
    assert pressure["total_bytes"] == 16 * GIB
    assert pressure["advice"]
    assert house.names.count("pool.evicted") == 3


def test_relief_is_no_more_than_needed(make_house: MakeHouse) -> None:
    """Where one model gives back enough, one goes, and at the next look none."""
    house = make_house(Machine(a=1, b=4))
    house.use("a")
    house.use("b")
    house.machine.others = 16 * GIB - 5 * GIB - GIB
    assert house.look() is HIGH
    assert house.machine.here == {"a"}
    assert house.look(3) is HIGH  # the level falls later
    assert house.machine.here == {"a"}
    assert house.names.count("memory.relieved") == 1
    assert house.look(CALM_SAMPLES) is LOW
    assert [e["new"] for e in house.events.export() if e["event"] == "memory.pressure"] == [
        "high",
        "low",
    ]


def test_medium_pressure_frees_nothing(make_house: MakeHouse) -> None:
    """But nothing is loaded ahead any more."""
    house = make_house(Machine(a=1))
    house.use("a")
    assert house.manager.is_calm()
    house.machine.others = 12 * GIB
    assert house.look() is MEDIUM
    assert house.machine.here == {"a"}
    assert not house.manager.is_calm()
    assert house.manager.has_memory()


def test_what_becomes_idle_under_pressure_goes_at_the_next_look(make_house: MakeHouse) -> None:
    """Relief is given as long as the pressure lasts."""
    house = make_house(Machine(a=2))
    house.hold("a")
    house.machine.others = 13 * GIB
    assert house.look(2) is HIGH
    assert house.machine.here == {"a"}
    house.users.close()
    house.look()
    assert house.machine.here == set()


def test_critical_pressure_frees_all_that_is_idle(make_house: MakeHouse) -> None:
    """However much that gives back; what is in use or pinned goes on."""
    house = make_house(Machine(a=1, b=1, c=1, d=5))
    house.hold("a")
    house.use("b")
    house.pool.pin("b@v")
    house.use("c")
    house.use("d")
    house.machine.others = 16 * GIB - 8 * GIB - GIB // 2
    assert house.look() is CRITICAL
    assert house.machine.here == {"a", "b"}
    assert not house.manager.has_memory()
    house.use("a")  # what is in memory answers
    house.users.close()
    house.look()
    assert house.machine.here == {"b"}


def test_loads_wait_until_there_is_memory_again(make_house: MakeHouse) -> None:
    """At critical pressure no load begins, though no model is left to be watched; once there is
    memory, it goes on by itself."""
    machine = Machine(a=1, b=1)
    house = make_house(machine, OFTEN_S, budget=4 * GIB)
    house.use("a")
    machine.others = 15 * GIB + GIB // 2
    wait_until(lambda: machine.here == set())
    waiting = Running(house.use, "b")
    wait_until(lambda: waiting_for_memory(house.pool))
    looks = len(house.manager.monitor.history())
    wait_until(lambda: len(house.manager.monitor.history()) > looks + 2 * CALM_SAMPLES)
    assert machine.loaded == ["a@v"]
    assert house.manager.monitor.level is CRITICAL
    machine.others = 0
    waiting.join()
    assert machine.here == {"b"}


def test_the_first_load_looks_first(make_house: MakeHouse) -> None:
    """Nobody watched before it: it waits all the same, and the machine is looked at meanwhile."""
    machine = Machine(a=1)
    machine.others = 15 * GIB + GIB // 2
    house = make_house(machine, OFTEN_S, budget=4 * GIB)
    waiting = Running(house.use, "a")
    wait_until(lambda: len(house.manager.monitor.history()) > 2 * CALM_SAMPLES)
    assert machine.loaded == []
    machine.others = 0
    waiting.join()
    assert machine.here == {"a"}


def test_a_load_that_waits_in_vain_says_so(make_house: MakeHouse) -> None:
    """After its patience it is refused, and the memory is watched no more when all is well."""
    machine = Machine(a=1)
    machine.others = 15 * GIB + GIB // 2
    house = make_house(machine, OFTEN_S, budget=4 * GIB)
    set_pressure_wait(house.pool, 0.01)
    with pytest.raises(InsufficientMemoryError, match="about to run out of memory"):
        house.use("a")
    assert watchers()
    machine.others = 0
    wait_until(lambda: not watchers())
    house.use("a")


# -- what models take


def test_a_model_that_takes_more_is_counted(make_house: MakeHouse) -> None:
    """More than was reserved counts from when it is seen, and what is too much then goes: the one
    that is idle."""
    machine = Machine(a=1, b=1)
    house = make_house(machine, budget=3 * GIB)
    house.use("a")
    house.hold("b")
    assert house.pool.reserved_bytes == 2 * GIB
    machine.grown["b"] = GIB + GIB // 2
    house.look()
    assert house.pool.reserved_bytes == 2 * GIB + GIB // 2
    assert machine.here == {"a", "b"}
    machine.grown["b"] = 3 * GIB
    house.look()
    assert machine.here == {"b"}
    assert house.pool.reserved_bytes == 3 * GIB
    machine.grown["b"] = GIB
    house.look()
    assert house.pool.reserved_bytes == 3 * GIB  # it may come back to that


def test_what_a_model_took_is_written_down(make_house: MakeHouse, tmp_path: Path) -> None:
    """The most that was seen of a model that has answered, and the time of its load; another
    housemanager reserves accordingly."""
    machine = Machine(a=2, b=1)
    house = make_house(machine)
    with house.pool.acquire(spec("b"), CancelScope()):
        pass  # it answers nothing: what it takes now says nothing of what it will
    house.use("a")
    machine.grown["a"] = GIB
    house.look()
    house.close()
    records = json.loads((tmp_path / "cache" / FILE_NAME).read_text())
    by_key = {name.partition("|")[0]: record for name, record in records.items()}
    assert by_key["a@v"]["peak_bytes"] == GIB
    assert by_key["a@v"]["load_s"] > 0
    assert by_key["b@v"]["peak_bytes"] == 0
    other = Machine(a=2, b=1)
    other.grown["a"] = GIB
    again = make_house(other)
    again.use("a")
    assert again.pool.reserved_bytes == GIB
    assert again.manager.sizes.footprint(spec("a")).is_measured
    assert not again.manager.sizes.footprint(spec("b")).is_measured


def test_files_that_changed_under_a_load_cost_the_measurement_only(
    make_house: MakeHouse,
) -> None:
    """The model that was loaded is used; it is told that nothing could be written down."""

    class Replaced(Machine):
        def footprint(self, spec: LoadSpec) -> Footprint:
            if self.loaded:
                raise ModelCorruptError("the file is another one now")
            return super().footprint(spec)

    house = make_house(Replaced(a=1))
    house.use("a")
    house.look()
    assert house.machine.here == {"a"}
    assert "another one" in house.event("memory.trouble")["error"]


def test_the_budget_follows_the_machine(make_house: MakeHouse) -> None:
    """An automatic budget is what is available and what models hold of it already, less a tenth;
    what was evicted a moment ago is not counted twice."""
    machine = Machine(a=4, b=1)
    house = make_house(machine)
    house.use("b")
    house.use("a")
    house.look()
    kept = 16 * GIB // 10
    assert house.manager.budget.bytes() == pytest.approx(10 * GIB - kept, abs=2)
    house.pool.unload("a@v")
    make_stale(house.manager.budget)
    house.manager.budget.refresh()
    assert house.manager.budget.bytes() == pytest.approx(10 * GIB - kept, abs=2)
    machine.others += 2 * GIB
    house.look()
    assert house.manager.budget.bytes() == pytest.approx(8 * GIB - kept, abs=2)


def test_a_machine_that_cannot_be_read_is_told(make_house: MakeHouse) -> None:
    """Loads go on; what cannot be seen is told as an event."""
    machine = Machine(a=1)
    house = make_house(machine, budget=4 * GIB)
    machine.error = PermissionError("not for you")
    house.use("a")
    assert machine.here == {"a"}
    assert "not for you" in house.event("memory.trouble")["error"]


def test_a_thread_that_cannot_be_had_is_told(
    make_house: MakeHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load does not fail because nobody can watch it."""
    house = make_house(Machine(a=1))

    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(house.manager.monitor, "start", refuse)
    house.use("a")
    assert "not watched" in house.event("memory.trouble")["error"]


# -- as long as needed


def test_nobody_watches_without_workers(make_house: MakeHouse) -> None:
    """The thread comes with a load and goes after the last worker; with the next load it is there
    again."""
    house = make_house(Machine(a=1, b=1), OFTEN_S)
    assert not watchers()
    for _ in range(2):
        house.use("a")
        house.use("b")
        looks = len(house.manager.monitor.history())
        wait_until(lambda n=looks: len(house.manager.monitor.history()) > n + 3)
        house.pool.unload("a@v")
        wait_until(lambda n=looks: len(house.manager.monitor.history()) > n + 6)
        assert len(watchers()) == 1
        house.pool.unload("b@v")
        wait_until(lambda: not watchers())


def test_a_dead_worker_is_none(make_house: MakeHouse) -> None:
    """A worker that crashed is not watched either."""
    house = make_house(Machine(a=1), OFTEN_S)
    house.use("a")
    next(iter(house.machine.workers.values())).crash()
    wait_until(lambda: not watchers())
    assert house.pool.reserved_bytes == 0


def test_a_load_is_watched_from_its_beginning(make_house: MakeHouse) -> None:
    """Though there is no worker yet."""
    machine = Machine(a=1)
    machine.gate = threading.Event()
    house = make_house(machine, OFTEN_S)
    loading = Running(house.use, "a")
    wait_until(lambda: len(house.manager.monitor.history()) > 5)
    machine.gate.set()
    loading.join()
    assert watchers()


def test_a_load_that_begins_while_the_watch_ends_is_watched(
    make_house: MakeHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last look saw no worker; before it ends the watch, a load begins, which finds the watch
    still going."""
    machine = Machine(a=1, b=1)
    house = make_house(machine, OFTEN_S)
    house.use("a")
    machine.gate = threading.Event()
    monitor = house.manager.monitor
    loading: list[Running] = []
    stop = monitor.stop

    def stop_late(*timeout_s: float) -> bool:
        if not loading:
            loading.append(Running(house.use, "b"))
            wait_until(lambda: "b@v" in house.pool.residents())
            started = Running(watch_by, house.manager)
            started.join()
        return stop(*timeout_s)

    monkeypatch.setattr(monitor, "stop", stop_late)
    house.pool.unload("a@v")
    wait_until(lambda: loading)
    looks = len(monitor.history())
    wait_until(lambda: len(monitor.history()) > looks + 5)
    machine.gate.set()
    loading[0].join()


def test_nobody_watches_after_the_end(make_house: MakeHouse) -> None:
    """A load that begins while the engine ends does not bring the watch back."""
    house = make_house(Machine(a=1, b=1), OFTEN_S)
    house.use("a")
    house.manager.close()
    wait_until(lambda: not watchers())
    house.use("b")
    house.look()
    wait_until(lambda: not watchers())


# -- the engine


@pytest.fixture
def on_machine(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Any]:
    """Makes engines on a machine, which is looked at often."""

    def make(machine: Machine, agents: Any, **config: Any) -> Any:
        seams = machine.seams(OFTEN_S)
        monkeypatch.setattr("orion_oie.engine.build.MemoryManager", partial(MemoryManager, **seams))
        return make_engine(machine, agents, cache_dir=tmp_path / "cache", **config)

    return make


def test_an_engine_under_pressure(on_machine: Callable[..., Any]) -> None:
    """High: what is idle goes, what answers goes on. Critical: what is asked for waits, health says
    why, and it is answered when there is memory again."""
    machine = Machine(a=1, b=1)
    held = Held(FakeAnswer("At last."))
    machine.scripts = {"a": held, "*": FakeAnswer(TEXT)}
    engine = on_machine(machine, {"conversation": ["a"], "second": ["b"]}, budget=9 * GIB)
    running = engine.submit("Hello?")
    held.wait_for()
    engine.infer("Hello?", agent="second")
    machine.others = 13 * GIB
    wait_until(lambda: machine.here == {"a"})
    assert engine.stats().memory.pressure in ("high", "critical")
    machine.others = 15 * GIB
    wait_until(lambda: engine.stats().memory.pressure == "critical")
    waiting = engine.submit("Hello?", agent="second")
    wait_until(lambda: waiting_for_memory(parts(engine).memory.pool))
    health = engine.health()
    assert health.status == "degraded"
    assert any("Memory pressure is critical" in line for line in health.reasons)
    assert not waiting.done()
    held.let_go.set()
    assert running.result(10).content == "At last."
    wait_until(lambda: machine.here == set())
    machine.others = 0
    assert waiting.result(10).content == TEXT
    wait_until(lambda: engine.health().status == "healthy")
    assert {"memory.pressure", "memory.relieved", "pool.evicted"} <= set(names(engine))


def test_an_engine_watches_while_it_lives(on_machine: Callable[..., Any], tmp_path: Path) -> None:
    """Statistics show what is held; after the shutdown nobody watches, and all is written down."""
    machine = Machine(a=1)
    engine = on_machine(machine, {"conversation": ["a"]})
    engine.infer("Hello?")
    looks = len(parts(engine).memory.monitor.history())
    wait_until(lambda: len(parts(engine).memory.monitor.history()) > looks + 2)
    memory = engine.stats().memory
    assert memory.is_budget_automatic
    assert (memory.reserved_bytes, memory.pressure) == (GIB, LOW)
    engine.shutdown()
    wait_until(lambda: not watchers())
    records = json.loads((tmp_path / "cache" / FILE_NAME).read_text())
    (record,) = records.values()
    assert record["peak_bytes"] == GIB


def test_a_watched_engine_that_is_forgotten_is_collected(on_machine: Callable[..., Any]) -> None:
    """The watch keeps nobody alive: the engine and its models go, and then the thread."""
    machine = Machine(a=1)
    engine = on_machine(machine, {"conversation": ["a"]})
    engine.infer("Hello?")
    wait_until(lambda history=engine.memory_history: len(history()) > 3)
    gone = weakref.ref(engine)
    del engine

    def is_gone() -> bool:
        gc.collect()
        return gone() is None

    wait_until(is_gone, idle_exit_s() / 2)
    assert machine.here == set()
    wait_until(lambda: not watchers(), idle_exit_s() / 2)
