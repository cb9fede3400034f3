"""Whatever interrupts the hand-over of an item or a callback, what comes later is called."""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import pytest
from helpers import BOUND_S, is_running, no_more_threads, wait_until
from interrupts import Interrupted, points_of

from orion_oie.callbacks import host_log
from orion_oie.callbacks.delivery import Delivery
from orion_oie.callbacks.line import CallbackLine
from orion_oie.callbacks.threads import CallbackThreads

Interruption = KeyboardInterrupt, MemoryError
each_error = pytest.mark.parametrize("error", Interruption)
# A thread whose start is interrupted may fail in the standard library, before it runs.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def fails(error: BaseException) -> None:
    raise AssertionError from error


def delivery(taken: list[str]) -> tuple[Callable[[str], None], Callable[[], bool]]:
    one = Delivery(taken.append, fails, limit=2)
    return one.put, lambda: one.flush(BOUND_S)


def line(taken: list[str]) -> tuple[Callable[[str], None], Callable[[], bool]]:
    one = CallbackLine(limit=1)
    return lambda item: one.put(lambda: taken.append(item)), lambda: one.wait(BOUND_S)


def threads(taken: list[str]) -> tuple[Callable[[str], None], Callable[[], bool]]:
    one = CallbackThreads()
    return lambda item: one.run(lambda: taken.append(item)), lambda: True


@each_error
@pytest.mark.parametrize("make", [delivery, line, threads])
@pytest.mark.parametrize("is_warm", [True, False], ids=["warm", "cold"])
def test_an_interrupted_put_loses_its_own_item_at_most(
    make: Callable[..., tuple[Callable[[str], None], Callable[[], bool]]],
    is_warm: bool,
    error: type[BaseException],
) -> None:
    """At every point of it, with an idle thread there and without."""
    points = points_of(lambda: make([])[0]("counted"))
    assert points > 5
    for at in range(1, points + 2):
        taken: list[str] = []
        put, is_through = make(taken)
        if is_warm:
            put("before")
            assert is_through()
            wait_until(lambda taken=taken: taken == ["before"])
        with suppress(error), Interrupted(at, error):
            put("torn")
        put("after")
        assert is_through(), at
        wait_until(lambda taken=taken: "after" in taken)
        assert [one for one in taken if one != "torn"] == ["before"] * is_warm + ["after"]
        assert taken.count("torn") <= 1


@each_error
def test_a_torn_overflow_ends_a_flush(error: type[BaseException]) -> None:
    """What is lost because too many waited is waited for no more."""
    for at in range(1, 40):
        let_go = threading.Event()
        taken: list[int] = []

        def take(item: int, let_go: threading.Event = let_go, taken: list[int] = taken) -> None:
            let_go.wait(BOUND_S)
            taken.append(item)

        one = Delivery(take, fails, limit=2)
        for number in range(3):
            one.put(number)
        with suppress(error), Interrupted(at, error):
            one.put(3)
        let_go.set()
        one.put(4)
        assert one.flush(BOUND_S), at
        assert taken[-1] == 4


def test_a_flush_waits_for_what_was_put_before_it() -> None:
    """Not for what comes while it waits; and not for itself."""
    let_go = threading.Event()
    inner: list[bool] = []
    one: Delivery[int] = Delivery(
        lambda item: (let_go.wait(BOUND_S), inner.append(one.flush(BOUND_S))) if item else None,
        fails,
    )
    one.put(1)
    assert not one.flush(0.01)
    let_go.set()
    assert one.flush(BOUND_S)
    assert inner == [False]
    one.put(0)
    assert one.flush(BOUND_S)
    assert one.flush(0)


def test_without_a_thread_a_flush_finds_one() -> None:
    """What could not be handed over is, as soon as there are threads again."""
    taken: list[int] = []
    one = Delivery(taken.append, fails)
    wait_until(lambda: not is_running("orion-callback"))
    with no_more_threads():
        one.put(1)
        assert not one.flush(0)
    assert not taken
    assert one.flush(BOUND_S)
    assert taken == [1]


@each_error
def test_a_torn_line_of_the_log_leaves_the_log_going(error: type[BaseException]) -> None:
    """It is one log for the whole process."""
    points = points_of(lambda: host_log.post(lambda: None, fails))
    for at in range(1, points + 2):
        with suppress(error), Interrupted(at, error):
            host_log.post(lambda: None, fails)
        written: list[int] = []
        host_log.post(lambda written=written: written.append(1), fails)
        assert host_log.flush(BOUND_S), at
        assert written == [1]


def test_an_item_that_comes_while_the_thread_ends_is_waited_for() -> None:
    """It has another thread, of which the end of the first one knows nothing."""
    begun, let_go = threading.Event(), threading.Event()

    def at_end(frame: FrameType, event: str, result: object) -> None:
        if event == "return" and frame.f_code.co_name == "_hand_on_next" and result is False:
            sys.setprofile(None)
            one.put(1)
            begun.wait(BOUND_S)

    def take(item: int) -> None:
        if item == 0:
            sys.setprofile(at_end)  # of this thread
        else:
            begun.set()
            let_go.wait(BOUND_S)

    one = Delivery(take, fails)
    one.put(0)
    assert begun.wait(BOUND_S)
    assert not one.flush(0.2)
    let_go.set()
    assert one.flush(BOUND_S)
