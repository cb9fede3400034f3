"""The queue serves in order, within its limits, and loses nothing."""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from helpers import BOUND_S, Running, no_more_threads, run_all, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie import scheduling
from orion_oie.errors import EngineClosedError, QueueFullError
from orion_oie.scheduling import RequestQueue


class Item:
    """Something to serve; equal to nothing else."""

    def __init__(self, name: object = "") -> None:
        self.name = name


class Gate:
    """Serves items, each only after the gate was opened; notes which and how many at once."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.served: list[Item] = []
        self.running = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, item: Item) -> None:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.served.append(item)
        assert self.opened.wait(BOUND_S)
        with self._lock:
            self.running -= 1

    @property
    def names(self) -> list[object]:
        return [item.name for item in self.served]


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the serving threads of the test; they end soon when idle."""
    monkeypatch.setattr(scheduling, "_IDLE_EXIT_S", 0.01)
    before = set(threading.enumerate())

    def count() -> int:
        return sum(t.name.startswith("orion-request") for t in set(threading.enumerate()) - before)

    return count


def busy_queue(gate: Gate, *, limit: int = 100, concurrency: int = 1) -> RequestQueue[Item]:
    """A queue all of whose threads are held by the gate."""
    queue: RequestQueue[Item] = RequestQueue(gate, limit=limit, concurrency=concurrency)
    for _ in range(concurrency):
        queue.put(Item("blocker"))
    wait_until(lambda: gate.running == concurrency)
    gate.served.clear()
    return queue


# Order


def test_first_come_first_served(gate) -> None:
    """Items of one priority are served in the order in which they came."""
    queue = busy_queue(gate)
    for name in range(20):
        queue.put(Item(name))
    gate.opened.set()
    wait_until(lambda: len(gate.served) == 20)
    assert gate.names == list(range(20))


def test_higher_priority_first(gate) -> None:
    """A higher priority overtakes what waits, not what runs."""
    queue = busy_queue(gate)
    for name, priority in [("low", -1), ("a", 0), ("high", 5), ("b", 0), ("top", 9)]:
        queue.put(Item(name), priority)
    gate.opened.set()
    wait_until(lambda: len(gate.served) == 5)
    assert gate.names == ["top", "high", "a", "b", "low"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=25), st.data())
def test_order_for_any_priorities_and_removals(priorities: list[int], data: st.DataObject) -> None:
    """What is left after any removals is served by priority, then by arrival, each once."""
    # Drawn before anything runs: a draw may end the example.
    goes = data.draw(st.lists(st.booleans(), min_size=len(priorities), max_size=len(priorities)))
    gate = Gate()
    queue = busy_queue(gate)
    items = [Item((-priority, number)) for number, priority in enumerate(priorities)]
    for item, priority in zip(items, priorities, strict=True):
        queue.put(item, priority)
    removed = [item for item, is_gone in zip(items, goes, strict=True) if is_gone]
    for item in removed:
        assert queue.remove(item)
        assert not queue.remove(item)
    left = [item.name for item in items if item not in removed]
    assert len(queue) == len(left)
    gate.opened.set()
    wait_until(lambda: len(gate.served) == len(left) and gate.running == 0)
    assert gate.names == sorted(left)
    queue.close()


# Limits


def test_a_full_queue_says_so_with_numbers(gate) -> None:
    """One item over the limit raises QueueFullError; what runs does not count."""
    queue = busy_queue(gate, limit=2)
    queue.put(Item())
    queue.put(Item())
    with pytest.raises(QueueFullError, match="2 requests are waiting") as caught:
        queue.put(Item())
    assert caught.value.details == {"waiting": 2, "limit": 2}
    assert caught.value.retryable
    assert len(queue) == 2


def test_what_a_free_thread_takes_does_not_wait(gate) -> None:
    """An idle queue takes as many items at once as it can serve, besides those that may wait."""
    for _ in range(20):
        gate.opened.clear()
        queue: RequestQueue[Item] = RequestQueue(gate, limit=1, concurrency=4)
        for _ in range(5):
            queue.put(Item())
        with pytest.raises(QueueFullError) as caught:
            queue.put(Item())
        assert caught.value.details == {"waiting": 1, "limit": 1}
        gate.opened.set()
        wait_until(lambda queue=queue: len(queue) == 0 and gate.running == 0)
        wait_until(lambda queue=queue: queue._busy == 0)
        queue.put(Item())


