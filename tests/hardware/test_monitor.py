"""The monitor measures memory, reports each change once, costs little, and keeps no owner alive."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import BOUND_S, no_more_threads, wait_until

from orion_oie.errors import InvalidRequestError
from orion_oie.hardware.advice import advise
from orion_oie.hardware.monitor import (
    CACHE_INTERVAL_S,
    MemoryMonitor,
)
from orion_oie.hardware.pressure import (
    PressureGauge,
    PressureLevel,
)
from orion_oie.hardware.probe import (
    ProcessMemory,
    SystemMemory,
)
from orion_oie.hardware.sample import MemorySample

GIB = 2**30
MIB = 2**20
OFTEN_S = 0.005
COST_BOUND_S = 0.002
LOW, MEDIUM, HIGH, CRITICAL = PressureLevel


class World:
    """The readings that a monitor gets, and the calls of its callbacks."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.available = 8 * GIB
        self.limited_by: Any = "system"
        self.workers: dict[str, int] = {}
        self.idle: list[str] = []
        self.processes = {os.getpid(): ProcessMemory(100 * MIB, 0, 50 * MIB)}
        self.folders: list[Path] = []
        self.folder_bytes: int | OSError = 5 * GIB
        self.samples: list[MemorySample] = []
        self.levels: list[tuple[PressureLevel, PressureLevel, MemorySample]] = []
        self.errors: list[Exception] = []

    def monitor(self, **options: Any) -> MemoryMonitor:
        settings: dict[str, Any] = {
            "interval_s": OFTEN_S,
            "idle": lambda: self.idle,
            "on_error": self.errors.append,
            "on_sample": self.samples.append,
            "on_level": lambda *change: self.levels.append(change),
            "gauge": PressureGauge(calm_samples=2),
            "clock": lambda: self.now,
            "wall_clock": lambda: self.now + 1e9,
            "read_system": lambda: SystemMemory(16 * GIB, self.available, self.limited_by),
            "read_process": self.processes.get,
            "read_folder": self.read_folder,
        }
        return MemoryMonitor(lambda: self.workers, **(settings | options))

    def read_folder(self, path: Path) -> int:
        self.folders.append(path)
        if isinstance(self.folder_bytes, OSError):
            raise self.folder_bytes
        return self.folder_bytes

    def add_worker(self, key: str, pid: int, private: int, file: int = 0) -> None:
        self.workers[key] = pid
        self.processes[pid] = ProcessMemory(private, 0, file)


@pytest.fixture
def world() -> World:
    return World()


