"""Whatever interrupts a call, each request ends, the numbers add up, and the engine goes on: Ctrl-C
at any point of it, no more threads, no more memory, a handler of a signal that calls the engine."""

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from engines import LONG, TEXT, MakeEngine
from helpers import BOUND_S, Held, Running, is_running, wait_until
from interrupts import Interrupted, Refusals, points_of

from orion_oie import (
    Chat,
    EngineClosedError,
    OrionError,
    OrionInferenceEngine,
    RequestCancelledError,
    WorkerError,
)
from orion_oie.backends.fake import FakeAnswer

AGENT = {"agent": "conversation"}
STRIDE = int(os.environ.get("ORION_INTERRUPTS_STRIDE", "7"))  # 1 goes through all points


def read(engine: OrionInferenceEngine) -> None:
    for _event in engine.stream("Hello?", **AGENT):
        pass


def leave(engine: OrionInferenceEngine) -> None:
    with engine.stream("Hello?", **AGENT) as handle:
        next(iter(handle))


def fail(engine: OrionInferenceEngine) -> None:
    with suppress(OrionError):
        engine.submit("Hello?", agent="nobody").result(BOUND_S)


def load(engine: OrionInferenceEngine) -> None:
    engine.unload("conversation")
    engine.preload("conversation")


CALLS: dict[str, Callable[[OrionInferenceEngine], object]] = {
    "infer": lambda engine: engine.infer("Hello?", **AGENT),
    "deadline": lambda engine: engine.infer("Hello?", deadline=BOUND_S, **AGENT),
    "route": lambda engine: engine.infer("Hello?"),
    "submit": lambda engine: engine.submit("Hello?", **AGENT),
    "fail": fail,
    "stream": read,
    "leave": leave,
    "events": lambda engine: engine.stream("Hello?", on_event=lambda _event: None, **AGENT).result(
        BOUND_S
    ),
    "cancel": lambda engine: engine.submit("Hello?", **AGENT).cancel(),
    "plan": lambda engine: engine.plan("Hello?", **AGENT),
    "preload": load,
    "stats": lambda engine: (engine.stats(), engine.health()),
    "chat": lambda engine: engine.chat("conversation").ask("Hello?"),
}


def check(engine: OrionInferenceEngine) -> None:
    """Nothing is under way any more, and the numbers add up."""

    def is_through() -> bool:
        stats = engine.stats()  # one look: a request may begin to run between two
        counts = stats.requests
        ended = counts.succeeded + counts.failed + counts.cancelled
        return not stats.running and not stats.waiting and counts.received == ended

    wait_until(is_through)


def goes_on(engine: OrionInferenceEngine) -> None:
    """A further request is answered; on another thread, so that a lock that was left is found."""

    def again() -> None:
        check(engine)
        assert engine.infer("Hello?", **AGENT).content == TEXT
        check(engine)

    Running(again).join()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", CALLS)
def test_at_any_point(make_engine: MakeEngine, name: str, error: type[BaseException]) -> None:
    """An error at any point of a call comes out of it, or out of the handle, and does no harm."""
    engine, call = make_engine(), CALLS[name]
    call(engine)
    count = points_of(lambda: call(engine))
    for at in range(1 + len(name) % STRIDE, count + 1, STRIDE):
        with suppress(error, RuntimeError), Interrupted(at, error) as interrupted:
            call(engine)
        if interrupted.where:
            try:
                goes_on(engine)
            except BaseException as caught:
                caught.add_note(f"{name}, point {at}: {interrupted.where}")
                raise


def ask(chat: Chat) -> None:
    chat.ask("Hello?")


def stream(chat: Chat) -> None:
    for _event in chat.stream("Hello?"):
        pass


def look(chat: Chat) -> None:
    with suppress(RequestCancelledError):
        handle = chat.stream("Hello?")
        handle.result(BOUND_S)
    assert chat.history  # it takes the answer


