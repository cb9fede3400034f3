"""The queue serves whose turn it is, within its limits, and loses nothing and no wake-up."""

import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import BOUND_S, Clock, Running, no_more_threads, run_all, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from internals import busy_of, idle_exit_s, set_idle_exit, set_recheck
from test_policy import Budget, blocked, loadable

from orion_oie.engine.scheduling import (
    in_flight,
)
from orion_oie.engine.scheduling.in_flight import InFlight
from orion_oie.engine.scheduling.queue import RequestQueue
from orion_oie.errors import EngineClosedError, QueueFullError, WorkerError
from orion_oie.schemas.availability import UNKNOWN, Availability, ModelState

READY, FULL = ModelState.READY, ModelState.FULL
LOADABLE, BLOCKED = ModelState.LOADABLE, ModelState.BLOCKED


# What no public call of a queue shows, and some tests wait for or bring about


def idle_of(queue: RequestQueue[Any]) -> int:
    """The number of its threads without work."""
    return queue._idle


def threads_of(queue: RequestQueue[Any]) -> int:
    """The number of threads that it counts as its own."""
    return queue._threads


def is_deciding(queue: RequestQueue[Any]) -> bool:
    """True while a thread decides, or waits for news to decide on."""
    return queue._decider is not None


def shown_by(queue: RequestQueue[Any]) -> dict[str, Availability]:
    """The availability of models at its last decision."""
    return queue._availability


def lock_of(queue: RequestQueue[Any]) -> Any:
    """Its lock: while a test holds it, nothing is decided."""
    return queue._lock


def set_max_threads(queue: RequestQueue[Any], number: int) -> None:
    """Change how many threads it may have."""
    queue._max_threads = number


def replace_idle_wait(queue: RequestQueue[Any], wait: Callable[[object, float], bool]) -> None:
    """Have its threads wait for work by `wait(seat, timeout_s)`."""
    queue._await = wait  # type: ignore[method-assign]


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


@pytest.fixture(autouse=True)
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wake-up that gets lost is lost for good."""
    set_recheck(monkeypatch, 100 * BOUND_S)
    monkeypatch.setattr(in_flight, "SETTLE_S", 100 * BOUND_S)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the serving threads of the test; they end soon when idle."""
    set_idle_exit(monkeypatch, 0.01)
    before = set(threading.enumerate())

    def count() -> int:
        return sum(t.name.startswith("orion-request") for t in set(threading.enumerate()) - before)

    return count


class OneModelQueue(RequestQueue[Any]):
    """A queue for one model that is in memory, used by `concurrency` requests at once."""

    def __init__(
        self, serve: Callable[[Any], None], *, limit: int, concurrency: int, **more: Any
    ) -> None:
        super().__init__(
            serve,
            limit=limit,
            availability_of=lambda _model: Availability(READY),
            per_model=concurrency,
            max_threads=concurrency,
            **more,
        )

    def put(self, item: Any, priority: int = 0, **facts: Any) -> None:
        super().put(item, priority=priority, **{"model": "main", **facts})


def busy_queue(gate: Gate, *, limit: int = 100, concurrency: int = 1, **more: Any) -> OneModelQueue:
    """A queue all of whose threads are held by the gate."""
    queue = OneModelQueue(gate, limit=limit, concurrency=concurrency, **more)
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
        queue = OneModelQueue(gate, limit=1, concurrency=4)
        for _ in range(5):
            queue.put(Item())
        with pytest.raises(QueueFullError) as caught:
            queue.put(Item())
        assert caught.value.details == {"waiting": 1, "limit": 1}
        gate.opened.set()
        wait_until(lambda queue=queue: len(queue) == 0 and gate.running == 0)
        wait_until(lambda queue=queue: busy_of(queue) == 0)
        queue.put(Item())


def test_a_removed_item_makes_room_and_is_not_served(gate) -> None:
    """A waiting item can be taken back once; an unknown, running or served one cannot."""
    queue = OneModelQueue(gate, limit=2, concurrency=1)
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
    queue = OneModelQueue(gate, limit=1000, concurrency=3)
    run_all([lambda: [queue.put(Item()) for _ in range(10)] for _ in range(8)])
    wait_until(lambda: gate.running == 3)
    assert len(queue) == 77
    gate.opened.set()
    wait_until(lambda: len(gate.served) == 80 and gate.running == 0)
    assert gate.most == 3


