"""The engine itself: listeners, statistics, health, loading ahead, shutting down.

The backend says what its script says.
"""

import asyncio
import gc
import json
import os
import random
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from engines import LONG, TEXT, ended, is_observed, names, one_at_a_time, parts, texts
from helpers import BOUND_S, Held, Running, is_running, run_all, wait_until
from internals import idle_exit_s, models_of

from orion_oie import (
    DeadlineExceededError,
    EngineClosedError,
    InvalidRequestError,
    ModelCorruptError,
    OrionError,
    OrionInferenceEngine,
    RequestCancelledError,
    RequestHandle,
    RequestState,
    TokenEvent,
    WorkerTimeoutError,
)
from orion_oie.backends.base import GenerationJob
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.engine.request import Request

# Listeners


def test_on_event_gets_every_event(make_engine) -> None:
    """The callback gets all events in order, off the caller's thread, restarts included."""
    held = Held(FakeAnswer("one two three", crash_after=1), FakeAnswer("four five"))
    engine = make_engine({"main": held})
    events: list[TokenEvent] = []
    threads: set[threading.Thread] = set()

    def on_event(event: TokenEvent) -> None:
        events.append(event)
        threads.add(threading.current_thread())

    handle = engine.stream("Hello?", on_event=on_event, on_stream_failure="restart")
    wait_until(lambda: is_observed(handle))
    held.let_go.set()
    assert handle.result(BOUND_S).content == "four five"
    wait_until(lambda: len(events) == 4)
    assert texts(events) == ["one ", "<restart>", "four ", "five"]
    assert threading.current_thread() not in threads


def test_a_failing_on_event_ends_the_request(make_engine) -> None:
    """What the callback raises ends the request and is the cause of its error."""
    engine = make_engine({"*": LONG})
    seen: list[str] = []

    def on_event(event: TokenEvent) -> None:
        seen.append(event.text)
        raise KeyError("broken callback")

    handle = engine.stream("Hello?", on_event=on_event)
    with pytest.raises(InvalidRequestError, match="on_event raised KeyError") as caught:
        handle.result(BOUND_S)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(seen) == 1
    assert engine.health().status == "healthy"


def test_on_event_of_a_failed_request_ends(make_engine) -> None:
    """The thread of a callback ends with its request, also when that fails."""
    engine = make_engine({"*": FakeAnswer("one two", error=WorkerTimeoutError("stuck"))})
    events: list[TokenEvent] = []
    handle = engine.stream("Hello?", on_event=events.append)
    with pytest.raises(WorkerTimeoutError):
        handle.result(BOUND_S)
    wait_until(lambda: not is_running("orion-events"))


# Statistics, health, loading ahead


def test_stats_count_what_happened(make_engine) -> None:
    """Requests by outcome, tokens, agents and errors are counted."""
    engine = make_engine(agents={"conversation": ["main"], "writer": ["main"]})
    results = [engine.infer("Hello?"), engine.infer("Hello?", agent="writer")]
    for wrong in ("", "  "):
        with pytest.raises(InvalidRequestError):
            engine.infer(wrong)
    counts = engine.stats().requests
    assert (counts.received, counts.succeeded, counts.failed, counts.cancelled) == (4, 2, 2, 0)
    assert counts.by_agent == {"conversation": 1, "writer": 1}
    assert counts.errors == {"InvalidRequestError": 2}
    assert counts.completion_tokens == sum(r.usage.completion_tokens for r in results)
    assert counts.prompt_tokens == sum(r.usage.prompt_tokens for r in results)


