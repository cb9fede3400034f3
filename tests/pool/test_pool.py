"""The pool loads once, frees nothing that is in use, holds no more than it may, never hangs."""

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from helpers import BOUND_S, Running, no_more_threads, run_all, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from internals import callbacks_of
from pools import Holder, World, spec, waiting_for_memory

from orion_oie.backends.base import GenerationJob
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.cancellation import CancelScope
from orion_oie.errors import (
    EngineClosedError,
    ModelCorruptError,
    RequestCancelledError,
    WorkerCrashedError,
    WorkerError,
)
from orion_oie.pool.entries import Lease
from orion_oie.pool.pool import ModelPool


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for gate in world.gates.values():
        gate.set()


def pool_of(world: World, max_models: int = 2, evicted: list[str] | None = None) -> ModelPool:
    return ModelPool(
        world.load, max_models, on_evicted=[].append if evicted is None else evicted.append
    )


def use(pool: ModelPool, name: str) -> Lease:
    """Acquire and release at once."""
    with pool.acquire(spec(name), CancelScope()) as lease:
        return lease


def users(pool: ModelPool, name: str) -> int:
    resident = pool.residents().get(f"{name}@v")
    return 0 if resident is None else resident.users


# Loading


def test_the_first_use_loads_and_the_second_does_not(world) -> None:
    """A model is loaded for its first lease and kept for the next ones."""
    pool = pool_of(world)
    first, second = use(pool, "a"), use(pool, "a")
    assert world.loads == ["a"]
    assert first.model is second.model
    assert first.is_cold
    assert not second.is_cold


def test_many_at_once_load_once(world) -> None:
    """Threads that ask for one model at the same time share one load, all of them cold."""
    pool = pool_of(world)
    gate = world.gate("a")
    holders = [Holder(pool, "a") for _ in range(12)]
    wait_until(lambda: users(pool, "a") == 12)
    assert pool.residents()["a@v"].is_loading
    gate.set()
    leases = [holder.wait() for holder in holders]
    assert world.loads == ["a"]
    assert len({id(lease.model) for lease in leases}) == 1
    assert all(lease.is_cold for lease in leases)
    for holder in holders:
        holder.let_go()
    assert users(pool, "a") == 0
    assert not pool.residents()["a@v"].is_loading


def test_different_models_load_at_the_same_time(world) -> None:
    """The load of one model does not hold up that of another."""
    pool = pool_of(world)
    world.gate("slow")
    slow, quick = Holder(pool, "slow"), Holder(pool, "quick")
    quick.wait()
    assert not slow.holds
    quick.let_go()
    world.gates["slow"].set()
    slow.wait()
    slow.let_go()


def test_progress_reaches_everyone_who_waits(world) -> None:
    """Whoever waits for a load hears its progress, rising, also a late joiner."""
    pool = pool_of(world)
    gate = world.gate("a")
    first = Holder(pool, "a")
    wait_until(lambda: 0.5 in first.progress)
    second = Holder(pool, "a")
    wait_until(lambda: 0.5 in second.progress)
    gate.set()
    for holder in (first, second):
        holder.wait()
        holder.let_go()
        assert holder.progress == sorted(holder.progress)


def test_a_failing_progress_callback_fails_its_own_request_only(world) -> None:
    """What on_progress raises comes out of that acquire; others get their lease."""
    pool = pool_of(world)
    gate = world.gate("a")
    other = Holder(pool, "a")
    wait_until(lambda: users(pool, "a") == 1)

    def on_progress(_fraction: float) -> None:
        raise RuntimeError("broken progress")

    with (
        pytest.raises(RuntimeError, match="broken progress"),
        pool.acquire(spec("a"), CancelScope(), on_progress),
    ):
        pass
    gate.set()
    other.wait()
    assert users(pool, "a") == 1
    other.let_go()


def test_a_failed_load_fails_everyone_and_is_not_remembered(world) -> None:
    """The error of a load reaches all who wait for it; the next request loads again."""
    pool = pool_of(world)
    gate = world.gate("a")
    world.errors["a"] = [ModelCorruptError("bad file")]
    holders = [Holder(pool, "a") for _ in range(4)]
    wait_until(lambda: users(pool, "a") == 4)
    gate.set()
    for holder in holders:
        assert isinstance(holder.fails(), ModelCorruptError)
    assert pool.residents() == {}
    assert use(pool, "a").is_cold
    assert world.loads == ["a", "a"]