def test_an_idle_thread_is_used_before_a_new_one(gate, threads, monkeypatch) -> None:
    """One item after another is served by one thread, whatever the concurrency."""
    set_idle_exit(monkeypatch, BOUND_S)
    gate.opened.set()
    queue = OneModelQueue(gate, limit=10, concurrency=8)
    for count in range(1, 9):
        queue.put(Item())
        wait_until(lambda count=count: len(gate.served) == count and idle_of(queue) == 1)
        assert threads() == 1
    queue.close()


def test_all_idle_threads_are_used_before_a_new_one(gate, threads, monkeypatch) -> None:
    """Items that come at once are served by the threads that are idle, if these are enough."""
    set_idle_exit(monkeypatch, BOUND_S)
    queue = busy_queue(gate, concurrency=8)
    gate.opened.set()
    wait_until(lambda: idle_of(queue) == 8)
    set_max_threads(queue, 16)
    gate.opened.clear()
    with lock_of(queue):
        for _ in range(8):
            queue.put(Item())
    wait_until(lambda: gate.running == 8)
    assert threads() == 8
    gate.opened.set()
    wait_until(lambda: idle_of(queue) == 8)
    queue.close()


def test_an_idle_thread_is_not_counted_on_twice(gate) -> None:
    """Two items that come at once beside one idle thread both run at once."""
    queue = OneModelQueue(gate, limit=10, concurrency=2)
    gate.opened.set()
    queue.put(Item())
    wait_until(lambda: idle_of(queue) == 1 and gate.running == 0)
    gate.opened.clear()
    with lock_of(queue):  # the idle thread cannot take the first before the second is there
        queue.put(Item())
        queue.put(Item())
    wait_until(lambda: gate.running == 2)


# Threads


def test_threads_end_when_idle_and_come_back(gate, threads) -> None:
    """A queue that nobody uses has no threads; the next item is served all the same."""
    gate.opened.set()
    queue = OneModelQueue(gate, limit=10, concurrency=4)
    assert threads() == 0
    for round_number in range(1, 4):
        for _ in range(4):
            queue.put(Item())
        wait_until(lambda n=round_number: len(gate.served) == 4 * n)
        wait_until(lambda: threads() == 0)


def test_no_item_is_lost_when_threads_give_up(threads, monkeypatch) -> None:
    """Items that come just when idle threads end are served, each once."""
    set_idle_exit(monkeypatch, 0.0002)
    served: list[int] = []
    queue = OneModelQueue(served.append, limit=10_000, concurrency=3)

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
    queue = OneModelQueue(served.append, limit=10, concurrency=1)

    def wait_in_vain(_seat: object, _timeout_s: float) -> bool:
        if served == ["first"]:
            queue.put("second")
        return False

    replace_idle_wait(queue, wait_in_vain)
    queue.put("first")
    wait_until(lambda: served == ["first", "second"])


def test_served_items_are_not_kept(gate) -> None:
    """A waiting thread holds nothing of the item that it served last."""
    gate.opened.set()
    served = threading.Event()
    queue = OneModelQueue(lambda _item: served.set(), limit=10, concurrency=1)
    item = Item()
    gone = weakref.ref(item)
    queue.put(item)
    del item
    assert served.wait(BOUND_S)
    wait_until(lambda: gone() is None, idle_exit_s() / 2)


def test_a_refused_thread_leaves_the_queue_as_it_was(gate) -> None:
    """When the system gives no thread, put fails, keeps nothing, and works again later."""
    queue = OneModelQueue(gate, limit=10, concurrency=1)
    gate.opened.set()
    with no_more_threads(), pytest.raises(WorkerError, match="no more threads"):
        queue.put(Item("refused"))
    assert len(queue) == 0
    queue.put(Item("taken"))
    wait_until(lambda: gate.names == ["taken"])


# Closing


def test_close_returns_the_rest_in_order(gate) -> None:
    """Closing returns what waits, the oldest first."""
    queue = busy_queue(gate)
    queue.put(Item("b"), 0)
    queue.put(Item("a"), 1)
    queue.put(Item("c"), 0)
    assert [item.name for item in queue.close()] == ["b", "a", "c"]
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
    set_idle_exit(monkeypatch, 10 * BOUND_S)
    queue = busy_queue(gate, concurrency=3)
    gate.opened.set()
    wait_until(lambda: idle_of(queue) == 3)
    queue.close()
    wait_until(lambda: threads() == 0)


