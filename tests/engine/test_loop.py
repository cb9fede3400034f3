"""Asynchronous callers are woken by threads, all of them, and once for many."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import Future
from contextlib import suppress

import pytest
from helpers import BOUND_S
from interrupts import Interrupted

from orion_oie.engine.loop import LoopWaker, wait_for


def ended_by_threads(futures: list["Future[int]"], threads: int) -> list[threading.Thread]:
    """Threads that end the futures, each its share, with their numbers."""

    def end(start: int) -> None:
        for number in range(start, len(futures), threads):
            futures[number].set_result(number)

    started = [threading.Thread(target=end, args=(n,), daemon=True) for n in range(threads)]
    for thread in started:
        thread.start()
    return started


def test_every_waiter_gets_its_result() -> None:
    """However many end at the same time on however many threads."""
    futures: list[Future[int]] = [Future() for _ in range(2000)]

    async def gather() -> list[int]:
        waiting = [asyncio.ensure_future(wait_for(future)) for future in futures]
        await asyncio.sleep(0)
        ended_by_threads(futures, 4)
        return await asyncio.wait_for(asyncio.gather(*waiting), BOUND_S)

    assert asyncio.run(gather()) == list(range(2000))


def test_what_ended_before_needs_no_wait() -> None:
    """A result or an error that is there comes at once."""
    done: Future[int] = Future()
    done.set_result(7)
    failed: Future[int] = Future()
    failed.set_exception(ValueError("no"))
    assert asyncio.run(wait_for(done)) == 7
    with pytest.raises(ValueError, match="no"):
        asyncio.run(wait_for(failed))


def test_a_cancelled_waiter_leaves_the_others() -> None:
    """Its future goes on, and may end without anybody."""
    first: Future[int] = Future()
    second: Future[int] = Future()

    async def run() -> int:
        cancelled = asyncio.ensure_future(wait_for(first))
        waiting = asyncio.ensure_future(wait_for(second))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.sleep(0)
        assert cancelled.cancelled()
        ended_by_threads([first, second], 1)
        return await asyncio.wait_for(waiting, BOUND_S)

    assert asyncio.run(run()) == 1


def test_every_loop_has_its_own() -> None:
    """Two event loops on two threads wait for one future, one after the other ends unused."""
    future: Future[int] = Future()
    results: list[int] = []
    begun = threading.Barrier(3)

    async def wait() -> None:
        task = asyncio.ensure_future(wait_for(future))
        await asyncio.sleep(0)
        await asyncio.to_thread(begun.wait, BOUND_S)
        results.append(await asyncio.wait_for(task, BOUND_S))

    threads = [threading.Thread(target=lambda: asyncio.run(wait()), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    begun.wait(BOUND_S)
    future.set_result(3)
    for thread in threads:
        thread.join(BOUND_S)
    assert results == [3, 3]


def test_a_closed_loop_is_no_trouble() -> None:
    """A request may end when the loop that waited for it is gone."""
    future: Future[int] = Future()

    async def leave() -> None:
        task = asyncio.ensure_future(wait_for(future))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())
    future.set_result(1)
    loop = asyncio.new_event_loop()
    waker, waiter = LoopWaker(loop), loop.create_future()
    loop.close()
    waker.wake(waiter)
    assert not waiter.done()


def test_an_interrupted_wake_leaves_the_next_ones_going() -> None:
    """At every point of it, and of the loop's own part: a loop may be run again."""
    loop = asyncio.new_event_loop()

    async def wait(at: int | None) -> int:
        future: Future[int] = Future()
        with suppress(KeyboardInterrupt), Interrupted(at) as interrupted:
            loop.call_soon(future.set_result, 1)
            await wait_for(future)
        return interrupted.count

    points = loop.run_until_complete(wait(None))
    assert points > 5
    for at in range(1, points + 1):
        with suppress(KeyboardInterrupt):
            loop.run_until_complete(wait(at))
        loop.run_until_complete(asyncio.wait_for(wait(None), BOUND_S))
    loop.close()


def test_a_loop_that_is_over_is_let_go() -> None:
    """Programs run one event loop after the other; requests that outlive theirs keep none."""
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []
    futures: list[Future[int]] = []

    async def leave() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        future: Future[int] = Future()
        futures.append(future)
        task = asyncio.ensure_future(wait_for(future))
        await asyncio.sleep(0)
        task.cancel()

    for _ in range(10):
        asyncio.run(leave())
        futures.pop().set_result(1)
    gc.collect()
    assert [loop for loop in loops if loop() is not None] == []
