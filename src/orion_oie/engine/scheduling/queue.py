"""The queue of requests: bounded, and served by threads that exist only while there is work.

`policy.py` chooses the next request, from the state of the queue (who waits, what runs) and the
availability of the models. The queue loads nothing and knows nothing of memory. A thread without
work ends after a while, so an idle engine has none.

Threads that wait for a model to arrive do not count towards their limit, and have one of their own:
so requests for models that come late, or never, take no thread from requests for models in memory.

What waits is one dictionary, changed in one step: `_waiting`. The lines are made from it anew if an
interrupt (Ctrl-C) tore them.

At any time at most one thread decides, with no lock held while it asks for the availability of the
models. While something waits there is such a thread, unless all of them are busy. When it finds
nothing that can be served, it waits for news; a thread that has just served a request takes its
place, decides at once, and gives the place back: so a served request costs no switch of threads.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from orion_oie.engine.scheduling.history import History, Settings
from orion_oie.engine.scheduling.in_flight import InFlight
from orion_oie.engine.scheduling.lines import Lines, Waiting
from orion_oie.engine.scheduling.places import Places
from orion_oie.engine.scheduling.policy import Decision, choose, order, why
from orion_oie.engine.scheduling.seats import Mutex, Seat
from orion_oie.errors import EngineClosedError, QueueFullError, WorkerError
from orion_oie.schemas.availability import UNKNOWN, Availability, ModelState
from orion_oie.threads import start_thread

T = TypeVar("T")

_IDLE_EXIT_S = 5.0
_RECHECK_S = 1.0  # the time between two decisions if no change is reported
_FRESH_S = 0.005  # how long an answer about the models serves for further decisions
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
class Delay:
    """The reason that an item waits, a sentence, and the models that have to become idle first."""

    model: str
    reason: str
    blockers: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Service:
    """One item being served."""

    model: str
    began_at: float


class RequestQueue(Generic[T]):
    """Runs `serve(item)` for every item: at most `max_threads` at the same time, and as many that
    wait for their model to arrive; `per_model` of them for one model. `limit` items may wait beside
    those that are about to be served.

    availability_of: the availability of a model; None if unknown, which counts as loadable. It need
        not count running requests: the queue detects FULL itself. Whatever changes its answers
        calls `notify`.
    turn_s, aging_s: see `policy.Settings`. clock: seconds.

    Neither `serve` nor `availability_of` should raise: that ends a thread, as any error does. Both
    are called with no lock held, and the threads hold nothing else.

    A call that is interrupted (Ctrl-C) has done nothing, or all. If `put` raises, the item does not
    wait, unless the interrupt came after everything: then it may be served, and be taken back.
    """

    def __init__(
        self,
        serve: Callable[[T], None],
        *,
        limit: int,
        availability_of: Callable[[str], Availability | None],
        per_model: int,
        max_threads: int,
        turn_s: float = 10.0,
        aging_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serve = serve
        self._limit = limit
        self._availability_of = availability_of
        self._max_threads = max_threads
        self._settings = Settings(turn_s, aging_s)
        self._clock = clock
        self._lock = Mutex()
        self._changes = self._ends = 0
        self._arrivals = 0
        self._waiting: dict[int, tuple[Waiting, T]] = {}
        self._seq_of: dict[int, int] = {}  # by the identity of the item
        self._lines = Lines()
        self._is_torn = False  # the two may not be made of what waits
        self._forecast: Places | None = None
        self._in_flight = InFlight(per_model)
        self._history = History()
        self._news = object()  # another one for each change of availability that is reported
        self._shown: dict[str, Availability] = {}  # at the last answer, which came at that time
        self._shown_at, self._shown_news = -math.inf, self._news
        self._availability: dict[str, Availability] = {}  # at the last decision, as its holds
        self._decision = Decision(None, "", {})
        self._mean_service_s: float | None = None
        self._active_at = clock()
        self._threads = self._idle = self._busy = 0
        self._coming: set[Seat] = set()  # of threads that were started and do not count yet
        self._free_seats: list[Seat] = []  # of threads that wait for work, the last one on top
        self._decider: Seat | None = None
        self._waking: Seat | None = None  # is woken to decide, and has not done so yet
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
        served, an estimate of the time until there is a place.
        """
        with self._lock:
            self._mend()
            if self._is_closed:
                raise EngineClosedError("the engine was shut down")
            waiting = len(self._waiting) - self._about_to_run()
            if waiting >= self._limit:
                raise self._full(waiting)
            if not self._idle and not self._coming and self._threads < self._thread_limit():
                self._start_thread()
            now = self._clock()
            if not self._waiting:
                self._active_at = now
            self._arrivals += 1
            one = Waiting(self._arrivals, model, agent, session, priority, now)
            try:
                self._is_torn = True
                self._waiting[one.seq] = (one, item)
                self._seq_of[id(item)] = one.seq
                self._lines.add(one)
                self._is_torn = False
                self._note_change()
            except BaseException:  # an interrupt
                self._waiting.pop(one.seq, None)
                self._is_torn = True
                raise

    def remove(self, item: T) -> bool:
        """Take back an item that is still waiting; False when it is not."""
        with self._lock:
            self._mend()
            seq = self._seq_of.get(id(item))
            if seq is None:
                return False
            waiting = self._waiting[seq]
            try:
                self._pop(seq)
                self._note_change()  # it may have held others back
            except BaseException:  # an interrupt
                self._waiting[seq] = waiting
                self._is_torn = True
                raise
            return True

    def close(self) -> list[T]:
        """Refuse new items and return those that will not be served, the oldest first. If it is
        interrupted, they are returned by the next call."""
        with self._lock:
            self._is_closed = True
            self._changes += 1
            for seat in self._free_seats:
                seat.wake()
            if self._decider is not None:
                self._decider.wake()
            self._mend()
            rest = [item for _one, item in self._waiting.values()]
            self._waiting, self._is_torn = {}, True
            return rest

    def notify(self) -> None:
        """Decide again: the availability of a model has changed. May be called with locks held
        that `availability_of` takes."""
        self._news = object()
        if not self._waiting:
            return  # what is put later is decided on with the availability of then
        with self._lock:
            self._note_change()

    def position(self, item: T) -> int | None:
        """The place of a waiting item, 1 for the next; None when it does not wait. An estimate: it
        ignores durations and later arrivals. Where very many wait, it is up to a second old."""
        with self._lock:
            self._mend()
            seq, forecast = self._seq_of.get(id(item)), self._forecast
            if seq is None:
                return None
            if forecast is not None and forecast.is_of_use(self._changes):
                position = forecast.position(seq)
                if position is not None:
                    return position
        self._foresee()
        with self._lock:
            forecast = self._forecast
            position = None if forecast is None else forecast.position(seq)
        return position  # noqa: RET504 (an interrupt between a call and the end of a `with`)

    def waiting(self) -> list[WaitingItem[T]]:
        """The waiting items, in the order in which they would be served now, with their reasons."""
        ordered, delays = self._foresee(), self.delays()
        with self._lock:
            items = {one.seq: item for one, item in self._waiting.values()}
        now = self._clock()
        left = [(one, items[one.seq]) for one in ordered if one.seq in items]
        listed = [(one, item, delays[item]) for one, item in left if item in delays]
        return [
            WaitingItem(
                item,
                one.model,
                one.priority,
                position,
                max(0.0, now - one.arrived_at),
                delay.reason,
            )
            for position, (one, item, delay) in enumerate(listed, 1)
        ]

    def delays(self) -> dict[T, Delay]:
        """The reasons that the waiting items wait."""
        shown = self._ask(list(self._lines_now()))
        with self._lock:
            self._mend()
            availability = self._in_flight.judge(shown, self._lines.counts)
            decision = choose(
                self._lines, availability, self._history, self._clock(), self._settings
            )
            waiting = list(self._waiting.values())
            is_limit_reached = self._running() >= self._max_threads
        limit = f"{self._max_threads} requests are served, which is the limit"
        by_model: dict[str, Delay] = {}
        delays: dict[T, Delay] = {}
        for one, item in waiting:
            delay = by_model.get(one.model)
            if delay is None or one == decision.pick:
                reason = limit if is_limit_reached else why(one, availability, decision)
                blockers = availability.get(one.model, UNKNOWN).blockers
                delay = Delay(one.model, reason, blockers)
                if one != decision.pick:
                    by_model[one.model] = delay
            delays[item] = delay
        return delays

    def quiet_s(self) -> float:
        """Seconds since something was put into the empty queue, or was taken to be served, or
        ended; 0 while nothing waits."""
        with self._lock:
            return max(0.0, self._clock() - self._active_at) if self._waiting else 0.0

    def _foresee(self) -> list[Waiting]:
        """What waits, in its order, which is kept as the forecast."""
        shown = self._ask(list(self._lines_now()))
        with self._lock:
            self._mend()
            began_at = time.monotonic()
            ordered = self._order(self._in_flight.judge(shown, self._lines.counts))
            self._forecast = Places.of(ordered, self._changes, began_at)
        return ordered

    def _order(self, availability: Mapping[str, Availability]) -> list[Waiting]:
        return order(self._lines, availability, self._history, self._clock(), self._settings)

    def _lines_now(self) -> Sequence[str]:
        """The models whose availability is needed."""
        with self._lock:
            self._mend()
            models = self._to_ask()
        return models  # noqa: RET504 (see `position`)

    # -- how much may wait

    def _about_to_run(self) -> int:
        """The number of items that free threads are about to take, which need no place."""
        if len(self._waiting) < self._limit:
            return 0
        free = max(0, self._max_threads - self._running())
        wanted = self._lines.counts.items()
        return min(free, sum(min(n, self._places(model)) for model, n in wanted))

    def _places(self, model: str) -> int:
        if self._availability.get(model, UNKNOWN).blockers or model in self._decision.holds:
            return 0
        return self._in_flight.places(model)

    def _has_places(self) -> bool:
        return any(map(self._in_flight.places, self._lines.counts))

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

    # -- the threads. One that counts is idle until it has taken something.

    def _running(self) -> int:
        """The number of items that are served by models in memory."""
        return self._busy - self._in_flight.arriving

    def _thread_limit(self) -> int:
        """How many threads there may be now."""
        return self._max_threads + min(self._max_threads, self._in_flight.arriving)

    def _start_thread(self) -> None:
        name = f"orion-request-{self._threads + len(self._coming) + 1}"
        seat = Seat()
        run = (self._enter, self._next, self._lose, self._serve, seat)
        try:
            self._coming.add(seat)
            start_thread(lambda: _run(*run), name)
        except BaseException:  # if it comes all the same, it counts from then on
            self._coming.discard(seat)
            raise

    def _enter(self, seat: Seat) -> None:
        """Count a thread, which has begun."""
        with self._lock:
            self._coming.discard(seat)
            self._threads += 1
            self._idle += 1

    def _lose(self, ended: _Service | None) -> None:
        """Count a thread no more, which ends by an error, and have another one go on."""
        with self._lock:
            self._mend()
            if ended is not None:
                self._note_end(ended)
                self._threads -= 1
                self._idle -= 1
                self._note_change()
            else:
                self._threads -= 1
                self._idle -= 1
                self._changes += 1
                self._wake_one()  # none is started: it might end in the same way

    def _note_change(self) -> None:
        """Have a decision made on what has changed."""
        self._changes += 1
        if self._decider is not None:
            if self._decider.awaits_news:
                self._decider.wake()
        else:
            self._have_decided()

    def _have_decided(self) -> None:
        """Have a thread decide, if something waits: one that waits for work, or a new one."""
        if not self._waiting:
            return
        if self._free_seats:
            self._wake_one()
        elif not self._idle and not self._coming and self._threads < self._thread_limit():
            # If the system gives none, one that serves comes back and goes on.
            with contextlib.suppress(WorkerError):
                self._start_thread()

    def _wake_one(self) -> None:
        """Wake a thread that waits for work, unless one is on its way."""
        if self._waking is None and self._free_seats:
            self._free_seats[-1].wake()  # first: an interrupt behind it does no harm
            self._waking = self._free_seats.pop()

    def _next(self, seat: Seat, ended: _Service | None) -> tuple[T, _Service] | None:
        """The next item; None when the thread should end. `ended` is what it has served."""
        relieved: Seat | None = None
        while True:
            with self._lock:
                self._mend()
                if ended is not None:
                    relieved, ended = self._take_place(seat, ended), None
                if self._decider is not seat and not self._await_work(seat):
                    self._threads -= 1
                    self._idle -= 1
                    return None
                shown = self._shown_lately()
                taken = None if shown is None else self._take(shown)
                if taken is not None:
                    self._hand_on(relieved)
                    return taken
                changes, ends, models = self._changes, self._ends, self._to_ask()
                news = self._news
            try:
                shown = self._ask(models)
            except BaseException:  # a bug: it ends this thread, and must not end the queue
                with self._lock:
                    self._decider = None
                raise
            with self._lock:
                self._mend()
                # A request that began and ended meanwhile may have evicted a model shown as ready.
                if self._ends == ends:
                    self._shown, self._shown_at, self._shown_news = shown, self._clock(), news
                    taken = self._take(shown)
                if taken is not None:
                    self._hand_on(relieved)
                    return taken
                if self._changes == changes:
                    if relieved in self._free_seats:
                        relieved.wake()  # it is not needed any more, and ends like any idle thread
                    relieved = None
                    self._await_news(seat)

    def _take_place(self, seat: Seat, ended: _Service) -> "Seat | None":
        """Note the end of a service, and become the one that decides if there is something to
        decide. Returns the seat of the thread that waited for news, if there was one."""
        self._note_end(ended)
        self._changes += 1
        decider = self._decider
        if not self._waiting or (decider is not None and not decider.awaits_news):
            return None
        self._decider = seat
        if decider is not None:
            decider.awaits_news = False
            self._free_seats.append(decider)
        return decider

    def _await_work(self, seat: Seat) -> bool:
        """Become the one that decides, once something waits and nobody else does; False when the
        thread should end."""
        while self._decider is not None or not self._waiting:
            if self._is_closed:
                return False
            if not self._await(seat, _IDLE_EXIT_S) and (
                self._decider is not None or not self._waiting
            ):
                return False
        self._decider = seat
        return True

    def _await(self, seat: Seat, timeout_s: float) -> bool:
        """Wait for work; False after `timeout_s` seconds without any."""
        self._free_seats.append(seat)
        is_awake = self._sleep(seat, timeout_s)
        if seat in self._free_seats:
            self._free_seats.remove(seat)
        return is_awake

    def _sleep(self, seat: Seat, timeout_s: float) -> bool:
        """Sleep with the lock released."""
        self._lock.release()
        try:
            return seat.sleep(timeout_s)
        finally:
            self._lock.take()
            self._mend()
            if self._waking is seat:
                self._waking = None

    def _await_news(self, seat: Seat) -> None:
        """Wait until there may be something to decide. Another thread may take the place."""
        if not self._waiting:
            self._decider = None
            return
        settled_s = max(0.001, self._in_flight.settles_in_s(self._clock()))
        seat.awaits_news = seat.is_asleep = True
        self._sleep(seat, min(_RECHECK_S, settled_s))
        seat.awaits_news = seat.is_asleep = False
        if seat in self._free_seats:
            self._free_seats.remove(seat)

    def _hand_on(self, relieved: "Seat | None") -> None:
        """Make another thread decide before the one that has decided serves.

        1. If all waiting requests are for full models, nothing can be served before the next one
           ends: the thread whose place it took gets it back, still asleep.
        2. Otherwise a thread that waits for work is woken.
        3. If there is none, a new one is started.
        """
        self._decider = None
        if not self._waiting:
            return
        if relieved is not None and relieved.is_asleep and not self._has_places():
            self._free_seats.remove(relieved)
            relieved.awaits_news = True
            self._decider = relieved
        else:
            self._have_decided()

    def _note_end(self, ended: _Service) -> None:
        service_s = max(0.0, self._clock() - ended.began_at)
        mean_s = service_s if self._mean_service_s is None else self._mean_service_s
        self._mean_service_s = mean_s + _SMOOTHING * (service_s - mean_s)
        self._busy -= 1
        self._idle += 1
        self._active_at = self._clock()
        if self._in_flight.loads:
            self._shown_at = -math.inf  # the models that it evicted may be shown as ready
        self._in_flight.end(ended.model)
        self._ends += 1

    # -- deciding

    def _to_ask(self) -> list[str]:
        """The models whose availability is needed. Loads under way come first: a load that shows
        must be seen before the models that it evicted are asked about."""
        return list(dict.fromkeys([*self._in_flight.loads, *self._lines.counts]))

    def _shown_lately(self) -> dict[str, Availability] | None:
        """The availability of all models that are waited for, if it was asked for just now and no
        change was reported since; None if it must be asked for."""
        if self._shown_news is not self._news or self._clock() - self._shown_at > _FRESH_S:
            return None
        return self._shown if self._lines.counts.keys() <= self._shown.keys() else None

    def _ask(self, models: list[str]) -> dict[str, Availability]:
        """Ask for the availability of models, with no lock held."""
        return {model: self._availability_of(model) or UNKNOWN for model in models}

    def _take(self, shown: dict[str, Availability]) -> tuple[T, _Service] | None:
        """Remove and return the next item, if any can be served."""
        now = self._clock()
        self._in_flight.settle(shown, now)
        wanted = self._lines.counts
        self._availability = self._in_flight.judge(shown, [m for m in wanted if m in shown])
        excluded = [model for model in wanted if model not in shown or self._is_beyond(model)]
        self._decision = choose(
            self._lines,
            {**self._availability, **dict.fromkeys(excluded, _EXCLUDED)},
            self._history,
            now,
            self._settings,
        )
        pick = self._decision.pick
        if pick is None:
            return None
        found = self._availability[pick.model]
        if found.is_loadable:
            self._shown_at = -math.inf  # what it evicts is not ready any more
        self._history.note(pick, self._lines, now, is_load=found.is_loadable)
        self._in_flight.begin(pick.model, found, now)
        self._idle -= 1
        self._busy += 1
        self._active_at = now
        return self._pop(pick.seq), _Service(pick.model, now)

    def _is_beyond(self, model: str) -> bool:
        """True when no thread may serve a model now: there is a limit to those for models in
        memory, and one to those that wait for their model."""
        if self._in_flight.must_arrive(model, self._availability[model]):
            return self._in_flight.arriving >= self._max_threads
        return self._running() >= self._max_threads

    def _pop(self, seq: int) -> T:
        """Take an item out of all that waits."""
        self._is_torn = True
        one, item = self._waiting.pop(seq)
        del self._seq_of[id(item)]
        self._lines.remove(one)
        self._is_torn = False
        if self._forecast is not None:
            self._forecast.leave(seq)
        return item

    def _mend(self) -> None:
        """Make anew what an interrupt tore."""
        if self._is_torn:
            self._seq_of = {id(item): seq for seq, (_one, item) in self._waiting.items()}
            self._lines = Lines(one for one, _item in self._waiting.values())
            self._forecast = None
            self._is_torn = False


_EXCLUDED = Availability(ModelState.FULL)  # keeps a model out of this decision


def _run(
    enter: Callable[[Seat], None],
    next_item: Callable[[Seat, _Service | None], tuple[T, _Service] | None],
    lose: Callable[[_Service | None], None],
    serve: Callable[[T], None],
    seat: Seat,
) -> None:
    enter(seat)
    ended: _Service | None = None
    served: _Service | None = None
    try:
        while (taken := next_item(seat, ended)) is not None:
            item, served = taken
            del taken
            serve(item)
            ended, served = served, None
            del item
    except BaseException:
        lose(served)
        raise