def test_stats_show_the_models(make_engine) -> None:
    """Models in memory, whether they load, their users and the hardware are shown."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})
    assert engine.stats().models == {}
    handle = engine.submit("Hello?")
    held.wait_for()
    stats = engine.stats()
    model = stats.models["main@q4"]
    assert (model.users, model.is_loading, model.pid, model.memory_bytes) == (1, False, None, None)
    assert model.model.context_length == 4096
    assert (stats.running, stats.waiting) == (1, 0)
    assert stats.hardware.usable_cores >= 1
    held.let_go.set()
    handle.result(BOUND_S)
    wait_until(lambda: engine.stats().models["main@q4"].users == 0)
    json.loads(engine.stats().model_dump_json())


def test_two_agents_share_one_model(make_engine) -> None:
    """A model that two agents use is loaded once."""
    backend = FakeBackend()
    engine = make_engine(backend, {"conversation": ["main"], "writer": ["main"]})
    engine.infer("Hello?")
    engine.infer("Hello?", agent="writer")
    assert backend.loaded == ["main@q4"]


def test_preload_and_unload(make_engine) -> None:
    """preload makes the first answer warm; unload frees the model once."""
    backend = FakeBackend()
    engine = make_engine(backend)
    info = engine.preload("conversation")
    assert (info.model_id, info.architecture) == ("main", "fake")
    engine.preload("conversation")
    assert not engine.infer("Hello?").receipt.cold_load
    assert backend.loaded == ["main@q4"]
    assert engine.unload("conversation") is True
    assert engine.unload("conversation") is False
    assert engine.stats().models == {}
    assert "pool.unloaded" in names(engine)
    assert engine.infer("Hello?").receipt.cold_load


def test_a_model_in_use_is_not_unloaded(make_engine) -> None:
    """unload leaves a model alone while it answers."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})
    handle = engine.submit("Hello?")
    held.wait_for()
    assert engine.unload("conversation") is False
    held.let_go.set()
    assert handle.result(BOUND_S).content == TEXT


def test_unload_leaves_the_fallback_agent_alone(make_engine) -> None:
    """Only models that the agent itself names are unloaded."""
    engine = make_engine(agents={"conversation": ["main"], "writer": ["w"]})
    engine.preload("conversation")
    engine.preload("writer")
    assert engine.unload("writer") is True
    assert list(engine.stats().models) == ["main@q4"]


def test_a_failing_preload_says_why(make_engine) -> None:
    """preload raises what the load raised, and counts for the breaker."""
    engine = make_engine(FakeBackend(load_errors={"main": [ModelCorruptError("bad")]}))
    with pytest.raises(ModelCorruptError, match="bad"):
        engine.preload("conversation")
    assert engine.stats().breakers["main:load"].failures == 1
    assert engine.preload("conversation").model_id == "main"


# Shutting down


