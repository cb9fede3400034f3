"""The queue of requests: bounded, and served by threads that exist only while there is work.

Which request is next is decided in `turns.py`, from what the queue knows (who waits, who runs) and
from what it is told of the models. It loads nothing and knows no memory. A thread without work ends
after a while, so an engine that nobody uses has none.

At any time at most one idle thread decides, with no lock held while it asks for the models'
standings. While something waits there is such a thread, unless all of them are busy.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from orion_oie.engine.scheduling.in_flight import InFlight
from orion_oie.engine.scheduling.policy import (
    UNKNOWN,
    Decision,
    History,
    ModelState,
    Settings,
    Standing,
    Waiting,
    choose,
    order,
    why,
)
from orion_oie.errors import EngineClosedError, QueueFullError

T = TypeVar("T")

_IDLE_EXIT_S = 5.0
_RECHECK_S = 1.0  # what waits is looked at as often, should nobody have said that a model changed
_SMOOTHING = 0.2  # weight of the latest service time in the mean


@dataclass(frozen=True, slots=True)
class WaitingItem(Generic[T]):
    """One waiting item, for statistics. `position` 1 is next; `reason` is a sentence."""

    item: T
    model: str
    priority: int
    position: int
    waited_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class _Service:
    """One item being served."""

    model: str
    began_at: float


class RequestQueue(Generic[T]):
    """Runs `serve(item)` for every item: at most `max_threads` at the same time, `per_model` of
    them for one model. `limit` items may wait beside those that are about to be served.

    state_of: how a model stands, None if it is unknown, which counts as loadable. It need not know
        of running requests: FULL is found out here. Whatever changes its answers calls `notify`.
    turn_s, aging_s: see `turns.Settings`. clock: seconds.

    Neither `serve` nor `state_of` should raise. Both are called with no lock held, and the threads
    hold nothing else.
    """

    def __init__(
        self,
        serve: Callable[[T], None],
        *,
        limit: int,
        state_of: Callable[[str], Standing | None],
        per_model: int,
        max_threads: int,
        turn_s: float = 10.0,
        aging_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serve = serve
        self._limit = limit
        self._state_of = state_of
        self._max_threads = max_threads
        self._settings = Settings(turn_s, aging_s)
        self._clock = clock
        lock = threading.RLock()
        self._work = threading.Condition(lock)  # idle threads wait for something to decide
        self._news = threading.Condition(lock)  # the one that decides waits for a change
        self._changes = self._ends = 0
        self._arrivals = 0
        self._waiting: dict[int, tuple[Waiting, T]] = {}
        self._in_flight = InFlight(per_model)
        self._history = History()
        self._standings: dict[str, Standing] = {}  # at the last decision, as its holds
        self._decision = Decision(None, "", {})
        self._mean_service_s: float | None = None
        self._threads = self._idle = self._busy = 0
        self._is_deciding = False
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(
        self,
        item: T,
        *,
        model: str,
        agent: str = "",
        session: str | None = None,
        priority: int = 0,
    ) -> None:
        """Add an item; `priority` is higher for what is more urgent.

        Raises `EngineClosedError`, or `QueueFullError` with the numbers and, once anything was
        served, the time in which to expect room.
        """
        with self._work:
            if self._is_closed:
                raise EngineClosedError("the engine was shut down")
            waiting = len(self._waiting) - self._about_to_run()
            if waiting >= self._limit:
                raise self._full(waiting)
            if not self._idle and self._threads < self._max_threads:
                self._start_thread()
            self._arrivals += 1
            now = self._clock()
            one = Waiting(self._arrivals, model, agent, session, priority, now)
            self._waiting[one.seq] = (one, item)
            self._tell()

    def remove(self, item: T) -> bool:
        """Take back an item that is still waiting; False when it is not."""
        with self._work:
            for seq, (_, other) in self._waiting.items():
                if other is item:
                    del self._waiting[seq]
                    self._tell()  # it may have held others back
                    return True
            return False

    def close(self) -> list[T]:
        """Refuse new items and return those that will not be served, in their order."""
        with self._work:
            self._is_closed = True
            left, self._waiting = self._waiting, {}
            self._changes += 1
            self._work.notify_all()
            self._news.notify_all()
            standings, history, now = self._standings, self._history.copy(), self._clock()
        ordered = order((one for one, _ in left.values()), standings, history, now, self._settings)
        return [left[one.seq][1] for one in ordered]

    def notify(self) -> None:
        """Decide again: a model's standing has changed. May be called with locks held that
        `state_of` takes."""
        with self._work:
            self._tell()

    def position(self, item: T) -> int | None:
        """The place of an item among those that wait, 1 for the next; None when it does not wait.
        An estimate: it knows neither durations nor who will come."""
        return next((one.position for one in self.waiting() if one.item is item), None)

    def waiting(self) -> list[WaitingItem[T]]:
        """What waits, in the order in which it would be served now, and why it waits."""
        with self._work:
            models = self._to_ask()
        told = self._ask(models)
        with self._work:
            now, history, settings = self._clock(), self._history.copy(), self._settings
            items = {seq: both for seq, both in self._waiting.items() if both[0].model in told}
            standings = self._in_flight.judge(told, {one.model for one, _ in items.values()})
            limit_reached = self._busy >= self._max_threads
        everybody = [one for one, _ in items.values()]
        decision = choose(everybody, standings, history, now, settings)
        running = f"{self._max_threads} requests are served, which is the limit"
        return [
            WaitingItem(
                items[one.seq][1],
                one.model,
                one.priority,
                position,
                max(0.0, now - one.arrived_at),
                running if limit_reached else why(one, standings, decision),
            )
            for position, one in enumerate(order(everybody, standings, history, now, settings), 1)
        ]

    # -- how much may wait

    def _about_to_run(self) -> int:
        """How many items free threads are going to take: these do not wait for room."""
        if len(self._waiting) < self._limit:
            return 0
        free = self._max_threads - self._busy
        wanted = Counter(one.model for one, _ in self._waiting.values())
        return min(free, sum(min(n, self._places(model)) for model, n in wanted.items()))

    def _places(self, model: str) -> int:
        if self._standings.get(model, UNKNOWN).blockers or model in self._decision.holds:
            return 0
        return self._in_flight.places(model)

    def _full(self, waiting: int) -> QueueFullError:
        details: dict[str, float] = {"waiting": waiting, "limit": self._limit}
        when = "later"
        if self._mean_service_s is not None:
            after_s = self._mean_service_s / max(1, self._busy)  # a place is free when one ends
            details["retry_after_s"] = after_s = max(0.1, math.ceil(after_s * 10) / 10)
            when = f"in about {after_s:.1f} s"
        return QueueFullError(
            f"{waiting} requests are waiting and the limit is {self._limit}; "
            f"try again {when} or raise EngineConfig.serving.max_queue",
            **details,
        )

    # -- the threads. One that was started counts as idle until it has taken something.

    def _start_thread(self) -> None:
        name = f"orion-request-{self._threads + 1}"
        threading.Thread(
            target=_run, args=(self._next, self._serve), name=name, daemon=True
        ).start()
        self._threads += 1
        self._idle += 1

    def _tell(self) -> None:
        """Something has changed: have it decided on."""
        self._changes += 1
        (self._news if self._is_deciding else self._work).notify()

    def _next(self, ended: _Service | None) -> tuple[T, _Service] | None:
        """The next item; None when the thread should end. `ended` is what it has served."""
        with self._work:
            if ended is not None:
                self._note_end(ended)
        while True:
            with self._work:
                if not self._await_work():
                    self._threads -= 1
                    self._idle -= 1
                    return None
                self._is_deciding = True
                changes, ends, models = self._changes, self._ends, self._to_ask()
            try:
                told = self._ask(models)
            except BaseException:  # a bug: it ends this thread, and must not end the queue
                with self._work:
                    self._is_deciding = False
                    self._threads -= 1
                    self._idle -= 1
                raise
            with self._work:
                # What has begun and ended meanwhile may have evicted what was told to be ready.
                taken = self._take(told) if self._ends == ends else None
                if taken is None and self._changes == changes:
                    settled_s = max(0.001, self._in_flight.settles_in_s(self._clock()))
                    self._news.wait(min(_RECHECK_S, settled_s))
                self._is_deciding = False
                if taken is not None:
                    self._hand_on()
                    return taken

    def _await_work(self) -> bool:
        """Wait until something waits and nobody decides on it; False when the thread should end."""
        while self._is_deciding or not self._waiting:
            if self._is_closed:
                return False
            if not self._work.wait(_IDLE_EXIT_S) and (self._is_deciding or not self._waiting):
                return False
        return True

    def _hand_on(self) -> None:
        """Before the thread that has decided serves, see to it that another one decides."""
        if not self._waiting:
            return
        if self._idle:
            self._work.notify()
        elif self._threads < self._max_threads:
            try:
                self._start_thread()
            except RuntimeError:  # the system gives none: this thread comes back and goes on
                return

    def _note_end(self, ended: _Service) -> None:
        service_s = max(0.0, self._clock() - ended.began_at)
        mean_s = service_s if self._mean_service_s is None else self._mean_service_s
        self._mean_service_s = mean_s + _SMOOTHING * (service_s - mean_s)
        self._busy -= 1
        self._idle += 1
        self._in_flight.end(ended.model)
        self._ends += 1
        self._tell()

    # -- deciding

    def _to_ask(self) -> list[str]:
        """The models whose standings are needed. Loads under way come first: one that shows is
        known before the models are asked about that it evicted."""
        wanted = (one.model for one, _ in self._waiting.values())
        return list(dict.fromkeys([*self._in_flight.loads, *wanted]))

    def _ask(self, models: list[str]) -> dict[str, Standing]:
        """Called with no lock held."""
        return {model: self._state_of(model) or UNKNOWN for model in models}

    def _take(self, told: dict[str, Standing]) -> tuple[T, _Service] | None:
        """Choose among the items whose models' standings are told."""
        now = self._clock()
        self._in_flight.settle(told, now)
        waiting = [one for one, _ in self._waiting.values() if one.model in told]
        self._standings = self._in_flight.judge(told, {one.model for one in waiting})
        self._decision = choose(waiting, self._standings, self._history, now, self._settings)
        pick = self._decision.pick
        if pick is None:
            return None
        standing = self._standings[pick.model]
        is_load = standing.state is ModelState.LOADABLE
        self._history.note(pick, waiting, now, is_load=is_load)
        self._in_flight.begin(pick.model, standing, now)
        self._idle -= 1
        self._busy += 1
        return self._waiting.pop(pick.seq)[1], _Service(pick.model, now)


def _run(
    next_item: Callable[[_Service | None], tuple[T, _Service] | None],
    serve: Callable[[T], None],
) -> None:
    ended: _Service | None = None
    while (taken := next_item(ended)) is not None:
        item, ended = taken
        del taken
        serve(item)
        del item
