"""Cancel scopes end once and tell everyone; deadlines fire in order and cost no idle thread."""

import threading
import weakref
from collections.abc import Callable

import pytest
from helpers import BOUND_S, no_more_threads, run_all, wait_until
from internals import at_idle_timeout, deadlines_of, set_timer_idle_exit

from orion_oie.callbacks import host_log
from orion_oie.cancellation import CancelScope, DeadlineTimer
from orion_oie.errors import DeadlineExceededError, OrionError, RequestCancelledError, WorkerError

FAR_S = 600.0
NEAR_S = 0.02


def error(text: str = "stop") -> RequestCancelledError:
    return RequestCancelledError(text)


Threads = Callable[[], int]


@pytest.fixture
def timer_threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    """Counts the timer threads of the test; they end soon when idle."""
    set_timer_idle_exit(monkeypatch, 0.01)
    before = set(threading.enumerate())

    def count() -> int:
        return sum(t.name == "orion-deadlines" for t in set(threading.enumerate()) - before)

    return count


# CancelScope


def test_a_fresh_scope_lets_work_go_on() -> None:
    """A scope that was not cancelled has no error and passes its check."""
    scope = CancelScope()
    assert scope.error is None
    scope.check()


def test_the_first_error_stays() -> None:
    """Only the first cancel counts; its error is what check raises."""
    scope = CancelScope()
    first = error("first")
    assert scope.cancel(first) is True
    assert scope.cancel(error("second")) is False
    assert scope.error is first
    with pytest.raises(RequestCancelledError, match="first"):
        scope.check()


def test_callbacks_run_once_in_order() -> None:
    """Every callback runs once, in the order of registration, when the error can be seen."""
    scope = CancelScope()
    seen: list[tuple[str, OrionError | None]] = []
    scope.on_cancel(lambda: seen.append(("a", scope.error)))
    scope.on_cancel(lambda: seen.append(("b", scope.error)))
    first = error()
    scope.cancel(first)
    scope.cancel(error())
    assert seen == [("a", first), ("b", first)]


def test_an_undone_callback_does_not_run() -> None:
    """Undo takes back one registration, also twice, and leaves equal callbacks alone."""
    scope = CancelScope()
    seen: list[int] = []

    def callback() -> None:
        seen.append(1)

    undo = scope.on_cancel(callback)
    scope.on_cancel(callback)
    undo()
    undo()
    scope.cancel(error())
    assert seen == [1]
    undo()


def test_a_late_callback_runs_at_once() -> None:
    """A callback that comes after the cancel runs right away, on the caller's thread."""
    scope = CancelScope()
    scope.cancel(error())
    threads: list[threading.Thread] = []
    undo = scope.on_cancel(lambda: threads.append(threading.current_thread()))
    assert threads == [threading.current_thread()]
    undo()


def test_a_cancelled_scope_lets_go_of_its_callbacks() -> None:
    """After a cancel the scope no longer holds what it told."""

    class Callback:
        def __call__(self) -> None:
            pass

    scope, callback = CancelScope(), Callback()
    scope.on_cancel(callback)
    gone = weakref.ref(callback)
    del callback
    assert gone() is not None
    scope.cancel(error())
    assert gone() is None


def test_callbacks_may_use_the_scope() -> None:
    """A callback may cancel, register and undo on the same scope without a deadlock."""
    scope = CancelScope()
    seen: list[str] = []

    def callback() -> None:
        assert scope.cancel(error("again")) is False
        scope.on_cancel(lambda: seen.append("late"))()
        undo()

    undo = scope.on_cancel(callback)
    scope.cancel(error())
    assert seen == ["late"]


def test_a_failing_callback_does_not_silence_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """Every callback runs even if one before it raises, which is logged."""
    scope = CancelScope()
    seen: list[str] = []

    def broken() -> None:
        raise RuntimeError("broken callback")

    scope.on_cancel(broken)
    scope.on_cancel(lambda: seen.append("told"))
    assert scope.cancel(error()) is True
    assert seen == ["told"]
    assert host_log.flush(BOUND_S)
    assert "broken callback" in caplog.text


def test_one_of_many_threads_wins() -> None:
    """Of many threads that cancel at once exactly one wins, and each callback runs once."""
    for _ in range(50):
        scope = CancelScope()
        errors = [error(str(n)) for n in range(8)]
        told: list[int] = []

        def register(number: int, scope: CancelScope = scope, told: list[int] = told) -> None:
            scope.on_cancel(lambda: told.append(number))

        def cancel(
            number: int, scope: CancelScope = scope, errors: list[RequestCancelledError] = errors
        ) -> bool:
            return scope.cancel(errors[number])

        calls: list[Callable[[], object]] = []
        for number in range(8):
            calls.append(lambda n=number, cancel=cancel: cancel(n))
            calls.append(lambda n=number, register=register: register(n))
        runs = run_all(calls)
        winners = [n for n in range(8) if runs[2 * n].value]
        assert len(winners) == 1
        assert scope.error is errors[winners[0]]
        assert sorted(told) == list(range(8))