def test_close_ends_the_thread_that_waits_for_a_change(gate, threads) -> None:
    """Closing ends the thread of items that cannot be served, wherever it is in its decision."""
    for is_asking in (False, True):
        queue: RequestQueue[Item]

        def state_of(_model: str) -> Availability:
            if is_asking:  # noqa: B023 (it is asked in this round)
                Running(queue.close).join()  # noqa: B023
            return blocked("x")

        queue = RequestQueue(gate, limit=1, availability_of=state_of, per_model=1, max_threads=1)
        queue.put(Item(), model="a")
        if not is_asking:
            wait_until(lambda queue=queue: shown_by(queue))
            assert len(queue.close()) == 1
        wait_until(lambda: threads() == 0)


def test_every_item_has_one_fate(threads, monkeypatch) -> None:
    """With puts, removals and a close at once, each item is served, removed, returned or refused,
    exactly one of them."""
    set_idle_exit(monkeypatch, 0.001)
    for _ in range(15):
        fates: Counter[int] = Counter()
        lock = threading.Lock()

        def note(number: int, fates: Counter[int] = fates, lock: threading.Lock = lock) -> None:
            with lock:
                fates[number] += 1

        def serve(number: int, note: Callable[[int], None] = note) -> None:
            time.sleep(0.0001)
            note(number)

        queue = OneModelQueue(serve, limit=20, concurrency=3)

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


# Several models


class Models:
    """Standings that a test sets."""

    def __init__(self, **availability: Availability | None) -> None:
        self.availability = availability

    def __call__(self, model: str) -> Availability | None:
        return self.availability[model]


def queue_for(
    gate: Gate, models: Models, *, limit: int = 100, per_model: int = 1, **more: Any
) -> RequestQueue[Item]:
    more = {"max_threads": 4, **more}
    return RequestQueue(gate, limit=limit, availability_of=models, per_model=per_model, **more)


def put_all(queue: RequestQueue[Item], names: str, **facts: Any) -> list[Item]:
    """Put an item for each letter, whose model it names."""
    items = [Item(name) for name in names]
    for item in items:
        queue.put(item, model=str(item.name), **facts)
    return items


def test_a_full_model_leaves_room_for_others(gate) -> None:
    """`per_model` requests of one model run at once, and others beside them; then the next."""
    queue = queue_for(gate, Models(a=Availability(READY), b=Availability(READY)))
    put_all(queue, "aaab")
    wait_until(lambda: sorted(gate.names) == ["a", "b"])
    assert len(queue) == 2
    assert all("as many requests as it may" in one.reason for one in queue.waiting())
    gate.opened.set()
    wait_until(lambda: len(gate.served) == 4)
    assert gate.most == 2


def test_what_cannot_be_served_waits_for_a_word(gate, threads) -> None:
    """A blocked model's requests wait, on one thread however many, and run when told to."""
    models = Models(a=blocked("x"), b=Availability(READY))
    queue = queue_for(gate, models)
    gate.opened.set()
    put_all(queue, "aaaaaaaa")
    wait_until(lambda: is_deciding(queue))
    put_all(queue, "b")
    wait_until(lambda: gate.names == ["b"] and busy_of(queue) == 0)
    wait_until(lambda: threads() == 1)
    models.availability["a"] = Availability(READY)
    assert gate.names == ["b"]
    queue.notify()
    wait_until(lambda: gate.names == ["b"] + ["a"] * 8)


def test_one_answer_serves_many_decisions(gate) -> None:
    """Models are asked about once, not for each request, until some time has passed, a change is
    reported, or a model is loaded that may evict others."""
    asked: list[str] = []
    answers = {"a": Availability(READY), "b": Availability(READY), "c": loadable("a")}
    clock = Clock()

    def availability_of(model: str) -> Availability:
        asked.append(model)
        return answers[model]

    queue = RequestQueue(
        gate,
        limit=99,
        availability_of=availability_of,
        per_model=1,
        max_threads=1,
        clock=clock,
    )

    def asks_for(models: str) -> int:
        gate.opened.clear()
        before, served = len(asked), len(gate.names)
        put_all(queue, models)
        gate.opened.set()
        wait_until(lambda: len(gate.names) == served + len(models) and busy_of(queue) == 0)
        return len(asked) - before

    assert 1 <= asks_for("aaaaaaaa") <= 4
    assert asks_for("aaaa") == 0
    clock.tick(1.0)
    assert asks_for("a") == 1
    queue.notify()
    assert asks_for("aa") == 1
    assert asks_for("b") >= 1  # of b nothing is known
    assert asks_for("c") >= 1
    assert asks_for("a") >= 1  # it may have been evicted for c