def test_shutdown_lets_what_runs_end(make_engine) -> None:
    """Running requests get their time, waiting ones fail, new ones are refused."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held}, **one_at_a_time())
    running, waiting = engine.submit("First?"), engine.submit("Second?")
    held.wait_for()
    closing = Running(engine.shutdown)
    with pytest.raises(EngineClosedError, match="shut down"):
        waiting.result(BOUND_S)
    with pytest.raises(EngineClosedError, match="make a new one"):
        engine.submit("Third?")
    assert closing.is_running
    held.let_go.set()
    assert running.result(BOUND_S).content == TEXT
    closing.join()
    assert engine.stats().running == 0
    assert names(engine)[-1] == "engine.closed"


def test_shutdown_ends_what_does_not_end(make_engine) -> None:
    """After its time a running request fails with EngineClosedError."""
    engine = make_engine({"*": LONG})
    handle = engine.submit("Hello?")
    wait_until(lambda: handle.stats.tokens)
    Running(engine.shutdown, 0.05).join()
    assert handle.done()
    with pytest.raises(EngineClosedError):
        handle.result()
    assert engine.stats().models == {}


def test_shutdown_reaches_requests_whose_model_does_not_end(make_engine, monkeypatch) -> None:
    """A running request is told of the shutdown also when its model does not close."""
    monkeypatch.setattr("orion_oie.backends.fake.FakeModel.close", lambda *_: None)
    engine = make_engine({"*": LONG})
    handle = engine.submit("Hello?")
    wait_until(lambda: handle.stats.tokens)
    Running(engine.shutdown, 0.0).join()
    with pytest.raises(EngineClosedError):
        handle.result(BOUND_S)


def test_shutdown_ends_a_load(make_engine) -> None:
    """A request, and a preload, that wait for a load fail with EngineClosedError."""
    engine = make_engine(FakeBackend(load_delay_s=BOUND_S))
    handle = engine.submit("Hello?")
    loading = Running(engine.preload, "conversation")
    wait_until(lambda: (m := engine.stats().models.get("main@q4")) is not None and m.users == 2)
    Running(engine.shutdown, 0.05).join()
    with pytest.raises(EngineClosedError):
        handle.result(BOUND_S)
    with pytest.raises(EngineClosedError):
        loading.join()


@pytest.mark.parametrize("seed", range(3))
def test_a_shutdown_at_any_moment_ends_every_request(make_engine, seed: int) -> None:
    """While threads go on asking, a shutdown leaves no request without an end."""
    dice = random.Random(seed)
    engine = make_engine({"*": FakeAnswer("word " * 20, delay_s=0.001)})
    handles: list[RequestHandle] = []

    def ask() -> None:
        while True:
            handles.append(engine.submit("Hello?", deadline=60.0))

    asking = [Running(ask) for _ in range(3)]
    wait_until(lambda: len(handles) > dice.randrange(100))
    engine.shutdown(0.0)
    for running in asking:
        with pytest.raises(EngineClosedError):
            running.join()
    for handle in handles:
        wait_until(handle.done)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.models) == (0, 0, {})


def test_a_done_callback_may_shut_down(make_engine) -> None:
    """A shutdown from a done callback, on the serving thread, does not wait for itself."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})
    handle = engine.submit("Hello?")
    closed: list[str] = []

    def close(_handle: RequestHandle) -> None:
        engine.shutdown(BOUND_S)
        closed.append(engine.health().status)

    handle.add_done_callback(close)
    held.let_go.set()
    wait_until(lambda: closed == ["down"], BOUND_S / 2)


def test_the_timeout_of_a_shutdown_is_configured(make_engine) -> None:
    """Every way to shut down gives running requests `shutdown_timeout_s`, unless told
    otherwise or leaving with an error."""

    def leave(engine: OrionInferenceEngine) -> None:
        with engine:
            pass

    async def leave_async(engine: OrionInferenceEngine) -> None:
        async with engine:
            pass

    ways = [
        OrionInferenceEngine.shutdown,
        OrionInferenceEngine.close,
        lambda engine: asyncio.run(engine.aclose()),
        leave,
        lambda engine: asyncio.run(leave_async(engine)),
    ]
    for close in ways:
        engine = make_engine({"*": LONG}, shutdown_timeout_s=0.05)
        handle = engine.submit("Hello?")
        wait_until(lambda handle=handle: handle.stats.tokens)
        running = Running(close, engine)
        assert running.ends_within(BOUND_S / 2)
        running.join()
        with pytest.raises(EngineClosedError):
            handle.result(BOUND_S)
    held = Held(FakeAnswer(TEXT))
    patient = make_engine({"*": held}, shutdown_timeout_s=0.0)
    handle = patient.submit("Hello?")
    held.wait_for()
    closing = Running(patient.shutdown, BOUND_S)
    assert not closing.ends_within(0.02)
    held.let_go.set()
    closing.join()
    assert handle.result(BOUND_S).content == TEXT