@contextmanager
def running(monitor: MemoryMonitor) -> Iterator[MemoryMonitor]:
    monitor.start()
    try:
        yield monitor
    finally:
        assert monitor.stop()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "orion-memory"]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Every test ends the threads of its monitors."""
    yield
    wait_until(lambda: not threads())


# -- one sample


def test_a_sample_holds_what_was_read(world: World) -> None:
    """System, host and workers at one moment; workers that are gone are left out."""
    world.add_worker("a@q4", 7, private=2 * GIB, file=GIB)
    world.add_worker("b@q8", 8, private=GIB)
    world.workers["gone@q4"] = 9
    monitor = world.monitor(cache_dir=Path("cache"))
    assert monitor.latest is None
    assert (monitor.level, monitor.history()) == (LOW, [])
    sample = monitor.sample_now()
    assert sample == MemorySample(
        at_s=1000.0,
        wall_s=1000.0 + 1e9,
        system=SystemMemory(16 * GIB, 8 * GIB, "system"),
        host=world.processes[os.getpid()],
        workers={"a@q4": world.processes[7], "b@q8": world.processes[8]},
        cache_bytes=5 * GIB,
        level=LOW,
    )
    assert sample.workers_bytes == 4 * GIB
    assert monitor.latest is sample
    assert world.samples == [sample]
    assert world.levels == world.errors == []


def test_history_is_bounded(world: World) -> None:
    """The last samples are kept, oldest first, and what is handed out is a copy."""
    monitor = world.monitor(history=3)
    taken = [monitor.sample_now() for _ in range(5)]
    assert monitor.history() == taken[2:]
    monitor.history().clear()
    assert monitor.history() == taken[2:]


def test_a_change_of_level_is_told_once(world: World) -> None:
    """The level rises at once and falls late; each callback gets the sample that decided."""
    monitor = world.monitor()
    for available in (8 * GIB, GIB, GIB, 8 * GIB, 8 * GIB, 8 * GIB):
        world.available = available
        monitor.sample_now()
    assert world.levels == [(LOW, HIGH, world.samples[1]), (HIGH, LOW, world.samples[4])]
    assert [sample.level for sample in world.samples] == [LOW, HIGH, HIGH, HIGH, LOW, LOW]
    assert monitor.level is LOW


def test_the_cache_is_measured_rarely(world: World) -> None:
    """The cache is measured once a minute; samples in between repeat the last size."""
    monitor = world.monitor(cache_dir=Path("cache"))
    for _ in range(3):
        monitor.sample_now()
    world.folder_bytes = 6 * GIB
    world.now += CACHE_INTERVAL_S - 1
    assert monitor.sample_now().cache_bytes == 5 * GIB
    assert world.folders == [Path("cache")]
    world.now += 1
    assert monitor.sample_now().cache_bytes == 6 * GIB
    assert len(world.folders) == 2


def test_a_cache_that_cannot_be_measured_is_told(world: World) -> None:
    """An unreadable cache has no size, and the rest of the sample is taken."""
    world.folder_bytes = PermissionError("closed")
    monitor = world.monitor(cache_dir=Path("cache"))
    assert monitor.sample_now().cache_bytes is None
    assert world.errors == [world.folder_bytes]


def test_without_a_cache_nothing_is_measured(world: World) -> None:
    """No folder, no size."""
    assert world.monitor().sample_now().cache_bytes is None
    assert world.folders == []


def test_what_a_reader_raises_reaches_who_asked(world: World) -> None:
    """`sample_now` fails, and records nothing."""

    def fail() -> SystemMemory:
        raise OSError("no such figure")

    monitor = world.monitor(read_system=fail)
    with pytest.raises(OSError, match="no such figure"):
        monitor.sample_now()
    assert monitor.latest is None
    assert world.errors == []


def test_callbacks_may_use_the_monitor(world: World) -> None:
    """No lock is held while they run, whatever thread they ask from."""
    seen: list[object] = []

    def look(*_: object) -> None:
        asker = threading.Thread(target=lambda: seen.append((monitor.level, monitor.latest)))
        asker.start()
        asker.join(BOUND_S)
        assert not asker.is_alive()

    monitor = world.monitor(on_sample=look, on_level=look)
    world.available = GIB
    sample = monitor.sample_now()
    assert seen == [(HIGH, sample)] * 2
    assert world.errors == []


def test_callbacks_that_raise_are_told(world: World) -> None:
    """Neither keeps the other from being called, and the sample stands."""
    faults = [ValueError("sample"), ValueError("level")]

    def fail(error: Exception) -> None:
        raise error

    monitor = world.monitor(
        on_sample=lambda _: fail(faults[0]), on_level=lambda *_: fail(faults[1])
    )
    world.available = GIB
    assert monitor.sample_now() is monitor.latest
    assert world.errors == faults


@pytest.mark.parametrize("options", [{"interval_s": 0}, {"interval_s": -1}, {"history": 0}])
def test_settings_that_cannot_work_are_refused(world: World, options: dict[str, Any]) -> None:
    """The error names the setting."""
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        world.monitor(**options)


# -- the thread


def test_a_thread_samples_until_it_is_stopped(world: World) -> None:
    """One daemon thread however often it is started, none after a stop, and again after a start."""
    monitor = world.monitor()
    assert monitor.stop(), "a stop before the start"
    for _ in range(2):
        for _ in range(3):
            monitor.start()
        assert [thread.daemon for thread in threads()] == [True]
        count = len(world.samples)
        wait_until(lambda count=count: len(world.samples) > count + 3)
        assert monitor.stop()
        assert monitor.stop()
        assert threads() == []
    assert world.errors == []


def test_the_thread_waits_between_samples(world: World) -> None:
    """With a long interval there is one sample, and a stop does not wait for the next."""
    monitor = world.monitor(interval_s=1000)
    with running(monitor):
        wait_until(lambda: world.samples)
        began = time.monotonic()
    assert time.monotonic() - began < BOUND_S / 2
    assert len(world.samples) == 1


def test_the_thread_survives_what_others_raise(world: World) -> None:
    """Callbacks, readers and the list of workers may fail; each fault is told."""
    faults = iter([ValueError("workers"), OSError("system"), None])

    def system() -> SystemMemory:
        fault = next(faults, None)
        if fault is not None:
            raise fault
        return SystemMemory(16 * GIB, GIB)

    def fail(*_: object) -> None:
        raise KeyError("callback")

    with running(world.monitor(read_system=system, on_sample=fail, on_level=fail)) as monitor:
        wait_until(lambda: len(monitor.history()) > 3)
    assert [type(error) for error in world.errors[:4]] == [ValueError, OSError, KeyError, KeyError]
    assert monitor.level is HIGH


def test_a_callback_may_stop_the_monitor(world: World) -> None:
    """It does not wait for itself, and no further sample is taken."""
    answers: list[bool] = []
    monitor = world.monitor(on_sample=lambda _: answers.append(monitor.stop()))
    monitor.start()
    wait_until(lambda: answers and not threads())
    assert answers == [False]
    assert monitor.stop()


def test_a_stop_says_when_a_callback_still_runs(world: World) -> None:
    """A stop waits for its timeout; a running call ends later, even beside a new thread."""
    entered, let_go = threading.Event(), threading.Event()

    def hold(_: MemorySample) -> None:
        entered.set()
        assert let_go.wait(BOUND_S)

    monitor = world.monitor(on_sample=hold)
    monitor.start()
    try:
        assert entered.wait(BOUND_S)
        assert not monitor.stop(timeout_s=0.01)
        monitor.start()
        assert len(threads()) == 2
    finally:
        let_go.set()
    wait_until(lambda: len(threads()) == 1)
    assert monitor.stop()


def test_a_start_that_fails_can_be_repeated(world: World) -> None:
    """A start that fails for lack of threads can be repeated."""
    monitor = world.monitor()
    with no_more_threads(), pytest.raises(RuntimeError, match="no more threads"):
        monitor.start()
    with running(monitor):
        wait_until(lambda: world.samples)


class Owner:
    """An owner whose monitor calls back into it, as an engine's does, and that never stops it."""

    def __init__(self) -> None:
        self.count = 0
        self.monitor = MemoryMonitor(
            self.workers, on_error=self.fail, on_sample=self.count_up, interval_s=OFTEN_S
        )
        self.monitor.start()

    def workers(self) -> dict[str, int]:
        return {"me": os.getpid()}

    def count_up(self, _: MemorySample) -> None:
        self.count += 1

    def fail(self, error: Exception) -> None:
        raise error