def test_what_waits_is_looked_at_again(gate, monkeypatch) -> None:
    """A change that nobody told of is found all the same."""
    set_recheck(monkeypatch, 0.01)
    models = Models(a=blocked("x"))
    queue = queue_for(gate, models)
    put_all(queue, "a")
    wait_until(lambda: is_deciding(queue))
    models.availability["a"] = Availability(READY)
    wait_until(lambda: gate.names == ["a"])


def test_taking_a_blocked_item_back_frees_those_it_held(gate) -> None:
    """When what others were held back for goes away, they are served."""
    clock = Clock()
    models = Models(a=blocked("b"), b=Availability(READY))
    queue = queue_for(gate, models, turn_s=10.0, clock=clock)
    [item] = put_all(queue, "a")
    clock.now += 20.0
    put_all(queue, "b")
    wait_until(lambda: "b" in shown_by(queue))
    assert queue.waiting()[1].reason == "'b' is held back so that 'a' gets memory"
    assert gate.names == []
    queue.remove(item)
    wait_until(lambda: gate.names == ["b"])


def test_a_word_while_it_decides_is_heard(gate) -> None:
    """A change that is told after the availability was asked and before the decision counts."""
    queue: RequestQueue[Item]
    answers = [Availability(READY), blocked("x")]

    def state_of(_model: str) -> Availability:
        found = answers.pop()
        if found.state is BLOCKED:
            Running(queue.notify).join()  # it also shows that no lock is held here
        return found

    queue = RequestQueue(gate, limit=1, availability_of=state_of, per_model=1, max_threads=1)
    queue.put(Item("a"), model="a")
    wait_until(lambda: gate.names == ["a"])


def test_an_item_that_comes_while_it_decides_is_asked_about(gate) -> None:
    """What is put between the question and the decision is not taken for unknown."""
    queue: RequestQueue[Item]
    asked: list[str] = []

    def state_of(model: str) -> Availability:
        asked.append(model)
        if len(asked) == 1:
            queue.put(Item("b"), model="b")
        return blocked("x")

    queue = RequestQueue(gate, limit=9, availability_of=state_of, per_model=1, max_threads=1)
    queue.put(Item("a"), model="a")
    wait_until(lambda: "b" in shown_by(queue))
    assert "b" in asked
    assert len(queue.close()) == 2
    assert gate.names == []


def test_a_bug_in_the_availability_does_not_end_the_queue(gate, monkeypatch) -> None:
    """An error while it asks is reported as any of a thread; the next item has all served."""
    problems: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda told: problems.append(told.exc_type))
    availability: list[Availability] = []
    queue: RequestQueue[Item] = RequestQueue(
        gate, limit=9, availability_of=lambda _model: availability[-1], per_model=2, max_threads=2
    )
    put_all(queue, "a")
    wait_until(lambda: problems == [IndexError])
    wait_until(lambda: threads_of(queue) == 0)
    availability.append(Availability(READY))
    put_all(queue, "b")
    wait_until(lambda: sorted(gate.names) == ["a", "b"])


def test_what_ends_while_it_decides_is_asked_about(gate) -> None:
    """What was told before a request ended, which may have evicted a model, is asked again."""
    queue: RequestQueue[Item]
    is_evicted = threading.Event()

    def state_of(model: str) -> Availability:
        if model == "a" or is_evicted.is_set():
            return Availability(READY) if model == "a" else blocked("a")
        gate.opened.set()
        wait_until(lambda: busy_of(queue) == 0)
        is_evicted.set()
        return Availability(READY)

    queue = RequestQueue(gate, limit=9, availability_of=state_of, per_model=1, max_threads=2)
    queue.put(Item("a"), model="a")
    wait_until(lambda: gate.running == 1)
    queue.put(Item("b"), model="b")
    wait_until(lambda: "b" in shown_by(queue))
    assert len(queue.close()) == 1
    assert gate.names == ["a"]


def test_an_unknown_model_is_tried(gate) -> None:
    """Items whose model nobody knows are served, several models at the same time."""
    queue = queue_for(gate, Models(a=None, b=None))
    put_all(queue, "ab")
    wait_until(lambda: gate.running == 2)