def test_close_and_aclose_may_be_repeated(make_engine) -> None:
    """In any mix; aclose does not block the loop."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})
    handle = engine.submit("Hello?")
    held.wait_for()

    async def main() -> None:
        closing = asyncio.create_task(engine.aclose())
        await asyncio.sleep(0.01)
        assert not closing.done()
        held.let_go.set()
        await closing
        await engine.aclose()

    asyncio.run(asyncio.wait_for(main(), BOUND_S))
    assert handle.result(BOUND_S).content == TEXT
    engine.close()
    engine.shutdown()
    engine.shutdown(0.0)
    assert names(engine).count("engine.closed") == 1
    assert engine.health().status == "down"


@pytest.mark.parametrize("wrong", [-1, "soon", True, float("nan"), float("inf"), 1e308, [1]])
def test_a_wrong_timeout_closes_nothing(make_engine, wrong: Any) -> None:
    """It is refused before anything is shut down."""
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match="timeout: allowed is a number of seconds"):
        engine.shutdown(wrong)
    assert engine.infer("Hello?").content == TEXT


def test_a_closed_engine_says_so(make_engine) -> None:
    """After shutdown, which may be repeated, every use raises EngineClosedError."""
    engine = make_engine()
    engine.infer("Hello?")
    engine.shutdown()
    engine.shutdown()
    uses = [
        lambda: engine.infer("Hello?"),
        lambda: engine.submit("Hello?"),
        lambda: engine.stream("Hello?"),
        lambda: asyncio.run(engine.ainfer("Hello?")),
        lambda: engine.preload("conversation"),
        engine.initialize,
    ]
    for use in uses:
        with pytest.raises(EngineClosedError):
            use()
    assert engine.health().status == "down"
    assert engine.stats().requests.succeeded == 1
    assert names(engine).count("engine.closed") == 1


def test_with_blocks_shut_down(make_engine) -> None:
    """`with` and `async with` give the engine and shut it down, also after an error."""
    with make_engine() as engine:
        assert engine.infer("Hello?").content == TEXT
    assert engine.health().status == "down"

    async def main() -> OrionInferenceEngine:
        async with make_engine() as engine:
            assert (await engine.ainfer("Hello?")).content == TEXT
        return engine

    assert asyncio.run(main()).health().status == "down"
    failing = make_engine({"*": LONG})

    def leave_with_an_error() -> RequestHandle:
        with failing:
            handle = failing.submit("Hello?")
            wait_until(lambda: handle.stats.tokens)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Running(leave_with_an_error).join()
    assert failing.health().status == "down"
    assert failing.stats().running == 0


# Living and dying in a process


def is_collected(engine: "weakref.ref[OrionInferenceEngine]") -> bool:
    gc.collect()
    return engine() is None


def serve_some(engine: OrionInferenceEngine) -> None:
    """Requests of all fates."""
    engine.infer("Hello?")
    engine.infer("Hello?", deadline=60.0)
    with pytest.raises(InvalidRequestError):
        engine.infer("")
    with pytest.raises(DeadlineExceededError):
        engine.infer("long", deadline=0.02)
    handle = engine.stream("long")
    next(iter(handle))
    handle.cancel()
    with pytest.raises(RequestCancelledError):
        handle.result()
    with pytest.raises(RuntimeError):
        engine.infer("bug")
    engine.preload("conversation")
    engine.unload("conversation")


def all_fates(job: GenerationJob) -> FakeAnswer:
    if job.messages[-1].content == "bug":
        raise RuntimeError("bug")
    return LONG if job.messages[-1].content == "long" else FakeAnswer(TEXT)


@pytest.mark.parametrize("is_used", [False, True])
def test_a_forgotten_engine_is_collected(make_engine, is_used: bool) -> None:
    """An engine that nobody refers to goes away without shutdown, whatever it has served and
    though its threads are still idle, and its models with it."""
    backend = FakeBackend({"*": all_fates})
    engine = make_engine(backend)
    if is_used:
        serve_some(engine)
        engine.preload("conversation")
        assert is_running("orion-request")
    gone = weakref.ref(engine)
    del engine
    wait_until(lambda: is_collected(gone), idle_exit_s() / 2)
    assert not any(model.is_alive() for model in models_of(backend))


def test_a_kept_handle_does_not_keep_the_engine(make_engine) -> None:
    """An application may keep the handles of answered requests; the engine goes all the same."""
    engine = make_engine()
    handles = [engine.submit("Hello?"), engine.stream("Hello?", deadline=60.0)]
    assert [ended(handle).result().content for handle in handles] == [TEXT, TEXT]
    gone = weakref.ref(engine)
    del engine
    wait_until(lambda: is_collected(gone), idle_exit_s() / 2)
    assert handles[0].text == TEXT


def test_a_running_request_keeps_its_engine(make_engine) -> None:
    """What an engine works with lives on until the requests that it has taken are answered, also
    if nobody refers to the engine itself; then its models go."""
    held = Held(FakeAnswer(TEXT))
    backend = FakeBackend({"*": held})
    engine = make_engine(backend, **one_at_a_time())
    handles = [engine.submit("Hello?") for _ in range(3)]
    gone = weakref.ref(parts(engine).pipeline)
    del engine
    held.wait_for()
    assert not is_collected(gone)
    assert all(model.is_alive() for model in models_of(backend))
    held.let_go.set()
    assert [handle.result(BOUND_S).content for handle in handles] == [TEXT] * 3
    wait_until(lambda: is_collected(gone), idle_exit_s() / 2)
    assert not any(model.is_alive() for model in models_of(backend))


def test_ended_requests_are_not_kept(make_engine) -> None:
    """The engine forgets a request when it has ended, however it ended."""
    engine = make_engine({"*": all_fates})
    ids: set[str | None] = set()
    engine.subscribe(lambda event: ids.add(event.request_id))
    serve_some(engine)

    def left() -> int:
        gc.collect()
        things = gc.get_objects()
        return sum(isinstance(t, (Request, RequestHandle)) and t.id in ids for t in things)

    assert len(ids) > 5
    wait_until(lambda: left() == 0, idle_exit_s() / 2)


def test_many_threads_leave_nothing_behind(make_engine, quick_exit) -> None:
    """Sixty-four threads of mixed requests and cancels all end; nothing runs, waits or stays."""
    before = set(threading.enumerate())
    engine = make_engine(
        {"*": lambda job: FakeAnswer(f"{job.messages[-1].content} " * 10, delay_s=0.0005)},
        {"conversation": ["a"], "x": ["b"], "y": ["c"]},
        max_models=2,
    )

    def work(number: int) -> str:
        agent = ("conversation", "x", "y")[number % 3]
        query = f"question-{number}"
        handle = engine.stream(query, agent=agent, priority=number % 5, deadline=60.0)
        match number % 8:
            case 0:
                handle.cancel()
            case 1:
                with handle:
                    for _ in handle:
                        break
            case 2:
                handle = engine.submit(query, deadline=0.002)
            case 3:
                list(handle)
            case 4:
                assert asyncio.run(engine.ainfer(query, agent=agent)).content.startswith(query)
        try:
            assert handle.result(BOUND_S).content == f"{query} " * 10
        except (RequestCancelledError, DeadlineExceededError) as error:
            return type(error).__name__
        return "answered"

    fates = [run.join() for run in run_all([lambda n=n: work(n) for n in range(64)])]
    assert fates.count("answered") >= 40
    wait_until(lambda: engine.stats().running == engine.stats().waiting == 0)
    stats = engine.stats()
    counts = stats.requests
    assert counts.received == counts.succeeded + counts.failed + counts.cancelled == 80
    # A model may just be loaded ahead.
    wait_until(lambda: all(model.users == 0 for model in engine.stats().models.values()))
    assert len(stats.models) <= 2
    wait_until(lambda: not set(threading.enumerate()) - before)


FAULTS = [
    FakeAnswer("one two three four", crash_after=0),
    FakeAnswer("one two three four", crash_after=2),
    FakeAnswer("one two", error=WorkerTimeoutError("stuck")),
    FakeAnswer("one two", error=ModelCorruptError("bad")),
]


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_faults_ends(make_engine, quick_exit, seed: int) -> None:
    """With crashes, errors, failing loads, bugs, evictions, cancels and deadlines at once, every
    request ends with its own answer or an error, and a stream agrees with its result."""
    before = set(threading.enumerate())
    lock = threading.Lock()
    dice = random.Random(seed)

    def script(job: GenerationJob) -> FakeAnswer:
        with lock:
            roll = dice.random()
        if roll < 0.03:
            raise RuntimeError("bug")
        if roll < 0.25:
            return FAULTS[int(roll * 1e6) % len(FAULTS)]
        return FakeAnswer(f"{job.messages[-1].content} " * 5, delay_s=0.0005)

    backend = FakeBackend(
        {"*": script},
        load_delay_s=0.001,
        load_errors={"b": [ModelCorruptError("bad file") for _ in range(5)]},
    )
    agents = {"conversation": ["a", "b"], "x": ["b", "c"], "y": ["c"]}
    engine = make_engine(backend, agents, slots=2, max_models=2, breaker={"failure_threshold": 9})

    def work(worker: int) -> None:
        own_dice = random.Random(1000 * seed + worker)
        for turn in range(12):
            query = f"question-{worker}-{turn}"
            options: dict[str, Any] = {"agent": own_dice.choice(list(agents))}
            options["on_stream_failure"] = own_dice.choice(["error", "restart"])
            if own_dice.random() < 0.15:
                options["deadline"] = own_dice.random() / 50
            handle = engine.stream(query, chunk_by=own_dice.choice(["token", "word"]), **options)
            if own_dice.random() < 0.15:
                threading.Timer(own_dice.random() / 100, handle.cancel).start()
            pieces: list[str] = []
            is_reading = own_dice.random() < 0.6
            try:
                if is_reading:
                    for event in handle:
                        pieces = [] if event.kind == "restart" else [*pieces, event.text]
                content = handle.result(BOUND_S).content
            except (OrionError, RuntimeError) as error:
                if not isinstance(error, OrionError) and str(error) != "bug":
                    raise
                assert handle.state in (RequestState.ERROR, RequestState.CANCELLED)
            else:
                assert content == f"{query} " * 5
                assert not is_reading or "".join(pieces) == content
                assert handle.receipt.considered[-1].outcome in ("answered", "not_needed")
            assert handle.receipt is not None

    for run in run_all([lambda n=n: work(n) for n in range(10)]):
        run.join()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    counts = stats.requests
    assert counts.received == counts.succeeded + counts.failed + counts.cancelled == 120
    assert counts.succeeded > 30
    wait_until(lambda: all(model.users == 0 for model in engine.stats().models.values()))
    wait_until(lambda: not set(threading.enumerate()) - before)


def test_a_fork_must_make_its_own_engine(tmp_path: Path) -> None:
    """In a forked child every call raises EngineClosedError at once, and the parent goes on."""
    script = f"""