# DeadlineTimer


def test_deadlines_fire_in_order() -> None:
    """Scopes are cancelled in the order of their deadlines, whatever the order of watch."""
    timer = DeadlineTimer()
    fired: list[str] = []
    last = threading.Event()
    for name, deadline_s in [("c", 0.09), ("a", 0.01), ("b", 0.05)]:
        scope = CancelScope()
        scope.on_cancel(lambda name=name: fired.append(name))
        if name == "c":
            scope.on_cancel(last.set)
        timer.watch(scope, deadline_s)
    assert last.wait(BOUND_S)
    assert fired == ["a", "b", "c"]


def test_the_error_names_the_deadline() -> None:
    """The error is a DeadlineExceededError with the seconds in message and details."""
    timer = DeadlineTimer()
    scope = CancelScope()
    timer.watch(scope, NEAR_S)
    wait_until(lambda: scope.error)
    assert isinstance(scope.error, DeadlineExceededError)
    assert scope.error.details == {"deadline_s": NEAR_S}
    assert "0.02 s" in scope.error.message


def test_an_earlier_deadline_is_seen_while_waiting_for_a_later_one() -> None:
    """A near deadline that comes second still fires on time."""
    timer = DeadlineTimer()
    far, near = CancelScope(), CancelScope()
    timer.watch(far, FAR_S)
    timer.watch(near, NEAR_S)
    wait_until(lambda: near.error)
    assert far.error is None
    timer.forget(far)


@pytest.mark.parametrize("endless_s", [float("inf"), 1e12])
def test_an_endless_deadline_harms_nobody(endless_s: float) -> None:
    """A deadline beyond what a lock can wait for is watched, and others go on firing."""
    timer = DeadlineTimer()
    endless = CancelScope()
    timer.watch(endless, endless_s)
    for _ in range(3):
        near = CancelScope()
        timer.watch(near, NEAR_S)
        wait_until(lambda near=near: near.error)
    assert endless.error is None
    timer.forget(endless)


def test_a_forgotten_scope_is_left_alone() -> None:
    """forget takes back every deadline of that scope, of that scope only, and is idempotent."""
    timer = DeadlineTimer()
    forgotten, kept = CancelScope(), CancelScope()
    timer.watch(forgotten, NEAR_S)
    timer.watch(forgotten, 2 * NEAR_S)
    timer.watch(kept, 3 * NEAR_S)
    timer.forget(forgotten)
    timer.forget(forgotten)
    wait_until(lambda: kept.error)
    assert forgotten.error is None


def test_a_scope_that_ended_otherwise_keeps_its_error() -> None:
    """A deadline after a cancel changes nothing."""
    timer = DeadlineTimer()
    scope, after = CancelScope(), CancelScope()
    timer.watch(scope, NEAR_S)
    timer.watch(after, 2 * NEAR_S)
    scope.cancel(error())
    wait_until(lambda: after.error)
    assert isinstance(scope.error, RequestCancelledError)


def test_a_failing_callback_does_not_end_the_timer() -> None:
    """After a callback that raised, later deadlines still fire."""
    timer = DeadlineTimer()
    broken, after = CancelScope(), CancelScope()

    def callback() -> None:
        raise RuntimeError("broken callback")

    broken.on_cancel(callback)
    timer.watch(broken, NEAR_S)
    wait_until(lambda: broken.error)
    timer.watch(after, NEAR_S)
    wait_until(lambda: after.error)


def test_the_thread_ends_when_idle_and_comes_back(timer_threads: Threads) -> None:
    """Without pending deadlines the thread ends; the next watch starts another."""
    timer = DeadlineTimer()
    assert timer_threads() == 0
    for _ in range(3):
        scope = CancelScope()
        timer.watch(scope, 0.001)
        wait_until(lambda scope=scope: scope.error)
        wait_until(lambda: timer_threads() == 0)