def test_one_cold_model_after_the_other(gate) -> None:
    """Until a load shows, nothing else is loaded into the room that it takes; then what fits."""
    models = Models(a=loadable(), b=loadable(), c=Availability(READY))
    queue = queue_for(gate, models)
    put_all(queue, "abc")
    wait_until(lambda: gate.running == 2)
    assert [one.model for one in queue.waiting()] == ["b"]
    assert "'b' is not in memory" in queue.waiting()[0].reason
    models.availability["a"] = Availability(READY)
    queue.notify()
    wait_until(lambda: gate.running == 3)


def test_loads_are_asked_about_first(gate) -> None:
    """A load under way is asked about before what it may evict: so an answer that says it is there
    comes before answers that know who went."""
    asked: list[str] = []
    models = Models(a=Availability(READY), b=loadable("a"))

    def state_of(model: str) -> Availability | None:
        asked.append(model)
        return models(model)

    queue = RequestQueue(gate, limit=9, availability_of=state_of, per_model=2, max_threads=2)
    queue.put(Item("b"), model="b")
    wait_until(lambda: gate.names == ["b"])
    queue.put(Item("a"), model="a")
    wait_until(lambda: asked[-2:] == ["b", "a"])
    assert len(queue) == 1
    queue.close()


def test_a_turn_counts_from_the_load(gate) -> None:
    """A model that was loaded for a request is not evicted for an overdue one before its turn is
    over."""
    clock = Clock()
    models = Models(a=blocked("x"), b=loadable("x"))
    queue = queue_for(gate, models, max_threads=1, turn_s=10.0, clock=clock)
    put_all(queue, "a")
    clock.now += 5.0
    put_all(queue, "b")
    wait_until(lambda: gate.names == ["b"])
    models.availability |= {"a": loadable("b"), "b": Availability(READY)}
    put_all(queue, "b")
    clock.now += 7.0
    gate.opened.set()
    wait_until(lambda: gate.names == ["b", "b", "a"])


def test_a_load_that_never_shows_stops_nobody_for_long(gate, monkeypatch) -> None:
    """If nobody ever tells of a load, others go on after a moment."""
    monkeypatch.setattr(in_flight, "SETTLE_S", 0.05)
    queue = queue_for(gate, Models(a=loadable(), b=loadable()))
    put_all(queue, "ab")
    wait_until(lambda: gate.running == 2)


def test_a_refused_thread_while_serving_loses_nothing(gate) -> None:
    """When the system gives no second thread, the first one serves what waits."""
    queue = busy_queue(gate, concurrency=1)
    set_max_threads(queue, 2)
    with no_more_threads():
        with pytest.raises(WorkerError, match="no more threads"):
            queue.put(Item("refused"))
        gate.opened.set()
        wait_until(lambda: idle_of(queue) == 1)
        gate.opened.clear()
        with lock_of(queue):
            queue.put(Item(1))
            queue.put(Item(2))
        wait_until(lambda: gate.running == 1)
        gate.opened.set()
        wait_until(lambda: gate.names[-2:] == [1, 2])


# What it tells


def test_positions_and_reasons(gate) -> None:
    """What waits is listed in its order, with its place, its time and why it waits."""
    clock = Clock()
    models = Models(a=Availability(READY), b=blocked("a"), c=Availability(READY))
    queue = queue_for(gate, models, max_threads=2, clock=clock)
    [running] = put_all(queue, "a")
    wait_until(lambda: gate.running == 1)
    [first] = put_all(queue, "b", priority=1)
    clock.now += 2.0
    [second, third] = put_all(queue, "aa")
    listed = [(one.item, one.position, one.waited_s, one.reason) for one in queue.waiting()]
    full = "'a' answers as many requests as it may at once"
    assert listed == [
        (first, 1, 2.0, "'b' is not in memory, and waits until 'a' can be evicted"),
        (second, 2, 0.0, full),
        (third, 3, 0.0, full),
    ]
    assert [queue.position(item) for item in (first, second, third)] == [1, 2, 3]
    assert queue.position(running) is None
    put_all(queue, "c")
    wait_until(lambda: gate.running == 2)
    assert {one.reason for one in queue.waiting()} == {"2 requests are served, which is the limit"}
    queue.close()


