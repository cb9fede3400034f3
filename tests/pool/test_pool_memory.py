"""The pool and bytes: never over its budget, never at the cost of who is using a model."""

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from helpers import run_all, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import Holder, World, spec, waiting_for_memory

from orion_oie.backends.base import LoadSpec
from orion_oie.cancellation import CancelScope
from orion_oie.errors import InsufficientMemoryError
from orion_oie.pool.entries import Lease
from orion_oie.pool.pool import ModelPool
from orion_oie.schemas.availability import Availability, ModelState

NAMES = "abcde"


def pool_of(
    world: World, budget_bytes: int | None, evicted: list[str] | None = None, **settings: object
) -> ModelPool:
    return ModelPool(
        world.load,
        None,
        on_evicted=[].append if evicted is None else evicted.append,
        size_of=world.size_of,
        budget_bytes=lambda: budget_bytes,
        **settings,
    )


def use(pool: ModelPool, name: str) -> Lease:
    """Acquire and release at once."""
    with pool.acquire(spec(name), CancelScope()) as lease:
        return lease


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for gate in world.gates.values():
        gate.set()


def test_models_share_the_budget_by_their_size(world: World) -> None:
    """As many stay as there is memory for, however many that is."""
    world.sizes = {"a": 60, "b": 30, "c": 10, "d": 5}
    pool = pool_of(world, 100)
    for name in "abc":
        use(pool, name)
    assert set(pool.residents()) == {"a@v", "b@v", "c@v"}
    assert use(pool, "d").evicted == ("a@v",)
    assert pool.reserved_bytes == 45


def test_the_fewest_models_go(world: World) -> None:
    """One that is large enough goes before two that are older."""
    world.sizes = {"a": 20, "b": 20, "c": 50, "d": 40}
    pool = pool_of(world, 100)
    for name in "abc":
        use(pool, name)
    assert use(pool, "d").evicted == ("c@v",)


def test_what_can_never_fit_is_refused_with_the_numbers(world: World) -> None:
    """A model larger than the budget fails at once, says what it needs, and evicts nobody."""
    world.sizes = {"a": 50, "b": 200 << 20}
    pool = pool_of(world, 100 << 20)
    use(pool, "a")
    with pytest.raises(InsufficientMemoryError, match=r"b@v needs 200 MiB.*budget is 100 MiB") as e:
        use(pool, "b")
    assert e.value.details["needed_bytes"] == 200 << 20
    assert e.value.details["budget_bytes"] == 100 << 20
    assert set(pool.residents()) == {"a@v"}


def test_a_pinned_model_stays(world: World) -> None:
    """Others make room before it; if only it could, the newcomer is refused and told why."""
    world.sizes = {"a": 60 << 20, "b": 30 << 20, "c": 40 << 20, "d": 50 << 20}
    pool = pool_of(world, 100 << 20)
    pool.pin("a@v")
    use(pool, "a")
    use(pool, "b")
    assert use(pool, "c").evicted == ("b@v",)
    with pytest.raises(InsufficientMemoryError, match=r"pinned are a@v \(60 MiB\)") as caught:
        use(pool, "d")
    assert caught.value.details["pinned"] == ["a@v"]
    pool.unpin("a@v")
    assert "a@v" in use(pool, "d").evicted


def test_a_newcomer_waits_for_who_is_in_use(world: World) -> None:
    """A model that would fit if a busy one were idle is loaded when it is."""
    world.sizes = {"a": 60, "b": 60}
    pool = pool_of(world, 100)
    busy = Holder(pool, "a")
    busy.wait()
    found = pool.availability("b@v", 60)
    assert (found.state, found.blockers) == (ModelState.BLOCKED, {"a@v"})
    newcomer = Holder(pool, "b")
    busy.let_go()
    assert newcomer.wait().evicted == ("a@v",)
    newcomer.let_go()


def test_who_waits_for_two_needs_both_to_stay_idle(world: World) -> None:
    """A large model waits for the one in use, and names the idle one that has to go as well: if
    that were used again meanwhile, there would never be room."""
    world.sizes = {"a": 45, "b": 45, "c": 90}
    pool = pool_of(world, 100)
    use(pool, "a")
    busy = Holder(pool, "b")
    busy.wait()
    found = pool.availability("c@v", 90)
    assert found == Availability(ModelState.BLOCKED, frozenset({"a@v"}), frozenset({"b@v"}))
    busy.let_go()


def test_nobody_takes_the_room_of_what_is_still_being_freed(world: World) -> None:
    """Memory counts as taken until the model that held it is gone."""
    world.sizes = {"a": 90, "b": 10, "c": 60}
    world.closing = threading.Event()
    pool = pool_of(world, 100)
    use(pool, "a")
    first = Holder(pool, "b")  # fits beside it
    first.wait()
    second = Holder(pool, "c")  # needs the place of a
    assert world.close_begun.wait(10)
    assert pool.reserved_bytes == 100
    third = Holder(pool, "a")
    assert world.loads == ["a", "b"]
    world.closing.set()
    second.wait()
    second.let_go()
    third.wait()
    third.let_go()
    first.let_go()
    assert world.most_bytes <= 100


def test_pressure_frees_idle_models_only(world: World) -> None:
    """Relief unloads the fewest idle models that give back enough, and tells of each."""
    world.sizes = {"a": 30, "b": 20, "c": 40}
    evicted: list[str] = []
    pool = pool_of(world, None, evicted)
    for name in "ab":
        use(pool, name)
    busy = Holder(pool, "c")
    busy.wait()
    assert pool.relieve(25) == ["a@v"]
    assert pool.relieve(1000) == ["b@v"]
    assert pool.relieve(1000) == []
    assert evicted == ["a@v", "b@v"]
    busy.let_go()