def test_a_removed_item_makes_room_and_is_not_served(gate) -> None:
    """A waiting item can be taken back once; an unknown, running or served one cannot."""
    queue: RequestQueue[Item] = RequestQueue(gate, limit=2, concurrency=1)
    running, first, second, third = (Item(n) for n in ("running", "first", "second", "third"))
    queue.put(running)
    wait_until(lambda: gate.running == 1)
    queue.put(first)
    queue.put(second)
    assert queue.remove(first) is True
    assert queue.remove(first) is False
    assert queue.remove(running) is False
    queue.put(third)
    gate.opened.set()
    wait_until(lambda: len(gate.served) == 3)
    assert gate.names == ["running", "second", "third"]
    assert queue.remove(second) is False


def test_concurrency_is_reached_and_never_exceeded(gate) -> None:
    """As many items run at once as allowed, however many threads put."""
    queue: RequestQueue[Item] = RequestQueue(gate, limit=1000, concurrency=3)
    run_all([lambda: [queue.put(Item()) for _ in range(10)] for _ in range(8)])
    wait_until(lambda: gate.running == 3)
    assert len(queue) == 77
    gate.opened.set()
    wait_until(lambda: len(gate.served) == 80 and gate.running == 0)
    assert gate.most == 3


def test_an_idle_thread_is_used_before_a_new_one(gate, threads, monkeypatch) -> None:
    """One item after another is served by one thread, whatever the concurrency."""
    monkeypatch.setattr(scheduling, "_IDLE_EXIT_S", BOUND_S)
    gate.opened.set()
    queue: RequestQueue[Item] = RequestQueue(gate, limit=10, concurrency=8)
    for count in range(1, 9):
        queue.put(Item())
        wait_until(lambda count=count: len(gate.served) == count and queue._idle == 1)
        assert threads() == 1
    queue.close()


def test_an_idle_thread_is_not_counted_on_twice(gate) -> None:
    """Two items that come at once beside one idle thread both run at once."""
    queue: RequestQueue[Item] = RequestQueue(gate, limit=10, concurrency=2)
    gate.opened.set()
    queue.put(Item())
    wait_until(lambda: queue._idle == 1 and gate.running == 0)
    gate.opened.clear()
    with queue._changed:  # the idle thread cannot take the first before the second is there
        queue.put(Item())
        queue.put(Item())
    wait_until(lambda: gate.running == 2)


# Threads


def test_threads_end_when_idle_and_come_back(gate, threads) -> None:
    """A queue that nobody uses has no threads; the next item is served all the same."""
    gate.opened.set()
    queue: RequestQueue[Item] = RequestQueue(gate, limit=10, concurrency=4)
    assert threads() == 0
    for round_number in range(1, 4):
        for _ in range(4):
            queue.put(Item())
        wait_until(lambda n=round_number: len(gate.served) == 4 * n)
        wait_until(lambda: threads() == 0)


def test_no_item_is_lost_when_threads_give_up(threads, monkeypatch) -> None:
    """Items that come just when idle threads end are served, each once."""
    monkeypatch.setattr(scheduling, "_IDLE_EXIT_S", 0.0002)
    served: list[int] = []
    queue: RequestQueue[int] = RequestQueue(served.append, limit=10_000, concurrency=3)

    def put(own: range) -> None:
        for number in own:
            queue.put(number)
            if number % 3 == 0:
                wait_until(lambda number=number: number in served[-200:])

    for run in run_all([lambda n=n: put(range(n, 1200, 4)) for n in range(4)]):
        run.join()
    wait_until(lambda: len(served) == 1200)
    assert sorted(served) == list(range(1200))
    wait_until(lambda: threads() == 0)


def test_an_item_that_comes_as_a_thread_gives_up_is_served() -> None:
    """An item that comes between the end of an idle thread's wait and its next look is its own."""
    served: list[str] = []
    queue: RequestQueue[str] = RequestQueue(served.append, limit=10, concurrency=1)

    def wait(_timeout: float) -> bool:
        if served == ["first"]:
            queue.put("second")
        return False

    queue._changed.wait = wait
    queue.put("first")
    wait_until(lambda: served == ["first", "second"])


