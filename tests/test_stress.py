"""Everything at once, in an order that a seed draws: requests of all kinds, callbacks, cancels,
forks, crashes, signals, hooks that raise, refused threads. Whatever happens, each request ends, the
numbers add up, and nothing is left.

A failure names its seed, which repeats the draws (not the interleaving of threads, so try some
times), for longer if wanted:

    ORION_STRESS_SEED=7 ORION_STRESS_SECONDS=60 pytest tests/test_stress.py

ORION_STRESS_MOVES=ask,crash makes these moves alone.
"""

import faulthandler
import itertools
import logging
import os
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import BOUND_S, Running, config_with, one_model_registry, registry_with, wait_until
from internals import models_of
from interrupts import Refusals

from orion_oie import EngineConfig, OrionError, OrionInferenceEngine, RequestHandle, WorkerError
from orion_oie.backends.base import GenerationJob
from orion_oie.backends.fake import FakeAnswer, FakeBackend

SECONDS = float(os.environ.get("ORION_STRESS_SECONDS", "1.5"))
SEEDS = [int(os.environ["ORION_STRESS_SEED"])] if "ORION_STRESS_SEED" in os.environ else [1, 2, 3]
CHOSEN = os.environ.get("ORION_STRESS_MOVES", "")
THREADS = 4
AGENTS = {"writer": ["long", "short"], "sailor": ["short"], "maid": ["third", "long"]}
PATIENCE_S = 30.0


class Interrupt(KeyboardInterrupt):
    """What the handler of the test's own signal raises."""


class Stress:
    """One run: an engine, the draws of one thread at a time, and the requests so far."""

    def __init__(
        self, engine: OrionInferenceEngine, seed: int, backend: FakeBackend | None
    ) -> None:
        self.engine = engine
        self.backend = backend
        self.seed = seed
        self.handles: deque[RequestHandle] = deque(maxlen=5000)
        self.made: deque[str] = deque(maxlen=40)
        self.count = itertools.count()
        self.ends_at = 0.0
        self.before = set(threading.enumerate())
        self.refusals = Refusals()

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.ends_at

    @property
    def agents(self) -> list[str]:
        return list(self.engine.registry.agents)

    def options(self, chance: random.Random) -> dict[str, Any]:
        options: dict[str, Any] = {
            "agent": chance.choice([None, *self.agents]),
            "max_tokens": chance.choice([1, 5, 50]),
            "priority": chance.randrange(3),
        }
        if chance.random() < 0.3:
            options["deadline"] = chance.choice([0.0005, 0.01, 1.0])
        if chance.random() < 0.3:
            options["session_id"] = f"session {chance.randrange(3)}"
        return options

    def submit(self, chance: random.Random) -> RequestHandle:
        handle = self.engine.submit("What of it?", **self.options(chance))
        self.handles.append(handle)
        return handle

    def stream(self, chance: random.Random, **options: Any) -> RequestHandle:
        handle = self.engine.stream("What of it?", **options, **self.options(chance))
        self.handles.append(handle.view())  # does not keep it going
        return handle

    def moves_of(self, chance: random.Random, moves: list["Move"]) -> None:
        """Make moves, drawn one after the other, until the time is over."""
        while not self.is_over:
            move = chance.choice(moves)
            self.made.append(f"{threading.current_thread().name}: {move.__name__}")
            with suppress(OrionError):
                move(self, chance)


Move = Callable[[Stress, random.Random], None]


# -- the moves, on any thread


def ask(run: Stress, chance: random.Random) -> None:
    run.engine.infer("What of it?", **run.options(chance))


def submit_and_leave(run: Stress, chance: random.Random) -> None:
    run.submit(chance)


def submit_and_cancel(run: Stress, chance: random.Random) -> None:
    handles = [run.submit(chance) for _ in range(chance.randrange(1, 4))]
    for handle in handles:
        handle.cancel()


def cancel_any(run: Stress, chance: random.Random) -> None:
    with suppress(IndexError):
        chance.choice(list(run.handles)[-20:]).cancel()