def test_a_bug_in_a_load_reaches_the_caller(world) -> None:
    """Any exception of a load comes out of acquire and does no further harm."""
    pool = pool_of(world)
    world.errors["a"] = [ZeroDivisionError("bug")]
    with pytest.raises(ZeroDivisionError, match="bug"):
        use(pool, "a")
    use(pool, "a")


def test_a_refused_thread_leaves_the_pool_as_it_was(world) -> None:
    """When the system gives no thread for a load, acquire fails, nothing is evicted or stuck."""
    pool = pool_of(world, max_models=1)
    use(pool, "a")
    with no_more_threads(), pytest.raises(WorkerError, match="no more threads"):
        use(pool, "b")
    assert list(pool.residents()) == ["a@v"]
    assert Running(use, pool, "b").join().is_cold


def test_a_crashed_model_is_loaded_again(world) -> None:
    """A dead model is not given out; leases that hold it keep it without harm."""
    pool = pool_of(world)
    old = Holder(pool, "a")
    dead = old.wait().model
    dead.crash()
    assert pool.residents() == {}
    lease = use(pool, "a")
    assert lease.model is not dead
    assert lease.is_cold
    old.let_go()
    assert users(pool, "a") == 0
    assert use(pool, "a").model is lease.model
    assert world.loads == ["a", "a"]


# Room


def test_the_least_recently_used_makes_room(world) -> None:
    """The idle model whose last use ended longest ago goes first, and the lease says so."""
    evicted: list[str] = []
    pool = pool_of(world, max_models=2, evicted=evicted)
    long_user = Holder(pool, "a")
    long_user.wait()
    use(pool, "b")
    long_user.let_go()
    lease = use(pool, "c")
    assert lease.evicted == ("b@v",)
    assert evicted == ["b@v"]
    assert set(pool.residents()) == {"a@v", "c@v"}
    assert world.most == 2
    use(pool, "a")
    assert use(pool, "d").evicted == ("c@v",)


def test_an_evicted_model_is_closed_before_the_next_is_loaded(world) -> None:
    """There are never more models in memory than allowed, not even for a moment."""
    pool = pool_of(world, max_models=1)
    for name in "abcab":
        use(pool, name)
    assert world.most == 1
    assert len(world.alive) == 1


def test_what_is_in_use_is_never_evicted(world) -> None:
    """While all are in use the next waits, and goes on as soon as one is released."""
    pool = pool_of(world, max_models=2)
    a = Holder(pool, "a")
    model_a = a.wait().model
    b = Holder(pool, "b")
    model_b = b.wait().model
    c = Holder(pool, "c")
    second_a = Holder(pool, "a")
    second_a.wait()
    assert not c.holds
    assert world.loads == ["a", "b"]
    a.let_go()
    assert not c.holds
    b.let_go()
    assert c.wait().evicted == ("b@v",)
    assert model_a.is_alive()
    assert model_b.is_closed
    second_a.let_go()
    c.let_go()


def test_a_loading_model_is_not_evicted(world) -> None:
    """A load on its way counts as in use."""
    pool = pool_of(world, max_models=1)
    gate = world.gate("a")
    a = Holder(pool, "a")
    wait_until(lambda: world.loads == ["a"])
    b = Holder(pool, "b")
    a_too = Holder(pool, "a")
    wait_until(lambda: users(pool, "a") == 2)
    assert world.loads == ["a"]
    gate.set()
    for holder in (a, a_too):
        holder.wait()
        holder.let_go()
    b.wait()
    b.let_go()
    assert world.most == 1


def test_a_dead_model_takes_no_room(world) -> None:
    """A crashed model makes room before any living one is evicted."""
    evicted: list[str] = []
    pool = pool_of(world, max_models=2, evicted=evicted)
    use(pool, "a")
    use(pool, "b").model.crash()
    use(pool, "c")
    assert evicted == []
    assert set(pool.residents()) == {"a@v", "c@v"}


def test_a_dead_model_in_use_takes_no_room(world) -> None:
    """A crashed model does not make others wait for those who still hold it."""
    pool = pool_of(world, max_models=1)
    holder = Holder(pool, "a")
    holder.wait().model.crash()
    Running(use, pool, "b").join()
    holder.let_go()


