"""A patient load waits for memory without standing in anybody's way."""

import threading

import pytest
from helpers import BOUND_S, Running, wait_until
from pools import Holder, World, spec, waiting_for_memory

from orion_oie.cancellation import CancelScope
from orion_oie.pool.pool import ModelPool
from orion_oie.schemas.availability import ModelState


@pytest.fixture
def world() -> World:
    return World()


def pool_of(world: World, budget: int, **more: object) -> ModelPool:
    return ModelPool(
        world.load,
        size_of=world.size_of,
        budget_bytes=lambda: budget,
        patience_s=0.0,
        **more,  # type: ignore[arg-type]
    )


def load(pool: ModelPool, name: str, scope: CancelScope, *, is_patient: bool = True) -> str:
    with pool.acquire(spec(name), scope, is_patient=is_patient) as lease:
        return lease.model.info.model_id


def patient(pool: ModelPool, name: str) -> tuple[Running, CancelScope]:
    """A patient load that waits for memory."""
    before = waiting_for_memory(pool)
    scope = CancelScope()
    running = Running(load, pool, name, scope)
    wait_until(lambda: waiting_for_memory(pool) == before + 1)
    return running, scope


def test_what_fits_is_loaded_beside_a_patient_load(world: World) -> None:
    """While a patient load waits for a model in use, others that fit are loaded at once, and so is
    another patient one; it gets its memory when it is free."""
    world.sizes = {"used": 6, "primary": 8, "lite": 1, "other": 1}
    pool = pool_of(world, 10)
    user = Holder(pool, "used")
    user.wait()
    primary, _ = patient(pool, "primary")
    lite = Holder(pool, "lite")
    lite.wait()
    assert Running(load, pool, "other", CancelScope()).join() == "other"
    lite.let_go()
    user.let_go()
    assert primary.join() == "primary"


def test_a_patient_load_takes_nothing_from_those_before_it(world: World) -> None:
    """Memory that somebody waits for is not given to a patient load that would fit into it."""
    world.sizes = {"used": 6, "big": 8, "small": 3}
    pool = pool_of(world, 10)
    user = Holder(pool, "used")
    user.wait()
    big = Holder(pool, "big")
    wait_until(lambda: waiting_for_memory(pool) == 1)
    small, scope = patient(pool, "small")
    user.let_go()
    big.wait()
    assert world.loads == ["used", "big"]
    big.let_go()
    small.join()
    assert scope.error is None


def test_nobody_waits_behind_what_waits_for_the_machine(world: World) -> None:
    """While the machine has no memory for a load, a model in memory answers all the same."""
    world.sizes = {"used": 1, "new": 1}
    is_short = threading.Event()
    pool = pool_of(world, 10, has_memory=lambda: not is_short.is_set(), pressure_wait_s=BOUND_S)
    first = Holder(pool, "used")
    first.wait()
    is_short.set()
    new = Holder(pool, "new")
    wait_until(lambda: waiting_for_memory(pool) == 1)
    second = Holder(pool, "used")
    second.wait()
    assert not new.holds
    is_short.clear()
    for one in (new, first, second):
        one.wait()
        one.let_go()


def test_a_model_that_is_being_loaded_is_told_from_one_in_memory(world: World) -> None:
    """It is ready, and its requests wait for it."""
    world.sizes = {"slow": 1}
    pool, gate = pool_of(world, 10), world.gate("slow")
    assert pool.idle_s() >= 0.0
    user = Holder(pool, "slow")
    wait_until(lambda: pool.availability(spec("slow").key, 1).is_arriving)
    assert pool.idle_s() == 0.0
    gate.set()
    user.wait()
    found = pool.availability(spec("slow").key, 1)
    assert (found.state, found.is_arriving) == (ModelState.READY, False)
    assert pool.idle_s() == 0.0
    user.let_go()
    wait_until(lambda: pool.idle_s() > 0.0)
