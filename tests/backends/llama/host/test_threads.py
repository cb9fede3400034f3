"""Cores are divided among the workers that compute, and each hears of its share in time."""

from dataclasses import replace
from pathlib import Path

from contracts import BOUND_S, INFO, Running, job
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.backends.base import LoadSpec
from orion_oie.backends.llama.host.loader import LlamaBackend, LoaderSettings
from orion_oie.backends.llama.host.threads import (
    ThreadAllocator,
    divide_cores,
)
from orion_oie.cancellation import CancelScope
from orion_oie.errors import RequestCancelledError
from orion_oie.hardware.machine import usable_cores
from orion_oie.schemas.loading import LoadProgress

LIMITS = st.lists(st.none() | st.integers(1, 16), max_size=12)


class Worker:
    """A worker that writes down what it was told."""

    def __init__(self, max_threads: int | None = None) -> None:
        self.max_threads = max_threads
        self.told: list[int] = []

    def use_threads(self, threads: int) -> None:
        self.told.append(threads)


@given(st.integers(1, 64), LIMITS)
def test_nobody_is_without_and_no_core_is_given_twice(cores: int, most: list[int | None]) -> None:
    """Each has a thread, nobody more than it may; together no more than there are cores, unless
    each has one only."""
    shares = divide_cores(cores, most)
    assert len(shares) == len(most)
    for share, limit in zip(shares, most, strict=True):
        assert 1 <= share <= (cores if limit is None else limit)
    assert all(share == 1 for share in shares) or sum(shares) <= cores


@given(st.integers(1, 64), LIMITS)
def test_no_core_is_idle_that_somebody_could_use(cores: int, most: list[int | None]) -> None:
    """What is left over is what nobody may use; shares differ by one at most, limits apart."""
    shares = divide_cores(cores, most)
    open_ = [s for s, limit in zip(shares, most, strict=True) if limit is None or s < limit]
    if sum(shares) < cores:
        assert not open_
    if open_:
        assert max(shares) - min(open_) <= 1


def test_a_lone_worker_has_all_and_gives_up_half() -> None:
    """Alone it computes with all cores; while another is active, with its share."""
    allocator = ThreadAllocator(4)
    first, second = Worker(), Worker()
    allocator.join(first)
    allocator.join(first)
    allocator.join(second)
    assert first.told == [4, 2]
    assert second.told == [2]
    allocator.leave(first)  # it still has another request
    assert second.told == [2]
    allocator.leave(first)
    assert second.told == [2, 4]


def test_what_did_not_change_is_not_told_again() -> None:
    """A worker that was idle and comes back to the same share hears nothing."""
    allocator = ThreadAllocator(2)
    worker = Worker()
    for _ in range(3):
        allocator.join(worker)
        allocator.leave(worker)
    assert worker.told == [2]


def test_what_one_may_not_use_goes_to_the_others() -> None:
    """A limit of the application's leaves more for those without one."""
    allocator = ThreadAllocator(8)
    bound, free = Worker(1), Worker()
    allocator.join(bound)
    allocator.join(free)
    assert (bound.told[-1], free.told[-1]) == (1, 7)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=60), st.integers(1, 8))
def test_the_sum_never_exceeds_the_cores(moves: list[tuple[int, bool]], cores: int) -> None:
    """Whatever comes and goes: what active workers were told last adds up to the cores at most,
    or each has one."""
    allocator = ThreadAllocator(cores)
    workers = [Worker() for _ in range(5)]
    uses = [0] * 5
    for which, is_join in moves:
        if is_join:
            allocator.join(workers[which])
            uses[which] += 1
        elif uses[which]:
            allocator.leave(workers[which])
            uses[which] -= 1
        shares = [w.told[-1] for w, count in zip(workers, uses, strict=True) if count]
        assert sum(shares) <= cores or set(shares) == {1}


def test_a_core_is_left_to_what_is_loaded() -> None:
    """While a worker is started or loaded, the others leave it a core, and take it back after."""
    allocator = ThreadAllocator(4)
    worker = Worker()
    allocator.join(worker)
    with allocator.one_core(), allocator.one_core():
        assert worker.told == [4, 3, 2]
    assert worker.told == [4, 3, 2, 3, 4]


def test_a_stream_leaves_a_core_to_a_load(tiny_model: Path) -> None:
    """A real worker that answers is told while another model is loaded beside it."""
    backend = LlamaBackend(LoaderSettings(is_adaptive=False))
    spec = LoadSpec(INFO, (tiny_model,))
    model = backend.load(spec, CancelScope(), lambda _progress: None)
    seen: set[int] = set()

    def look(_progress: LoadProgress) -> None:
        seen.add(model.occupancy().threads)

    try:
        stream = Running(model, job("Say something.", max_tokens=1500))
        stream.started.wait(BOUND_S)
        assert model.occupancy().threads == usable_cores()
        other = replace(spec, info=INFO.model_copy(update={"model_id": "other"}))
        backend.load(other, CancelScope(), look).close()
        assert max(1, usable_cores() - 1) in seen
        stream.scope.cancel(RequestCancelledError("enough"))
        stream.join()
    finally:
        model.close()


def test_two_real_workers_share_the_cores(tiny_model: Path) -> None:
    """Workers that answer at the same time have half of the cores each; alone, all of them."""
    backend = LlamaBackend(LoaderSettings(is_adaptive=False))
    specs = [LoadSpec(INFO.model_copy(update={"model_id": name}), (tiny_model,)) for name in "ab"]
    models = [backend.load(spec, CancelScope(), lambda _progress: None) for spec in specs]
    try:
        long = job("Say something.", max_tokens=1500)
        first = Running(models[0], long)
        first.started.wait(BOUND_S)
        assert models[0].occupancy().threads == usable_cores()
        second = Running(models[1], long)
        second.started.wait(BOUND_S)
        expected = divide_cores(usable_cores(), [None, None])
        assert [model.occupancy().threads for model in models] == expected
        second.scope.cancel(RequestCancelledError("enough"))
        second.join()
        assert models[0].occupancy().threads == usable_cores()
        first.scope.cancel(RequestCancelledError("enough"))
        first.join()
    finally:
        for model in models:
            model.close()