# Cancelling


def test_a_cancelled_waiter_leaves_the_load_to_the_others(world) -> None:
    """Cancelling one of those who wait ends only its own wait."""
    pool = pool_of(world)
    gate = world.gate("a")
    stays, goes = Holder(pool, "a"), Holder(pool, "a")
    wait_until(lambda: users(pool, "a") == 2)
    goes.cancel()
    assert users(pool, "a") == 1
    gate.set()
    stays.wait()
    assert world.loads == ["a"]
    stays.let_go()


def test_a_load_nobody_waits_for_is_stopped(world) -> None:
    """When the last waiter leaves, the load is cancelled; a later request loads again."""
    pool = pool_of(world)
    world.gate("a")
    first, second = Holder(pool, "a"), Holder(pool, "a")
    wait_until(lambda: users(pool, "a") == 2)
    first.cancel()
    second.cancel()
    wait_until(lambda: pool.residents() == {})
    assert world.models == []
    assert Running(use, pool, "a").join().is_cold
    assert world.loads == ["a", "a"]


def test_a_load_that_ends_although_it_was_abandoned_can_be_used(world) -> None:
    """A load that completes after its last waiter left is kept, and serves the next request."""
    world.is_deaf = True
    pool = pool_of(world)
    gate = world.gate("a")
    first = Holder(pool, "a")
    wait_until(lambda: world.loads == ["a"])
    first.cancel()
    second = Holder(pool, "a")
    gate.set()
    lease = second.wait()
    assert lease.model.is_alive()
    second.let_go()
    assert world.loads == ["a"]
    use(pool, "a")


def test_a_request_waits_while_an_abandoned_load_ends(world) -> None:
    """A request for a model whose load is being stopped waits and then starts its own."""
    world.is_deaf = True
    pool = pool_of(world)
    gate = world.gate("a")
    world.errors["a"] = [RequestCancelledError("stopped at last")]
    first = Holder(pool, "a")
    wait_until(lambda: world.loads == ["a"])
    first.cancel()
    second = Holder(pool, "a")
    gate.set()
    second.wait()
    second.let_go()
    assert world.loads == ["a", "a"]


def test_a_cancel_ends_the_wait_for_room(world) -> None:
    """Cancelling ends the wait for room and starts no load."""
    pool = pool_of(world, max_models=1)
    holder = Holder(pool, "a")
    holder.wait()
    waiting = Holder(pool, "b")
    waiting.cancel()
    assert world.loads == ["a"]
    holder.let_go()


def test_a_cancelled_scope_gets_nothing(world) -> None:
    """A scope that was cancelled before raises its error and loads nothing."""
    pool = pool_of(world)
    scope = CancelScope()
    scope.cancel(RequestCancelledError("before"))
    with pytest.raises(RequestCancelledError, match="before"), pool.acquire(spec("a"), scope):
        pass
    assert world.loads == []


def test_a_lease_leaves_no_callback_behind(world) -> None:
    """Neither a held nor a released lease is told of a cancel."""
    pool = pool_of(world)
    scope = CancelScope()
    with pool.acquire(spec("a"), scope):
        assert not callbacks_of(scope)
    assert not callbacks_of(scope)


# Unloading


def test_an_idle_model_can_be_unloaded(world) -> None:
    """unload frees an idle model once; it says False for one that is not there."""
    pool = pool_of(world)
    model = use(pool, "a").model
    assert pool.unload("a@v") is True
    assert model.is_closed
    assert pool.residents() == {}
    assert pool.unload("a@v") is False
    assert pool.unload("never@v") is False


def test_a_used_or_loading_model_is_not_unloaded(world) -> None:
    """unload says False while a model is in use or on its way."""
    pool = pool_of(world)
    gate = world.gate("a")
    holder = Holder(pool, "a")
    wait_until(lambda: world.loads == ["a"])
    assert pool.unload("a@v") is False
    gate.set()
    lease = holder.wait()
    assert pool.unload("a@v") is False
    assert lease.model.is_alive()
    holder.let_go()
    assert pool.unload("a@v") is True