def test_a_full_queue_says_when_to_come_back(gate) -> None:
    """Once something was served, the refusal tells when the next place is expected."""
    clock = Clock()
    queue = OneModelQueue(gate, limit=1, concurrency=2, clock=clock)
    for service_s in (7.0, 2.0):
        gate.opened.clear()
        queue.put(Item())
        wait_until(lambda: gate.running == 1)
        clock.now += service_s
        gate.opened.set()
        wait_until(lambda: busy_of(queue) == 0)
    gate.opened.clear()
    for _ in range(3):
        queue.put(Item())
    wait_until(lambda: gate.running == 2)
    with pytest.raises(QueueFullError, match=r"try again in about 3\.0 s") as caught:
        queue.put(Item())
    assert caught.value.details == {"waiting": 1, "limit": 1, "retry_after_s": 3.0}


def test_the_blocked_do_not_count_as_about_to_run(gate) -> None:
    """Free threads do not make room in the queue for what they cannot serve."""
    queue = queue_for(gate, Models(a=blocked("x")), limit=2)
    put_all(queue, "aa")
    wait_until(lambda: shown_by(queue))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        put_all(queue, "a")
    queue.close()


def test_the_held_do_not_count_as_about_to_run(gate) -> None:
    """Nor do free threads make room for what is held back, or for what others have the threads."""
    models = Models(a=blocked("b"), b=Availability(READY), c=Availability(READY))
    queue = queue_for(gate, models, limit=2)
    put_all(queue, "a", priority=1)
    put_all(queue, "b")
    wait_until(lambda: "b" in shown_by(queue))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        put_all(queue, "b")
    queue.close()
    queue = queue_for(gate, models, limit=1, max_threads=1)
    put_all(queue, "b")
    wait_until(lambda: gate.running == 1)
    put_all(queue, "c")
    with pytest.raises(QueueFullError, match="1 requests are waiting"):
        put_all(queue, "c")


def test_settings_reach_the_decision(gate) -> None:
    """Seconds of waiting and of turns are those that were asked for."""
    clock = Clock()
    for aging_s, first in [(1.0, "low"), (100.0, "high")]:
        gate = Gate()
        queue = busy_queue(gate, aging_s=aging_s, clock=clock)
        queue.put(Item("low"), 0)
        clock.now += 20.0
        queue.put(Item("high"), 10)
        gate.opened.set()
        wait_until(lambda gate=gate: len(gate.served) == 2)
        assert gate.names[0] == first


def test_sessions_share(gate) -> None:
    """One request of another session overtakes the rest of a crowd."""
    queue = busy_queue(gate)
    for number in range(5):
        queue.put(Item(number), session="crowd")
    queue.put(Item("other"), session="other")
    queue.put(Item("agent"), agent="another")
    gate.opened.set()
    wait_until(lambda: len(gate.served) == 7)
    assert set(gate.names[:3]) == {0, "other", "agent"}


# A pool


class Pool:
    """Serves items with the models of a budget, in some time, and says when that changes."""

    def __init__(self, budget: Budget, seed: int) -> None:
        self.queue: RequestQueue[Item]
        self.served: list[Item] = []
        self.problems: list[str] = []
        self.budget = budget
        self._rng = random.Random(seed)
        self._lock = threading.Lock()

    def availability(self, model: str) -> Availability:
        with self._lock:
            return self.budget.availability(model)

    def serve(self, item: Item) -> None:
        model = str(item.name)
        for step in (self._enter, self._leave):
            time.sleep(self._rng.random() * 4e-4)
            with self._lock:
                step(model)
            self.queue.notify()
        self.served.append(item)

    def _enter(self, model: str) -> None:
        try:
            self.budget.enter(model)
        except AssertionError as error:
            self.problems.append(str(error))
            self.budget.users.setdefault(model, 1)

    def _leave(self, model: str) -> None:
        self.budget.leave(model)


def test_cold_models_share_one_place_in_turns() -> None:
    """A burst of requests for three models with room for one loads each of them once."""
    pool = Pool(Budget(1), 0)
    pool.queue = RequestQueue(
        pool.serve, limit=100, availability_of=pool.availability, per_model=2, max_threads=6
    )
    items = put_all(pool.queue, "abc" * 10)
    wait_until(lambda: len(pool.served) == len(items))
    assert pool.problems == []
    assert sorted(pool.budget.loads) == ["a", "b", "c"]


