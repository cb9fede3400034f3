"""Loads in the background happen once, and their futures always end."""

import threading

import pytest
from helpers import BOUND_S, no_more_threads, wait_until
from pools import World, spec

from orion_oie import WorkerCrashedError, WorkerError
from orion_oie.pool.background import BackgroundLoader, run_in_background
from orion_oie.pool.pool import ModelPool


def test_a_result_and_an_error_reach_the_future() -> None:
    """What the function returns or raises, whatever it is."""
    assert run_in_background(lambda: 7, "test").result(BOUND_S) == 7
    with pytest.raises(ZeroDivisionError):
        run_in_background(lambda: 1 // 0, "test").result(BOUND_S)

    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run_in_background(leave, "test").result(BOUND_S)


def test_without_threads_the_future_says_so() -> None:
    """The caller goes on; nothing hangs."""
    with no_more_threads():
        future = run_in_background(lambda: 7, "test")
    with pytest.raises(WorkerError, match="no more threads"):
        future.result(BOUND_S)


def test_the_thread_has_its_name() -> None:
    """A stack dump says what a thread is for."""
    name = run_in_background(lambda: threading.current_thread().name, "orion-test")
    assert name.result(BOUND_S) == "orion-test"


def test_a_model_is_loaded_once_and_not_held() -> None:
    """Who asks while it is on its way gets the same future; afterwards nobody uses the model."""
    world = World()
    world.gates["a"] = threading.Event()
    pool = ModelPool(world.load)
    loader = BackgroundLoader(pool)
    first = loader.load(spec("a"))
    wait_until(lambda: world.loads == ["a"])
    assert loader.load(spec("a")) is first
    world.gates["a"].set()
    assert first.result(BOUND_S).model_id == "a"
    wait_until(lambda: pool.residents()["a@v"].users == 0)
    assert loader.load(spec("a")).result(BOUND_S).model_id == "a"
    assert world.loads == ["a"]


def test_a_failed_load_is_tried_again() -> None:
    """The next one who asks has it loaded anew."""
    world = World()
    world.errors["a"] = [WorkerCrashedError("it died")]
    loader = BackgroundLoader(ModelPool(world.load))
    with pytest.raises(WorkerCrashedError):
        loader.load(spec("a")).result(BOUND_S)
    assert loader.load(spec("a")).result(BOUND_S).model_id == "a"