def test_a_model_that_grew_counts_for_what_it_takes(world: World) -> None:
    """What is measured goes over what was reserved, and what is too much then goes."""
    world.sizes = {"a": 40, "b": 40}
    pool = pool_of(world, 100)
    use(pool, "a")
    use(pool, "b")
    pool.note_size("b@v", 70)
    assert pool.reserved_bytes == 110
    assert pool.trim() == ["a@v"]
    pool.note_size("b@v", 10)  # it may come back to what was reserved
    assert pool.reserved_bytes == 70


def test_loads_wait_while_the_machine_has_no_memory(world: World) -> None:
    """What is in memory goes on answering; a load begins when there is memory again."""
    world.sizes = {"a": 1, "b": 1}
    has_memory = threading.Event()
    has_memory.set()
    pool = pool_of(world, None, has_memory=has_memory.is_set)
    use(pool, "a")
    has_memory.clear()
    waiting = Holder(pool, "b")
    use(pool, "a")
    assert pool.availability("b@v", 1).state is ModelState.SHORT
    assert world.loads == ["a"]
    has_memory.set()
    waiting.wait()
    waiting.let_go()


def test_a_load_does_not_wait_for_memory_for_ever(world: World) -> None:
    """After its patience it fails with the reason."""
    world.sizes = {"a": 1}
    pool = pool_of(world, None, has_memory=lambda: False, pressure_wait_s=0.01)
    with pytest.raises(InsufficientMemoryError, match="about to run out of memory"):
        use(pool, "a")


def test_a_size_that_cannot_be_found_is_the_callers_error(world: World) -> None:
    """What finding out the size raises comes out of acquire, and nothing is left behind."""

    def size_of(_spec: LoadSpec) -> int:
        raise ZeroDivisionError("no header")

    pool = ModelPool(world.load, None, size_of=size_of)
    with pytest.raises(ZeroDivisionError, match="no header"):
        use(pool, "a")
    assert pool.residents() == {}


@settings(max_examples=80, deadline=None)
@given(st.integers(20, 200), st.data())
def test_never_over_budget_and_never_at_a_users_cost(budget: int, data: st.DataObject) -> None:
    """After any uses, releases, crashes, pins and relief: together within the budget, nobody who
    uses a model loses it, and each miss is one load."""
    world = World()
    world.sizes = {name: data.draw(st.integers(1, 90)) for name in NAMES}
    pool = pool_of(world, budget)
    held: list[tuple[str, contextlib.ExitStack, Lease]] = []
    misses = 0

    def can_start(name: str) -> bool:
        found = pool.availability(f"{name}@v", world.sizes[name])
        return found.state in (ModelState.READY, ModelState.LOADABLE)

    for _ in range(data.draw(st.integers(0, 30))):
        action = data.draw(
            st.sampled_from(["acquire", "acquire", "release", "relieve", "crash", "pin", "unpin"])
        )
        name = data.draw(st.sampled_from(NAMES))
        if action == "acquire" and can_start(name):
            expected = pool.availability(f"{name}@v", world.sizes[name])
            stack = contextlib.ExitStack()
            lease = stack.enter_context(pool.acquire(spec(name), CancelScope()))
            misses += lease.is_cold
            assert lease.is_cold is (expected.state is ModelState.LOADABLE)
            assert set(lease.evicted) == expected.victims
            held.append((name, stack, lease))
        elif action == "release" and held:
            held.pop(data.draw(st.integers(0, len(held) - 1)))[1].close()
        elif action == "relieve":
            pool.relieve(data.draw(st.integers(1, 100)))
        elif action == "crash" and held:
            held[data.draw(st.integers(0, len(held) - 1))][2].model.crash()
        elif action == "pin":
            pool.pin(f"{name}@v")
        elif action == "unpin":
            pool.unpin(f"{name}@v")
        assert not any(lease.model.is_closed for _, _, lease in held)
        assert pool.reserved_bytes == world.alive_bytes <= budget
    assert world.most_bytes <= budget
    assert len(world.loads) == misses
    for _, stack, _ in held:
        stack.close()
    pool.close(0.0)


@pytest.mark.parametrize("seed", range(4))
def test_everybody_gets_a_turn(seed: int) -> None:
    """Many threads, sizes of all kinds, models that die while they are evicted: each request ends
    with its model, and memory stays within the budget all the while."""
    world = World()
    dice = random.Random(seed)
    world.sizes = {name: dice.randrange(10, 60) for name in NAMES}
    pool = pool_of(world, 100, patience_s=0.02)
    outcomes: Counter[str] = Counter()

    def work(worker: int) -> None:
        mine = random.Random(seed * 100 + worker)
        for _ in range(40):
            name = mine.choice(NAMES)
            with pool.acquire(spec(name), CancelScope()) as lease:
                assert not lease.model.is_closed
                threading.Event().wait(mine.random() / 2000)
                assert not lease.model.is_closed
                if mine.random() < 0.05:
                    lease.model.crash()
            outcomes[name] += 1

    for run in run_all([lambda n=n: work(n) for n in range(8)]):
        run.join()
    assert outcomes.total() == 320
    assert world.most_bytes <= 100
    pool.close(0.0)
    assert world.alive == []


def test_a_request_that_waits_for_memory_can_be_cancelled(world: World) -> None:
    """A request that waits for memory notices when its owner cancels it."""
    world.sizes = {"a": 1}
    pool = pool_of(world, None, has_memory=lambda: False)
    holder = Holder(pool, "a")
    wait_until(lambda: waiting_for_memory(pool))
    holder.cancel()