def wait_a_little(run: Stress, chance: random.Random) -> None:
    with suppress(TimeoutError):
        run.submit(chance).result(0.001)


def read(run: Stress, chance: random.Random) -> None:
    for _event in run.stream(chance):
        pass


def read_a_piece(run: Stress, chance: random.Random) -> None:
    with run.stream(chance, chunk_by="word") as handle:
        for _event in itertools.islice(handle, chance.randrange(3)):
            pass


def drop_a_stream(run: Stress, chance: random.Random) -> None:
    run.stream(chance)


def hook(run: Stress, chance: random.Random) -> None:
    """Events on a thread of their own, whose function may raise."""
    is_bad = chance.random() < 0.5

    def on_event(_event: object) -> None:
        if is_bad:
            raise ValueError("a hook of the application")

    run.stream(chance, on_event=on_event).result(BOUND_S)


def split_badly(run: Stress, chance: random.Random) -> None:
    def split(_text: str) -> tuple[list[str], str]:
        raise ValueError("a splitter of the application")

    run.stream(chance, chunk_by=split).result(BOUND_S)


def call_back(run: Stress, chance: random.Random) -> None:
    """A callback that submits, asks and waits, cancels or raises."""
    kind = chance.randrange(4)

    def called(handle: RequestHandle) -> None:
        if kind == 0:
            with suppress(OrionError):
                run.submit(random.Random(kind))
        elif kind == 1:
            handle.cancel()
        elif kind == 2:
            with suppress(OrionError):
                run.engine.infer("And you?", agent=run.agents[0])
        else:
            raise ValueError("a callback of the application")

    run.submit(chance).add_done_callback(called)


def subscribe(run: Stress, chance: random.Random) -> None:
    is_bad, asks = chance.random() < 0.5, chance.random() < 0.5
    asked: list[bool] = []

    def seen(_event: object) -> None:
        if is_bad:
            raise ValueError("a subscriber of the application")
        run.engine.stats()
        if asks and not asked:
            asked.append(True)  # each question has events of its own
            with suppress(OrionError):
                run.engine.infer("And you?", agent=run.agents[0])

    end = run.engine.subscribe(seen)
    try:
        run.submit(chance).result(BOUND_S)
    finally:
        end()


def converse(run: Stress, chance: random.Random) -> None:
    chat = run.engine.chat(chance.choice(run.agents))
    chat.ask("What of it?")
    chat.stream("And then?")  # dropped
    assert len(chat.history) in (2, 4)


def look(run: Stress, chance: random.Random) -> None:
    run.engine.stats()
    run.engine.health()
    run.engine.export_logs()
    run.engine.plan("What of it?", agent=chance.choice(run.agents))


def preload(run: Stress, chance: random.Random) -> None:
    run.engine.preload(chance.choice(run.agents))


def unload(run: Stress, chance: random.Random) -> None:
    run.engine.unload(chance.choice(run.agents))


def pin_and_unload(run: Stress, chance: random.Random) -> None:
    agent = run.agents[0]  # one only: two pinned ones leave no room for others
    run.engine.preload(agent, pin=True)
    run.engine.unload(agent)


def crash(run: Stress, chance: random.Random) -> None:
    """A model dies: by kill -9 if it has a process."""
    for one in run.engine.stats().models.values():
        if one.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
            return
    known = [] if run.backend is None else models_of(run.backend)
    living = [model for model in known if model.is_alive()]
    if living:
        with suppress(OrionError):
            chance.choice(living).crash()


def refuse_a_thread(run: Stress, chance: random.Random) -> None:
    """The system has no thread for this call, or for whoever asks for one first."""
    run.refusals.refuse_next()
    run.submit(chance)