import os, sys
from pathlib import Path
from helpers import registry_with
from orion_oie import EngineClosedError, OrionInferenceEngine
from orion_oie.backends.fake import FakeBackend

engine = OrionInferenceEngine(
    registry_with(Path({str(tmp_path)!r}), {{"conversation": ["main"]}}), backend=FakeBackend()
)
engine.infer("Hello?")
child = os.fork()
if child == 0:
    refused = 0
    for call in (engine.infer, engine.submit, engine.stream, engine.preload):
        try:
            call("conversation")
        except EngineClosedError as error:
            refused += "make an engine after forking" in str(error)
    engine.shutdown()
    sys.exit(refused)
_, status = os.waitpid(child, 0)
print("refused", os.waitstatus_to_exitcode(status))
print(engine.infer("Hello?").content)
"""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == ["refused 4", "This is a fake answer."], done.stderr


def test_a_kept_handle_does_not_keep_the_models(make_engine) -> None:
    """The workers of a forgotten engine end although the application keeps handles of requests
    that were answered."""
    backend = FakeBackend({"*": all_fates})
    engine = make_engine(backend)
    handles = [ended(engine.submit("Hello?")), ended(engine.stream("Hello?"))]
    gone = weakref.ref(parts(engine).pipeline)
    del engine
    wait_until(lambda: is_collected(gone), idle_exit_s() / 2)
    assert not any(model.is_alive() for model in models_of(backend))
    assert [handle.done() for handle in handles] == [True, True]