def test_unloading_makes_room_for_those_who_wait(world) -> None:
    """A model that is being freed takes its room until it is gone, then others go on."""
    pool = pool_of(world, max_models=1)
    use(pool, "a")
    world.closing = threading.Event()
    unloading = Running(pool.unload, "a@v")
    assert world.close_begun.wait(BOUND_S)
    other, same = Holder(pool, "b"), Holder(pool, "a")
    assert pool.unload("a@v") is False
    assert world.loads == ["a"]
    world.closing.set()
    assert unloading.join() is True
    wait_until(lambda: other.holds or same.holds)
    first, second = (other, same) if other.holds else (same, other)
    first.let_go()
    second.wait()
    second.let_go()
    assert world.most == 1


# Waiting in line


def test_users_of_what_is_in_memory_may_overtake(world) -> None:
    """While somebody waits for room, a model in memory serves on: waiting would help nobody yet."""
    pool = ModelPool(world.load, 1, patience_s=BOUND_S * 10)
    first = Holder(pool, "a")
    first.wait()
    waiter = Holder(pool, "c")
    wait_until(lambda: waiting_for_memory(pool) == 1)
    second = Holder(pool, "a")
    second.wait()
    first.let_go()
    assert not waiter.holds
    second.let_go()
    waiter.wait()
    waiter.let_go()


def test_nobody_waits_for_room_forever(world) -> None:
    """When patience is over, later users of what is in memory wait, and the line moves on."""
    pool = ModelPool(world.load, 1, patience_s=0.0)
    first = Holder(pool, "a")
    first.wait()
    waiter = Holder(pool, "c")
    wait_until(lambda: waiting_for_memory(pool) == 1)
    second = Holder(pool, "a")
    first.let_go()
    waiter.wait()
    assert not second.holds
    waiter.let_go()
    second.wait()
    second.let_go()
    assert world.loads == ["a", "c", "a"]
    assert world.most == 1


def test_steady_traffic_starves_nobody(world) -> None:
    """Two models in overlapping use all the time: a request for a third one is served."""
    pool = ModelPool(world.load, 2, patience_s=0.01)
    is_over = threading.Event()

    def traffic(name: str) -> None:
        while not is_over.is_set():
            with pool.acquire(spec(name), CancelScope()):
                is_over.wait(0.002)

    threads = [Running(traffic, name) for name in "aabb" for _ in range(2)]
    wait_until(lambda: {"a", "b"} <= set(world.loads))
    third = Holder(pool, "c")
    third.wait()
    third.let_go()
    is_over.set()
    for thread in threads:
        thread.join()
    assert world.most == 2


# Closing


def test_closing_frees_everything(world) -> None:
    """close frees idle and used models; acquire then raises EngineClosedError."""
    pool = pool_of(world)
    idle = use(pool, "a").model
    holder = Holder(pool, "b")
    used = holder.wait().model
    pool.close(0.0)
    assert idle.is_closed
    assert used.is_closed
    holder.let_go()
    with pytest.raises(EngineClosedError):
        use(pool, "a")
    assert pool.residents() == {}
    pool.close(0.0)


def test_closing_ends_loads_and_waits(world) -> None:
    """Those who wait for a load or for room get EngineClosedError."""
    pool = pool_of(world, max_models=1)
    world.gate("a")
    loading = Holder(pool, "a")
    wait_until(lambda: world.loads == ["a"])
    waiting = Holder(pool, "b")
    pool.close(0.0)
    assert isinstance(loading.fails(), EngineClosedError)
    assert isinstance(waiting.fails(), EngineClosedError)
    assert world.alive == []


def test_a_load_that_outlives_the_pool_is_freed(world) -> None:
    """A load that completes after close is closed again."""
    world.is_deaf = True
    pool = pool_of(world)
    gate = world.gate("a")
    holder = Holder(pool, "a")
    wait_until(lambda: world.loads == ["a"])
    pool.close(0.0)
    gate.set()
    wait_until(lambda: world.models and world.models[0].is_closed)
    with contextlib.suppress(EngineClosedError):
        holder.let_go()