def test_no_deadline_is_lost_when_the_thread_is_about_to_end(
    timer_threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deadlines that come just when the idle thread gives up still fire."""
    set_timer_idle_exit(monkeypatch, 0.0005)
    timer = DeadlineTimer()
    scopes = [CancelScope() for _ in range(300)]

    def watch(own: list[CancelScope]) -> None:
        for number, scope in enumerate(own):
            timer.watch(scope, 0.0001 * (number % 7))
            if number % 5 == 0:
                wait_until(lambda scope=scope: scope.error)

    runs = run_all([lambda n=n: watch(scopes[n::3]) for n in range(3)])
    for run in runs:
        run.join()
    wait_until(lambda: all(scope.error for scope in scopes))
    wait_until(lambda: timer_threads() == 0)


def test_a_deadline_that_comes_as_the_thread_gives_up_fires() -> None:
    """A deadline that comes between the end of the idle wait and the next look is not lost."""
    timer = DeadlineTimer()
    first, second = CancelScope(), CancelScope()

    def watch_second() -> None:
        if second.error is None:
            timer.watch(second, 0.001)

    at_idle_timeout(timer, lambda: first.error is not None, watch_second)
    timer.watch(first, 0.001)
    wait_until(lambda: second.error)


def test_a_thread_that_cannot_start_is_tried_again() -> None:
    """When the system refuses a thread, that watch fails and the next one starts it."""
    timer = DeadlineTimer()
    with no_more_threads(), pytest.raises(WorkerError, match="no more threads"):
        timer.watch(CancelScope(), FAR_S)
    near = CancelScope()
    timer.watch(near, NEAR_S)
    wait_until(lambda: near.error)


def test_a_fired_deadline_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waiting thread holds nothing of the request whose deadline fired last."""
    set_timer_idle_exit(monkeypatch, BOUND_S)
    timer = DeadlineTimer()
    scope = CancelScope()
    fired = threading.Event()
    scope.on_cancel(fired.set)
    timer.watch(scope, NEAR_S)
    gone = weakref.ref(scope)
    del scope
    assert fired.wait(BOUND_S)
    wait_until(lambda: gone() is None, BOUND_S / 2)


def test_at_most_one_timer_thread_runs(timer_threads: Threads) -> None:
    """Watching from many threads at once starts one thread."""
    timer = DeadlineTimer()
    scopes = [CancelScope() for _ in range(16)]
    run_all([lambda scope=scope: timer.watch(scope, FAR_S) for scope in scopes])
    assert timer_threads() == 1
    for scope in scopes:
        timer.forget(scope)
    wait_until(lambda: timer_threads() == 0)


def test_the_timer_runs_nobodys_code() -> None:
    """Callbacks run on another thread than the one that watches the deadlines."""
    timer = DeadlineTimer()
    names: list[str] = []
    for _ in range(3):
        scope = CancelScope()
        scope.on_cancel(lambda: names.append(threading.current_thread().name))
        timer.watch(scope, 0.001)
    wait_until(lambda: len(names) == 3)
    assert "orion-deadlines" not in names


def test_slow_callbacks_delay_no_deadline() -> None:
    """While the callbacks of others do not return, deadlines fire, and their callbacks run."""
    timer = DeadlineTimer()
    let_go = threading.Event()
    slow = [CancelScope() for _ in range(3)]
    try:
        for scope in slow:
            scope.on_cancel(lambda: let_go.wait(3 * BOUND_S))
            timer.watch(scope, 0.001)
        wait_until(lambda: all(scope.error for scope in slow))
        told = threading.Event()
        after = CancelScope()
        after.on_cancel(told.set)
        timer.watch(after, 0.001)
        assert told.wait(BOUND_S)
        assert not let_go.is_set()
    finally:
        let_go.set()


def test_a_failing_callback_of_a_deadline_stops_no_other() -> None:
    """The callbacks of one scope all run, on the thread that ends it, too."""
    timer = DeadlineTimer()
    scope, told = CancelScope(), threading.Event()

    def callback() -> None:
        raise RuntimeError("broken callback")

    scope.on_cancel(callback)
    scope.on_cancel(told.set)
    timer.watch(scope, 0.001)
    assert told.wait(BOUND_S)


def test_without_a_thread_for_callbacks_the_error_is_set() -> None:
    """While the system gives no more threads, requests see that their time is up; their callbacks
    run as soon as it gives one."""
    timer = DeadlineTimer()
    first = CancelScope()
    timer.watch(first, FAR_S)  # starts the timer
    scope, told = CancelScope(), threading.Event()
    scope.on_cancel(told.set)
    with no_more_threads():
        timer.watch(scope, 0.001)
        wait_until(lambda: scope.error)
        assert not told.is_set()
    assert told.wait(BOUND_S)
    timer.forget(first)


@pytest.mark.parametrize("order", [1, -1])
def test_many_forgotten_deadlines_are_not_kept(order: int) -> None:
    """What is forgotten, in any order, is let go; the others still fire."""
    timer = DeadlineTimer()
    scopes = [CancelScope() for _ in range(2000)]
    for number, scope in enumerate(scopes):
        timer.watch(scope, FAR_S + number)
    gone = [weakref.ref(scope) for scope in scopes[1:]]
    kept = scopes[0]
    for scope in scopes[1:][::order]:
        timer.forget(scope)
    del scope, scopes
    assert deadlines_of(timer) == [kept]
    assert all(reference() is None for reference in gone)
    near = CancelScope()
    timer.watch(near, NEAR_S)
    wait_until(lambda: near.error)
    timer.forget(kept)
