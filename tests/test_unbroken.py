"""Threads, conditions and futures that the handler of a signal cannot break."""

import threading
from contextlib import suppress
from functools import partial

import pytest
from helpers import BOUND_S, Running, no_more_threads, wait_until
from interrupts import Interrupted, points_of

from orion_oie.errors import WorkerError
from orion_oie.threads import (
    Condition,
    Event,
    Future,
    is_main,
    is_nested,
    run_in_background,
    start_thread,
    unbroken,
)


def test_a_notified_thread_goes_on() -> None:
    """All who wait wake up, and hold the lock again, one after the other."""
    condition, seen = Condition(), []

    def wait(number: int) -> None:
        with condition:
            seen.append(number)
            condition.wait_for(lambda: len(seen) > 3)
            seen.append(number)

    runs = [Running(wait, number) for number in range(3)]
    wait_until(lambda: len(seen) == 3)
    with condition:
        seen.append(9)
        condition.notify_all()
    for run in runs:
        run.join()
    assert sorted(seen[4:]) == [0, 1, 2]


def test_a_wait_may_end_in_vain() -> None:
    """After its time the lock is held again, as after a notification."""
    condition = Condition()
    with condition:
        assert not condition.wait(0.001)
        assert not condition.wait_for(lambda: False, 0.001)
        assert condition.wait_for(lambda: True, 0.0)
    assert Running(lambda: condition.__enter__()).join()


@pytest.mark.parametrize("kind", ["lock", "wait", "future", "event"])
def test_no_signal_breaks_it(kind: str) -> None:
    """Ctrl-C at any point of a use comes out as it is, and leaves no lock behind."""
    condition: Condition = Condition()
    future: Future[int] = Future()
    event = Event()

    def use() -> None:
        if kind == "event":
            event.clear()
            event.wait(0.001)
            event.set()
        elif kind == "future":
            with suppress(TimeoutError):
                future.result(0.001)
            future.done()
        else:
            with condition:
                condition.notify_all()
                if kind == "wait":
                    condition.wait(0.001)

    def use_again() -> None:
        with condition:
            future.done()
        event.clear()
        waiting = Running(event.wait, BOUND_S)
        event.set()
        assert waiting.join()

    count = points_of(use)
    assert count
    for at in range(1, count + 1):
        with suppress(KeyboardInterrupt), Interrupted(at):
            use()
        Running(use_again).join()


def test_a_refused_thread_is_a_typed_error() -> None:
    """It says what to do; a background call has it in its future, and an unbroken one needs no
    thread."""
    with no_more_threads():
        with pytest.raises(WorkerError, match="ulimit"):
            start_thread(lambda: None, "test")
        with pytest.raises(WorkerError, match="no more threads"):
            run_in_background(lambda: 7, "test").result(BOUND_S)
        assert unbroken(threading.get_ident, "test").result(BOUND_S) == threading.get_ident()
    assert unbroken(threading.get_ident, "test").result(BOUND_S) != threading.get_ident()


@pytest.mark.parametrize("start", [run_in_background, unbroken])
def test_an_interrupted_start_runs_once_at_most(start: object) -> None:
    """Whatever comes out of it is the interruption, and the function runs once or not at all."""
    count = points_of(lambda: start(lambda: None, "test"))
    for at in range(1, count + 1):
        calls: list[int] = []
        call = partial(calls.append, 0)
        with suppress(KeyboardInterrupt), Interrupted(at):
            start(call, "test").result(BOUND_S)
        assert len(calls) <= 1


def test_a_call_from_a_callback_is_nested() -> None:
    """It has a call of the library beneath it; a call of the application has not."""
    condition = Condition()
    seen: list[bool] = []
    with condition:
        condition.wait_for(lambda: bool(seen.append(unwrapped())) or True)
    assert seen == [True]
    assert not unwrapped()
    assert is_main()
    assert not Running(is_main).join()


def unwrapped() -> bool:
    """What the library sees that is called here: `is_nested` itself counts as the call."""
    return is_nested()