# Everything at once


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.data())
def test_any_sequence_agrees_with_a_plain_cache(max_models: int, data: st.DataObject) -> None:
    """After any uses, releases, unloads and crashes the pool holds what an LRU cache would."""
    world = World()
    pool = pool_of(world, max_models)
    oracle: dict[str, None] = {}  # idle and used models, least recently used first
    held: list[tuple[str, contextlib.ExitStack, Lease]] = []

    def used() -> set[str]:
        return {name for name, _, lease in held if lease.model.is_alive()}

    for _ in range(data.draw(st.integers(0, 25))):
        action = data.draw(st.sampled_from(["acquire", "acquire", "release", "unload", "crash"]))
        name = data.draw(st.sampled_from("abcd"))
        if action == "acquire" and (name in oracle or len(used()) < max_models):
            stack = contextlib.ExitStack()
            lease = stack.enter_context(pool.acquire(spec(name), CancelScope()))
            assert lease.is_cold == (name not in oracle)
            assert lease.model.is_alive()
            evicted = []
            if name not in oracle and len(oracle) == max_models:
                evicted = [next(n for n in oracle if n not in used())]
                del oracle[evicted[0]]
            assert lease.evicted == tuple(f"{n}@v" for n in evicted)
            oracle.setdefault(name)
            held.append((name, stack, lease))
        elif action == "release" and held:
            name, stack, lease = held.pop(data.draw(st.integers(0, len(held) - 1)))
            stack.close()
            if lease.model.is_alive():
                del oracle[name]
                oracle[name] = None
        elif action == "unload":
            expected = name in oracle and name not in used()
            assert pool.unload(f"{name}@v") is expected
            if expected:
                del oracle[name]
        elif action == "crash" and name in oracle:
            next(model for model in world.alive if model.info.model_id == name).crash()
            del oracle[name]
        assert set(pool.residents()) == {f"{n}@v" for n in oracle}
        assert sorted(model.info.model_id for model in world.alive) == sorted(oracle)
    for _, stack, _ in held:
        stack.close()
    assert world.most <= max_models
    pool.close(0.0)
    assert world.alive == []


@pytest.mark.parametrize("seed", range(4))
def test_many_threads_break_nothing(seed: int) -> None:
    """With uses, cancels, crashes, failing loads and unloads at once, no lease sees a closed
    model, no more than allowed are loaded, everybody ends and nobody is counted any more."""
    world = World()
    max_models = 2 if seed % 2 else 3
    pool = pool_of(world, max_models)
    outcomes: Counter[str] = Counter()
    world.errors = {"d": [ModelCorruptError("bad") for _ in range(20)]}

    def work(worker: int) -> None:
        dice = random.Random(seed * 100 + worker)
        for _ in range(60):
            name = dice.choice("abcde")
            scope = CancelScope()
            if dice.random() < 0.25:
                threading.Timer(
                    dice.random() / 500, scope.cancel, [RequestCancelledError("enough")]
                ).start()
            try:
                with pool.acquire(spec(name), scope) as lease:
                    assert not lease.model.is_closed
                    if dice.random() < 0.05:
                        lease.model.crash()
                    for _ in range(dice.randrange(3)):
                        threading.Event().wait(0.0005)
                    assert not lease.model.is_closed
                outcomes["used"] += 1
            except (RequestCancelledError, ModelCorruptError) as error:
                outcomes[type(error).__name__] += 1
            if dice.random() < 0.1:
                pool.unload(f"{dice.choice('abcde')}@v")

    for run in run_all([lambda n=n: work(n) for n in range(8)]):
        run.join()
    assert world.most <= max_models
    assert outcomes["used"] > 100
    wait_until(lambda: not any(resident.is_loading for resident in pool.residents().values()))
    assert [resident.users for resident in pool.residents().values() if resident.users] == []
    for name in "abce":
        Running(use, pool, name).join()
    pool.close(0.0)
    assert world.alive == []


def test_the_fake_backend_fits(world) -> None:
    """A pool over a real backend gives models that answer."""
    pool = ModelPool(FakeBackend({"a": FakeAnswer("Yes.")}).load, 1)
    with pool.acquire(spec("a"), CancelScope()) as lease:
        seen: list[str] = []
        lease.model.generate(GenerationJob(()), CancelScope(), lambda text, _n: seen.append(text))
        assert seen == ["Yes."]
    with pool.acquire(spec("a"), CancelScope()) as lease:
        lease.model.crash()
        with pytest.raises(WorkerCrashedError):
            lease.model.generate(GenerationJob(()), CancelScope(), lambda _t, _n: None)