def fork(run: Stress, _chance: random.Random) -> None:
    """A fork has no engine: it says so, ends nothing of its parent's, and does not hang."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            is_down = run.engine.health().status == "down"
            run.engine.shutdown()
            with suppress(OrionError):
                run.engine.infer("What of it?")
                is_down = False
            os._exit(0 if is_down else 3)
        finally:
            os._exit(4)
    assert os.waitpid(pid, 0)[1] == 0, "the fork of the process did not end well"


MOVES: list[Move] = [
    ask,
    submit_and_leave,
    submit_and_cancel,
    cancel_any,
    wait_a_little,
    read,
    read_a_piece,
    drop_a_stream,
    hook,
    split_badly,
    call_back,
    subscribe,
    converse,
    look,
    preload,
    unload,
    pin_and_unload,
    crash,
    refuse_a_thread,
]
INTERRUPTED: list[Move] = [
    ask,
    submit_and_leave,
    submit_and_cancel,
    read,
    read_a_piece,
    drop_a_stream,
    hook,
    look,
    preload,
    unload,
]
REAL: list[Move] = [
    ask,
    submit_and_cancel,
    read,
    read_a_piece,
    drop_a_stream,
    hook,
    call_back,
    look,
    preload,
    crash,
]


def chosen(moves: list[Move]) -> list[Move]:
    names = CHOSEN.split(",") if CHOSEN else [one.__name__ for one in moves]
    return [one for one in moves if one.__name__ in names]


# -- the signals, on the main thread


@contextmanager
def alarms(run: Stress, chance: random.Random) -> Iterator[None]:
    """Inside, the handler of a signal may raise at any moment, or cancels a request instead."""

    def handler(_number: int, _frame: object) -> None:
        if chance.random() < 0.3:
            cancel_any(run, chance)
        else:
            raise Interrupt

    def report(what: Any) -> None:
        if what.exc_type is not Interrupt:  # in a destructor Python reports it, and goes on
            hook(what)

    hook, sys.unraisablehook = sys.unraisablehook, report
    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = hook


def interrupted(run: Stress, chance: random.Random, moves: list[Move], *, forks: bool) -> None:
    """Make moves that a signal interrupts, until the time is over."""
    with alarms(run, chance):
        while not run.is_over:
            move = chance.choice(moves)
            run.made.append(f"interrupted: {move.__name__}")
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.choice([0.0001, 0.001, 0.01]))
                with suppress(OrionError):
                    move(run, chance)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                pass
            if forks and chance.random() < 0.02:
                fork(run, chance)


# -- a run, and what must hold after it


def make_all(run: Stress, moves: list[Move], interruptible: list[Move]) -> None:
    """Moves on all threads until the time is over. Raises what a move should not raise."""
    run.ends_at = time.monotonic() + SECONDS
    chance = random.Random(run.seed)
    chances = [random.Random(chance.random()) for _ in range(THREADS)]
    threads = [Running(run.moves_of, one, moves) for one in chances]
    if interruptible:
        interrupted(run, chance, interruptible, forks=True)
    for thread in threads:
        if not thread.ends_within(max(0.0, run.ends_at - time.monotonic()) + PATIENCE_S):
            faulthandler.dump_traceback(sys.__stderr__)
            pytest.fail(f"seed {run.seed}: a thread hangs; the last moves: {list(run.made)}")
        if thread.error is not None:
            raise thread.error


def check_requests(run: Stress) -> None:
    """Every request ends, the numbers add up, and no model is held."""
    engine = run.engine
    wait_until(lambda: not engine.stats().running and not engine.stats().waiting, PATIENCE_S)
    wait_until(lambda: all(handle.done() for handle in run.handles))
    requests = engine.stats().requests
    assert requests.received == requests.succeeded + requests.failed + requests.cancelled
    wait_until(lambda: not any(one.users or one.is_loading for one in models(engine)))
    for agent in run.agents:
        engine.unload(agent)
    assert not any(one.is_pinned for one in models(engine))
    wait_until(lambda: engine.stats().memory.reserved_bytes == 0)
    with suppress(WorkerError):  # the script draws one
        assert engine.infer("Still there?", agent=run.agents[0]).content


def models(engine: OrionInferenceEngine) -> list[Any]:
    return list(engine.stats().models.values())


def shut_down(run: Stress, chance: random.Random) -> None:
    """Shut down with requests under way and a signal in between; calling it again finishes."""
    with suppress(OrionError):
        for _ in range(5):
            run.submit(chance)
    with alarms(run, random.Random(run.seed)), suppress(Interrupt):
        signal.setitimer(signal.ITIMER_REAL, chance.choice([0.0002, 0.002]))
        run.engine.shutdown(0.1)
    run.engine.shutdown(0.1)
    assert all(handle.done() for handle in run.handles)
    stats = run.engine.stats()
    requests = stats.requests
    assert requests.received == requests.succeeded + requests.failed + requests.cancelled
    assert not stats.models
    assert not stats.memory.reserved_bytes


def ours(run: Stress) -> list[str]:
    new = set(threading.enumerate()) - run.before
    return [one.name for one in new if one.name.startswith("orion-")]


def descriptors() -> int:
    return psutil.Process().num_fds()


def whole_run(run: Stress, moves: list[Move], interruptible: list[Move]) -> None:
    """A run from the first move to the last check; a failure tells the seed."""
    with suppress(OrionError):
        # What is imported when it is needed: a signal in an import keeps its lock for ever.
        run.engine.plan("What of it?")
        look(run, random.Random(run.seed))
        converse(run, random.Random(run.seed))
    try:
        with run.refusals:
            make_all(run, chosen(moves), chosen(interruptible))
        check_requests(run)
        shut_down(run, random.Random(run.seed))
        run.handles.clear()
        wait_until(lambda: not ours(run))
    except BaseException as error:
        error.add_note(
            f"repeat with ORION_STRESS_SEED={run.seed}; the last moves: {list(run.made)}"
        )
        raise
    finally:
        run.engine.shutdown(0.0)


def stress_config(**fields: Any) -> EngineConfig:
    return config_with(
        slots=2,
        max_models=2,
        max_queue=8,
        cancel_grace_s=2.0,
        breaker={"failure_threshold": 50},
        **fields,
    )


def scripts(seed: int) -> Callable[[GenerationJob], FakeAnswer]:
    """Answers of all kinds, drawn."""
    chance = random.Random(seed)

    def script(_job: GenerationJob) -> FakeAnswer:
        text = "word " * chance.choice([1, 5, 200])
        fate = chance.random()
        if fate < 0.1:
            return FakeAnswer(text, error=WorkerError("a fault"))
        if fate < 0.15:
            return FakeAnswer(text, crash_after=chance.randrange(5))
        return FakeAnswer(text, delay_s=chance.choice([0.0, 0.0, 0.002]))

    return script


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No log: a signal that interrupts a handler of `logging` keeps its lock for ever."""
    monkeypatch.setattr(logging.getLogger("orion_oie"), "disabled", True)


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_at_once(seed: int, tmp_path: Path, quick_exit: None, silent: None) -> None:
    """With models of a fake backend: all moves, on four threads and the main one."""
    before = descriptors()
    backend = FakeBackend({"*": scripts(seed)}, load_delay_s=0.001)
    engine = OrionInferenceEngine(registry_with(tmp_path, AGENTS), stress_config(), backend=backend)
    whole_run(Stress(engine, seed, backend), MOVES, INTERRUPTED)
    wait_until(lambda: descriptors() <= before)


@pytest.mark.parametrize("seed", SEEDS[:1])
def test_with_worker_processes(seed: int, tiny_model: Path, quick_exit: None, silent: None) -> None:
    """With a real model, whose process is killed again and again."""
    before = descriptors()
    engine = OrionInferenceEngine(one_model_registry(tiny_model), stress_config())
    whole_run(Stress(engine, seed, None), REAL, [ask, read, read_a_piece, drop_a_stream])
    wait_until(lambda: not psutil.Process().children())
    wait_until(lambda: descriptors() <= before)