def test_no_wake_up_is_lost_in_any_pool(monkeypatch) -> None:
    """With random models, rooms, limits, priorities and removals, everything is served once, and
    whoever is dispatched finds room for its model."""
    set_idle_exit(monkeypatch, 0.001)
    rng = random.Random(7)
    for seed in range(40):
        room = rng.randint(1, 4)
        sizes = {model: rng.randint(1, room) for model in "abcde"}
        pool = Pool(Budget(room, sizes), seed)
        pool.queue = queue = RequestQueue(
            pool.serve,
            limit=1000,
            availability_of=pool.availability,
            per_model=rng.randint(1, 3),
            max_threads=rng.randint(1, 6),
            turn_s=rng.choice([0.0, 0.002, 0.05]),
            aging_s=rng.choice([0.001, 1.0]),
        )
        items = [Item(rng.choice("abcde"[: room + 1])) for _ in range(60)]
        facts = [
            {
                "priority": rng.randint(-2, 2),
                "session": rng.choice("xyz"),
                "agent": rng.choice("mn"),
            }
            for _ in items
        ]
        removed: list[Item] = []

        def put(first: int, queue=queue, items=items, facts=facts) -> None:
            for item, fact in list(zip(items, facts, strict=True))[first::3]:
                queue.put(item, model=str(item.name), **fact)

        def remove(queue=queue, items=items, removed=removed) -> None:
            removed.extend(item for item in items[::7] if queue.remove(item))

        for run in run_all([*(lambda n=n, put=put: put(n) for n in range(3)), remove]):
            run.join()
        expected = [item for item in items if item not in removed]
        wait_until(lambda pool=pool, expected=expected: len(pool.served) >= len(expected))
        assert Counter(pool.served) == Counter(expected)
        assert pool.problems == []
        assert len(queue) == 0


# What is in flight


def judged(flight: InFlight, **told: Availability) -> dict[str, Availability]:
    return flight.judge(told, told)


def test_a_dispatched_load_is_seen_before_it_shows() -> None:
    """The model that is on its way takes more requests, others wait; then what is told counts."""
    flight = InFlight(per_model=2)
    flight.begin("a", loadable("c"), now=0.0)
    told = {"a": loadable("c"), "b": loadable("c"), "c": Availability(READY), "d": UNKNOWN}
    assert flight.judge(told, told) == {
        "a": Availability(READY),
        "b": Availability(BLOCKED),
        "c": Availability(BLOCKED),
        "d": UNKNOWN,
    }
    flight.begin("a", Availability(READY), now=0.01)
    assert judged(flight, a=loadable("c"), b=loadable("c"))["a"] == Availability(FULL)
    assert flight.loads == ["a"]
    flight.settle({"a": loadable("c")}, now=0.05)
    assert flight.loads == ["a"]
    flight.settle({"a": Availability(READY)}, now=0.05)
    assert flight.loads == []
    assert judged(flight, b=blocked("a"), c=loadable())["b"] == blocked("a")


def test_what_is_in_use_goes_on_beside_a_load() -> None:
    """A model that answers a request cannot be the one that goes, and takes more."""
    flight = InFlight(per_model=2)
    flight.begin("c", Availability(READY), now=0.0)
    flight.begin("a", loadable("x"), now=0.0)
    assert judged(flight, c=Availability(READY)) == {"c": Availability(READY)}


def test_a_load_that_fails_is_over() -> None:
    """When the request that loads has ended, the next may load; one for an unknown model stops
    nobody at all."""
    flight = InFlight(per_model=2)
    flight.begin("?", UNKNOWN, now=0.0)
    assert judged(flight, b=loadable("x")) == {"b": loadable("x")}
    flight.begin("a", loadable("x"), now=0.0)
    assert judged(flight, b=loadable("x")) == {"b": Availability(BLOCKED)}
    flight.end("a")
    assert judged(flight, b=loadable("x")) == {"b": loadable("x")}


def test_a_second_request_outlives_the_load() -> None:
    """A request that was sent after the one that loads counts as using the model, also when the
    load has shown and the first one has ended."""
    flight = InFlight(per_model=2)
    flight.begin("a", loadable(), now=0.0)
    flight.begin("a", Availability(READY), now=0.01)
    flight.settle({"a": Availability(READY)}, now=0.02)
    flight.end("a")
    assert judged(flight, b=loadable("a"))["b"] == blocked("a")