def test_served_items_are_not_kept(gate) -> None:
    """A waiting thread holds nothing of the item that it served last."""
    gate.opened.set()
    served = threading.Event()
    queue: RequestQueue[Item] = RequestQueue(lambda _item: served.set(), limit=10, concurrency=1)
    item = Item()
    gone = weakref.ref(item)
    queue.put(item)
    del item
    assert served.wait(BOUND_S)
    wait_until(lambda: gone() is None, scheduling._IDLE_EXIT_S / 2)


def test_a_refused_thread_leaves_the_queue_as_it_was(gate) -> None:
    """When the system gives no thread, put fails, keeps nothing, and works again later."""
    queue: RequestQueue[Item] = RequestQueue(gate, limit=10, concurrency=1)
    gate.opened.set()
    with no_more_threads(), pytest.raises(RuntimeError, match="no more threads"):
        queue.put(Item("refused"))
    assert len(queue) == 0
    queue.put(Item("taken"))
    wait_until(lambda: gate.names == ["taken"])


# Closing


def test_close_returns_the_rest_in_order(gate) -> None:
    """Closing returns what waits, in the order in which it would have been served."""
    queue = busy_queue(gate)
    queue.put(Item("b"), 0)
    queue.put(Item("a"), 1)
    queue.put(Item("c"), 0)
    assert [item.name for item in queue.close()] == ["a", "b", "c"]
    assert len(queue) == 0
    assert queue.close() == []
    gate.opened.set()
    wait_until(lambda: gate.running == 0)
    assert gate.served == []


def test_a_closed_queue_takes_nothing(gate) -> None:
    """put after close raises EngineClosedError, also when the queue was full."""
    queue = busy_queue(gate, limit=1)
    queue.put(Item())
    queue.close()
    with pytest.raises(EngineClosedError):
        queue.put(Item())


def test_close_ends_idle_threads(gate, threads, monkeypatch) -> None:
    """Closing wakes the idle threads, which end at once."""
    monkeypatch.setattr(scheduling, "_IDLE_EXIT_S", 10 * BOUND_S)
    queue = busy_queue(gate, concurrency=3)
    gate.opened.set()
    wait_until(lambda: queue._idle == 3)
    queue.close()
    wait_until(lambda: threads() == 0)


def test_every_item_has_one_fate(threads, monkeypatch) -> None:
    """With puts, removals and a close at once, each item is served, removed, returned or refused,
    exactly one of them."""
    monkeypatch.setattr(scheduling, "_IDLE_EXIT_S", 0.001)
    for _ in range(15):
        fates: Counter[int] = Counter()
        lock = threading.Lock()

        def note(number: int, fates: Counter[int] = fates, lock: threading.Lock = lock) -> None:
            with lock:
                fates[number] += 1

        def serve(number: int, note: Callable[[int], None] = note) -> None:
            time.sleep(0.0001)
            note(number)

        queue: RequestQueue[int] = RequestQueue(serve, limit=20, concurrency=3)

        def put(own: range, queue=queue, note=note) -> None:
            for number in own:
                try:
                    queue.put(number, number % 3)
                except (QueueFullError, EngineClosedError):
                    note(number)

        def remove(queue=queue, note=note) -> None:
            for number in range(0, 200, 3):
                if queue.remove(number):
                    note(number)

        def close(queue=queue, note=note, fates=fates) -> None:
            wait_until(lambda: len(fates) > 60)
            for number in queue.close():
                note(number)

        calls = [lambda n=n, put=put: put(range(n, 200, 4)) for n in range(4)]
        for run in run_all([*calls, remove, close]):
            run.join()
        wait_until(lambda fates=fates: len(fates) == 200)
        wait_until(lambda: threads() == 0)
        assert set(fates.values()) == {1}


def test_put_does_not_wait(gate) -> None:
    """put returns while every thread is busy."""
    queue = busy_queue(gate)
    Running(queue.put, Item()).join()
    assert len(queue) == 1
