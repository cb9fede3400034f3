"""Several models end side by side, and each of them whatever happens to the others."""

import contextlib
import logging
import threading
from collections.abc import Callable

import pytest
from helpers import BOUND_S, Running, no_more_threads, wait_until
from pools import Holder, Model, World, spec

from orion_oie.cancellation import CancelScope
from orion_oie.errors import EngineClosedError
from orion_oie.pool.pool import ModelPool


@pytest.fixture
def world() -> World:
    return World()


def used(pool: ModelPool, *names: str) -> None:
    for name in names:
        with pool.acquire(spec(name), CancelScope()):
            pass


def pool_with(world: World, *names: str, **settings: object) -> ModelPool:
    """A pool with models in it, the least recently used first."""
    world.sizes = dict.fromkeys(names, 1)
    pool = ModelPool(world.load, size_of=world.size_of, budget_bytes=lambda: 3, **settings)
    used(pool, *names)
    return pool


def fails(error: BaseException) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise error

    return call


def close_and(model: Model, then: Callable[[], object]) -> None:
    """Have the close of a model do something after it has closed."""
    close = model.close

    def closing(timeout_s: float = 10.0) -> None:
        close(timeout_s)
        then()

    model.close = closing


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
@pytest.mark.parametrize("place", ["close", "event", "log"])
def test_every_victim_is_closed(
    world: World, monkeypatch: pytest.MonkeyPatch, place: str, kind: type[BaseException]
) -> None:
    """Whatever is raised while the first one is closed, or told; and the load goes on."""
    told: list[str] = []

    def on_evicted(key: str) -> None:
        told.append(key)
        if place != "close":
            raise kind("no")

    pool = pool_with(world, "a", "b", "c", on_evicted=on_evicted)
    if place == "close":
        for model in world.models:
            close_and(model, fails(kind("no")))
    if place == "log":
        monkeypatch.setattr(logging.getLogger("orion_oie"), "exception", fails(kind("no")))
    world.sizes["big"] = 3
    used(pool, "big")
    assert [model.is_closed for model in world.models] == [True, True, True, False]
    assert told == ["a@v", "b@v", "c@v"]
    assert list(pool.residents()) == ["big@v"]


def test_relief_closes_every_model(world: World) -> None:
    """And names those that it has freed."""
    pool = pool_with(world, "a", "b", on_evicted=fails(ValueError("no")))
    for model in world.models:
        close_and(model, fails(ValueError("no")))
    assert sorted(pool.relieve(2)) == ["a@v", "b@v"]
    assert world.alive == []
    assert pool.residents() == {}


def test_a_model_that_cannot_be_closed_leaves_the_pool(world: World) -> None:
    """It cannot be used any more, so the next request loads it again."""
    pool = pool_with(world, "a", on_changed=fails(ValueError("no")))
    close_and(world.models[0], fails(ValueError("no")))
    assert pool.unload("a@v")
    used(pool, "a")
    assert world.loads == ["a", "a"]


def together(world: World) -> None:
    """Have the close of each model end only when all others are being closed, too."""
    barrier = threading.Barrier(len(world.models))
    for model in world.models:
        close_and(model, lambda: barrier.wait(BOUND_S))


@pytest.mark.parametrize("end", ["close", "relief", "eviction"])
def test_models_are_closed_side_by_side(world: World, end: str) -> None:
    """It takes as long as the slowest of them."""
    pool = pool_with(world, "a", "b", "c")
    together(world)
    world.sizes["big"] = 3
    act = {
        "close": lambda: pool.close(BOUND_S),
        "relief": lambda: pool.relieve(3),
        "eviction": lambda: used(pool, "big"),
    }
    Running(act[end]).join()
    assert all(model.is_closed for model in world.models[:3])


def test_models_are_closed_without_threads(world: World) -> None:
    """One by one, all in the time that there is for one."""
    pool = pool_with(world, "a", "b", "c")
    given: list[float] = []
    for model in world.models:
        close = model.close
        model.close = lambda timeout_s, close=close: (given.append(timeout_s), close(timeout_s))
    with no_more_threads():
        pool.close(5.0)
    assert world.alive == []
    assert given == sorted(given, reverse=True)
    assert given[0] <= 5.0


def test_an_interrupt_comes_after_every_close(world: World) -> None:
    """Ctrl-C reaches the caller, and leaves no model behind."""
    pool = pool_with(world, "a", "b", "c")
    for model in world.models:
        close_and(model, fails(KeyboardInterrupt()))
    with no_more_threads(), pytest.raises(KeyboardInterrupt):
        pool.close(1.0)
    assert world.alive == []


def test_a_load_that_outlives_a_pool_whose_callback_raises(world: World) -> None:
    """It is closed all the same."""
    pool = ModelPool(world.load, on_changed=fails(ValueError("no")))
    gate = world.gate("a")
    world.is_deaf = True
    holder = Holder(pool, "a")
    wait_until(lambda: world.loads)
    pool.close(0.0)
    gate.set()
    wait_until(lambda: world.models and not world.alive)
    with contextlib.suppress(EngineClosedError):
        holder.let_go()


def test_an_abandoned_load_is_stopped_although_a_callback_raises(world: World) -> None:
    """The scope of the load is cancelled whatever the callback does."""
    pool = ModelPool(world.load, on_changed=fails(ValueError("no")))
    world.gate("a")
    holder = Holder(pool, "a")
    wait_until(lambda: world.loads)
    holder.cancel()
    wait_until(lambda: pool.residents() == {})