def test_a_model_that_was_just_dispatched_does_not_go() -> None:
    """What is about to be used counts as in use, until it shows, ends, or some time has passed."""
    flight = InFlight(per_model=2)
    flight.begin("a", Availability(READY), now=0.0)
    told = {"b": loadable("a", "c")}
    assert flight.judge(told, told) == {"b": Availability(BLOCKED, frozenset("c"), frozenset("a"))}
    assert flight.settles_in_s(0.05) == pytest.approx(in_flight.SETTLE_S - 0.05)
    flight.settle(told, now=in_flight.SETTLE_S)
    assert flight.judge(told, told) == told
    flight.begin("a", Availability(READY), now=1.0)
    flight.end("a")
    assert flight.judge(told, told) == {"b": Availability(BLOCKED, frozenset("c"), frozenset("a"))}
    flight.end("a")
    assert flight.judge(told, told) == told


def test_places_are_counted() -> None:
    """A model has as many places as it may have requests, whatever is told of it."""
    flight = InFlight(per_model=2)
    assert flight.places("a") == 2
    for availability in (Availability(READY), UNKNOWN):
        flight.begin("a", availability, now=0.0)
    assert flight.places("a") == 0
    assert judged(flight, a=blocked("b"))["a"].state is FULL
    flight.end("a")
    assert judged(flight, a=blocked("b"))["a"] == blocked("b")


# Threads of those that wait for a model


ARRIVING = Availability(READY, is_arriving=True)


@pytest.mark.parametrize("late", [ARRIVING, Availability(LOADABLE), UNKNOWN])
def test_what_waits_for_its_model_takes_no_thread_from_others(gate, late) -> None:
    """However many requests wait for models that come late or never, as many as ever are served by
    models in memory."""
    models = Models(a=Availability(READY), **dict.fromkeys("bcd", late))
    queue = queue_for(gate, models, max_threads=2, per_model=2)
    put_all(queue, "bcdbcd")
    wait_until(lambda: gate.running >= 1)
    put_all(queue, "aa")
    wait_until(lambda: gate.names.count("a") == 2)
    assert gate.running <= 4
    gate.opened.set()
    wait_until(lambda: len(gate.served) == 8)


def test_what_waits_for_its_model_is_counted() -> None:
    """Until the model is shown to be in memory, or its requests end."""
    flight = InFlight(per_model=3)
    flight.begin("a", ARRIVING, now=0.0)
    flight.begin("a", ARRIVING, now=0.0)
    flight.begin("b", loadable(), now=0.0)
    flight.begin("b", Availability(READY), now=0.0)  # as far as it is known, b is being loaded
    flight.begin("c", Availability(READY), now=0.0)
    assert flight.arriving == 4
    flight.settle({"a": ARRIVING}, now=0.01)
    assert flight.arriving == 4
    flight.settle({"a": Availability(READY)}, now=0.02)
    assert flight.arriving == 2
    for model in "aab":
        flight.end(model)
    assert flight.arriving == 1
    flight.end("b")
    assert flight.arriving == 0


def test_a_bug_in_serving_does_not_end_the_queue(gate, monkeypatch) -> None:
    """An error while it serves is reported as any of a thread; another thread serves what waits,
    and the place of the lost one is free."""
    problems: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda told: problems.append(told.exc_type))
    served: list[object] = []

    def serve(item: Item) -> None:
        gate(item)
        if item.name == "bad":
            raise ZeroDivisionError
        served.append(item.name)

    queue = OneModelQueue(serve, limit=9, concurrency=1)
    for name in ("bad", "good", "bad", "last"):
        queue.put(Item(name))
    gate.opened.set()
    wait_until(lambda: served == ["good", "last"])
    assert problems == [ZeroDivisionError] * 2
    assert busy_of(queue) == 0


def test_positions_follow_what_happens(gate) -> None:
    """As requests leave, come and overtake, each position is that in the order of the moment."""
    queue = busy_queue(gate)
    items = [Item(number) for number in range(6)]
    for item in items:
        queue.put(item)
    assert [queue.position(item) for item in items] == [1, 2, 3, 4, 5, 6]
    queue.remove(items[2])
    assert [queue.position(item) for item in items] == [1, 2, None, 3, 4, 5]
    urgent = Item("urgent")
    queue.put(urgent, priority=3)
    assert queue.position(urgent) == 1
    assert [queue.position(item) for item in items] == [2, 3, None, 4, 5, 6]
    assert queue.position(Item("stranger")) is None
    assert queue.close() == [*items[:2], *items[3:], urgent]
    assert queue.position(urgent) is None


def test_a_second_close_returns_nothing_twice(gate) -> None:
    """What one call of close returned is returned by no other."""
    queue = busy_queue(gate)
    item = Item()
    queue.put(item)
    assert queue.close() == [item]
    assert queue.close() == []