@pytest.mark.parametrize("call", [ask, stream, look, Chat.undo, Chat.clear])
def test_a_chat_at_any_point(make_engine: MakeEngine, call: Callable[[Chat], object]) -> None:
    """Its next turn comes, and its history has whole turns."""
    engine = make_engine()
    chat = engine.chat("conversation")
    call(chat)
    count = points_of(lambda: call(chat))
    for at in range(1, count + 1, STRIDE):
        with suppress(KeyboardInterrupt, RuntimeError), Interrupted(at) as interrupted:
            call(chat)
        before = len(chat.history)
        try:
            assert Running(chat.ask, "Hello?").join().content == TEXT
        except BaseException as caught:
            caught.add_note(f"point {at}: {interrupted.where}")
            raise
        assert len(chat.history) == before + 2
        roles = [message.role for message in chat.history]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


WAITS: dict[str, Callable[[OrionInferenceEngine], object]] = {
    "infer": lambda engine: engine.infer("Hello?"),
    "result": lambda engine: engine.submit("Hello?").result(BOUND_S),
    "stream": lambda engine: list(engine.stream("Hello?")),
    "chat": lambda engine: engine.chat().ask("Hello?"),
    "tokens": lambda engine: list(engine.chat().stream("Hello?")),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_signal_just_before_a_wait_is_seen(make_engine: MakeEngine, name: str) -> None:
    """It wakes no system call, neither does one that the system hands to another thread; the call
    looks for it by itself."""
    held = Held(FakeAnswer(TEXT))
    engine = make_engine({"*": held})

    def send() -> None:
        held.wait_for()
        _thread.interrupt_main()  # only says that there was one

    sender = Running(send)
    with pytest.raises(KeyboardInterrupt):
        WAITS[name](engine)
    held.let_go.set()
    sender.join()


def test_shutdown_at_any_point(make_engine: MakeEngine) -> None:
    """Ctrl-C in a shutdown comes out of it; it goes on, and a second one waits for its end."""
    count = points_of(make_engine().shutdown)
    for at in range(1, count + 1):
        engine = make_engine({"*": LONG})
        handle = engine.submit("Hello?", **AGENT)
        with suppress(KeyboardInterrupt), Interrupted(at):
            engine.shutdown(0.0)
        Running(engine.shutdown, 0.0).join()
        with pytest.raises(OrionError):
            handle.result(0.0)
        assert not engine.stats().models
        check(engine)


def test_a_second_shutdown_may_shorten_the_first(make_engine: MakeEngine) -> None:
    """A running request has the shortest time that any of them gives, and both wait for the end."""
    engine = make_engine({"*": FakeAnswer("word " * 3000, delay_s=0.05)})
    handle = engine.submit("Hello?")
    wait_until(lambda: handle.text)
    first = Running(engine.shutdown, 60.0)
    wait_until(lambda: engine.health().status == "down")
    engine.shutdown(0.0)
    first.join()
    with pytest.raises(EngineClosedError):
        handle.result(0.0)


def test_a_request_that_its_backend_keeps_ends_with_the_engine(make_engine: MakeEngine) -> None:
    """A backend that heeds no cancel keeps its thread, but not the request."""
    let_go = threading.Event()

    def script(_job: object) -> FakeAnswer:
        let_go.wait(BOUND_S)
        return FakeAnswer()

    engine = make_engine({"*": script})
    handle = engine.submit("Hello?")
    wait_until(lambda: engine.stats().models)
    try:
        engine.shutdown(0.0)
        with pytest.raises(EngineClosedError):
            handle.result(0.0)
        check(engine)
    finally:
        let_go.set()


# -- no threads


@pytest.mark.parametrize("name", CALLS)
def test_each_thread_refused(make_engine: MakeEngine, quick_exit: None, name: str) -> None:
    """Each of the threads that a call needs may be refused: the call fails with a typed error, or
    needs it not so much."""
    number, asked = 0, 1
    while number < asked:
        number += 1
        engine = make_engine()
        with Refusals(number) as refusals, suppress(OrionError):
            CALLS[name](engine)
            wait_until(lambda engine=engine: not engine.stats().running)
        asked = refusals.asked
        goes_on(engine)
        engine.shutdown(0.0)


def test_no_thread_for_on_event(make_engine: MakeEngine) -> None:
    """The call says so, and the request, which nobody could have, ends."""
    engine = make_engine({"*": LONG})
    engine.preload("conversation")
    running = engine.submit("Hello?", **AGENT)
    wait_until(lambda: running.text)
    wait_until(lambda: not is_running("orion-callback"))
    with Refusals(name="orion-callback"), pytest.raises(WorkerError, match="no more threads"):
        engine.stream("Hello?", on_event=lambda _event: None, **AGENT)
    running.cancel()
    check(engine)
    assert engine.stats().requests.cancelled == 2


# -- handlers of signals


@contextmanager
def handled(number: int, handler: Callable[..., Any]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(number, before)


def test_a_handler_shuts_down(make_engine: MakeEngine) -> None:
    """SIGTERM during infer: its handler calls shutdown, which begins the end and returns; infer
    raises, and the next shutdown waits for the end."""
    engine = make_engine({"*": LONG})
    returned: list[float] = []

    def stop(*_: object) -> None:
        began = time.monotonic()
        engine.shutdown(0.1)
        returned.append(time.monotonic() - began)
        assert engine.health().status == "down"

    def send() -> None:
        wait_until(lambda: engine.stats().models and engine.stats().running)
        os.kill(os.getpid(), signal.SIGTERM)

    with handled(signal.SIGTERM, stop):
        sender = Running(send)
        with pytest.raises(EngineClosedError):
            engine.infer("Hello?", max_tokens=4000)
        sender.join()
    engine.shutdown()
    assert returned
    check(engine)


@pytest.mark.parametrize("what", ["cancel", "shutdown"])
def test_a_handler_at_any_point(make_engine: MakeEngine, what: str) -> None:
    """What a handler may call neither hangs nor breaks anything, whatever call it interrupts, and
    whatever locks that holds."""
    engine = make_engine()
    engine.infer("Hello?", **AGENT)

    def call() -> None:
        with suppress(OrionError):
            for _event in engine.stream("Hello?", **AGENT):
                engine.stats()

    count = points_of(call)
    points = range(1, count + 1, 3 * STRIDE if what == "cancel" else 10 * STRIDE)
    for at in points:
        if what == "shutdown":
            engine = make_engine()
            engine.infer("Hello?", **AGENT)
        other = engine.submit("Hello?", **AGENT)
        act = other.cancel if what == "cancel" else lambda engine=engine: engine.shutdown(0.0)
        with handled_at(at, act):
            call()
        with suppress(OrionError):
            other.result(BOUND_S)
        if what == "cancel":
            goes_on(engine)
        else:
            Running(engine.shutdown, 0.0).join()
            check(engine)


@contextmanager
def handled_at(at: int, act: Callable[[], object]) -> Iterator[None]:
    """Send this process a signal at a point of what runs inside; its handler calls `act`."""

    def send() -> None:
        signal.raise_signal(signal.SIGUSR1)

    with handled(signal.SIGUSR1, lambda *_: act()), Interrupted(at, send):
        yield


PROGRAM = """
import signal, sys, threading
from orion_oie import OrionInferenceEngine
from orion_oie.backends.fake import FakeAnswer, FakeBackend

engine = OrionInferenceEngine(backend=FakeBackend({"*": FakeAnswer("word " * 9000, delay_s=0.01)}))

def stop(*_):
    engine.shutdown(0.5)
    sys.exit(7)

signal.signal(signal.SIGTERM, stop)
with engine:
    handle = engine.stream("Hello?", agent="conversation", model="smollm2-135m-instruct")
    for event in handle:
        print("text", flush=True)
"""


def test_a_program_that_ends_by_a_handler() -> None:
    """The usual handler of SIGTERM, which shuts down and exits, ends the program with its code."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"text\n"
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=BOUND_S)
        finally:
            process.kill()
    assert process.returncode == 7, errors.decode()