def test_a_forgotten_owner_is_not_kept_alive() -> None:
    """The thread ends with the last reference to the monitor; its callbacks refer to the owner."""

    def forget() -> "weakref.ref[Owner]":
        owner = Owner()
        wait_until(lambda: owner.count > 2)
        return weakref.ref(owner)

    trace = forget()

    def is_gone() -> bool:
        gc.collect()
        return trace() is None

    wait_until(is_gone)
    wait_until(lambda: not threads())


def test_samples_on_several_threads_are_all_kept(world: World) -> None:
    """The history has them in the order of their times."""
    ticks = iter(range(10**6))

    monitor = world.monitor(clock=lambda: float(next(ticks)), history=2000)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns all the time
    try:
        askers = [
            threading.Thread(target=lambda: [monitor.sample_now() for _ in range(300)])
            for _ in range(4)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(BOUND_S)
    finally:
        sys.setswitchinterval(interval)
    times = [sample.at_s for sample in monitor.history()]
    assert len(times) == 1200
    assert times == sorted(set(times))
    assert world.errors == []


def test_a_sample_of_six_real_processes_costs_little(tmp_path: Path) -> None:
    """Less than 2 ms of CPU, which at one sample a second is 0.2 % of a core."""
    sleep = "import time; time.sleep(600)"
    errors: list[Exception] = []
    processes = [subprocess.Popen([sys.executable, "-c", sleep]) for _ in range(6)]
    try:
        pids = {f"model-{number}": process.pid for number, process in enumerate(processes)}
        monitor = MemoryMonitor(lambda: pids, on_error=errors.append, cache_dir=tmp_path)
        assert len(monitor.sample_now().workers) == 6
        assert cpu_of(monitor.sample_now) < COST_BOUND_S
        workers = monitor.sample_now().workers
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(memory.resident_bytes > MIB for memory in workers.values())
    assert monitor.sample_now().workers == {}
    assert errors == []


def cpu_of(call: Callable[[], object], calls: int = 20) -> float:
    """CPU seconds of one call, in the best of five rounds: neighbours make caches cold."""
    rounds = []
    for _ in range(5):
        began = time.thread_time()
        for _ in range(calls):
            call()
        rounds.append((time.thread_time() - began) / calls)
    return min(rounds)


# -- recommendations


def test_there_is_nothing_to_say_when_pressure_is_low(world: World) -> None:
    """Without a sample or with enough memory there is no advice, and `idle` is not called."""

    def fail() -> list[str]:
        raise AssertionError

    monitor = world.monitor(idle=fail)
    assert monitor.recommendations() == []
    assert advise(monitor.sample_now()) == monitor.recommendations() == []


def test_the_largest_idle_models_are_named(world: World) -> None:
    """Idle models are named by the bytes they free, without mapped files; models in use are not."""
    world.available = GIB
    world.add_worker("busy@q4", 1, private=9 * GIB)
    world.add_worker("small@q4", 2, private=300 * MIB)
    world.add_worker("large@q4", 3, private=2 * GIB, file=GIB)
    world.add_worker("mapped@q4", 4, private=100 * MIB, file=5 * GIB)
    world.add_worker("tiny@q4", 5, private=10 * MIB)
    world.idle = ["tiny@q4", "small@q4", "large@q4", "mapped@q4", "not loaded"]
    monitor = world.monitor()
    monitor.sample_now()
    assert monitor.recommendations() == [
        "Memory pressure is high: 1.0 GiB of 16.0 GiB are available (6%).",
        "Unload what nobody uses: large@q4 (2.0 GiB), small@q4 (300 MiB), mapped@q4 (100 MiB). "
        "That gives 2.4 GiB back.",
    ]


def test_a_limit_of_the_container_is_named(world: World) -> None:
    """From medium pressure on, the advice says that the container's limit is what runs short."""
    world.available, world.limited_by = 3 * GIB, "cgroup"
    monitor = world.monitor()
    monitor.sample_now()
    assert monitor.recommendations() == [
        "Memory pressure is medium: 3.0 GiB of 16.0 GiB are available (19%).",
        "The container's limit of 16.0 GiB is what runs short, not the machine: raise the limit, "
        "or keep fewer models in memory.",
    ]


def test_without_idle_models_the_largest_is_named(world: World) -> None:
    """A host process that takes more than all of its workers is mentioned."""
    world.available = 500 * MIB
    world.add_worker("small@q4", 1, private=100 * MIB)
    world.add_worker("large@q4", 2, private=200 * MIB)
    world.processes[os.getpid()] = ProcessMemory(GIB, 0, 0)
    monitor = world.monitor()
    monitor.sample_now()
    assert monitor.recommendations() == [
        "Memory pressure is critical: 500 MiB of 16.0 GiB are available (3%).",
        "Load nothing now: the system may end processes to make room.",
        "No loaded model is known to be idle. The largest of 2 is large@q4 (200 MiB): a smaller "
        "variant of it takes less.",
        "This process itself holds 1.0 GiB, more than all of its workers (300 MiB).",
    ]


def test_without_models_others_take_the_memory(world: World) -> None:
    """There is nothing to unload, and that is said."""
    world.available = GIB
    monitor = world.monitor()
    monitor.sample_now()
    assert "No model is loaded: what is short is used elsewhere." in monitor.recommendations()
