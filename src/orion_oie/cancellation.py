"""Cancellation of requests: the `CancelScope` is the single way to stop one.

A cancel by the caller, a deadline and a shutdown all call `scope.cancel(error)`. The stage that the
request is in (waiting in the queue, waiting for a load, generating) has registered a callback for
that. No thread is interrupted.
"""

import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue

from orion_oie.callbacks import host_log
from orion_oie.errors import DeadlineExceededError, OrionError
from orion_oie.threads import Condition, start_thread

_IDLE_EXIT_S = 5.0
_HURRY_S = 0.05  # after that long behind a slow callback, the next ones get another thread
_ENDERS = 32
_FORGOTTEN = 64  # at least that many entries without a scope before they are swept out


class CancelScope:
    """Holds the error that ends a request, set at most once, and notifies its callbacks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._next_key = 0
        self._error: OrionError | None = None

    @property
    def error(self) -> OrionError | None:
        """The reason why the request must end; None while it may go on."""
        return self._error

    def cancel(self, error: OrionError) -> bool:
        """End the request with `error`. Returns False if it was cancelled before."""
        callbacks = self.set_error(error)
        if callbacks is None:
            return False
        run_callbacks(callbacks)
        return True

    def set_error(self, error: OrionError) -> Sequence[Callable[[], None]] | None:
        """Cancel without calling anybody: returns the callbacks, which the caller has to run by
        `run_callbacks`. None if it was cancelled before."""
        with self._lock:
            if self._error is not None:
                return None
            self._error = error
            callbacks = list(self._callbacks.values())
            self._callbacks.clear()
        return callbacks

    def check(self) -> None:
        """Raise the error of the scope if it was cancelled."""
        if self._error is not None:
            raise self._error

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` once when the scope is cancelled, or now if it already is. Returns a
        function that removes the callback.

        The callback runs on the thread that cancels, so it must be short and must not block.
        """
        with self._lock:
            if self._error is None:
                key, self._next_key = self._next_key, self._next_key + 1
                self._callbacks[key] = callback
                return partial(self._forget, key)
        callback()
        return lambda: None

    def _forget(self, key: int) -> None:
        with self._lock:
            self._callbacks.pop(key, None)


def run_callbacks(callbacks: Sequence[Callable[[], None]]) -> None:
    """Run the callbacks of a cancelled scope. Each runs, whatever the others raise."""
    for callback in callbacks:
        try:
            callback()
        except Exception as failure:  # noqa: BLE001 (its own code, and others must still run)
            host_log.log(logging.ERROR, "a cancel callback failed", error=failure)


class DeadlineTimer:
    """Cancels scopes when their time is up. Its thread runs only while deadlines are pending.

    That thread sets the errors, and nothing else: callbacks may be anybody's code, and run on other
    threads, so that a slow one delays no deadline.
    """

    def __init__(self) -> None:
        self._condition = self._lock = Condition()
        self._pending: list[_Deadline] = []
        self._of_scope: dict[CancelScope, list[_Deadline]] = {}
        self._forgotten = 0  # of those that are pending
        self._order = itertools.count()
        self._running = False
        self._enders = _Enders()

    def watch(self, scope: CancelScope, deadline_s: float) -> None:
        """Cancel `scope` with `DeadlineExceededError` after `deadline_s` seconds."""
        entry = _Deadline(time.monotonic() + deadline_s, next(self._order), scope, deadline_s)
        with self._lock:
            if not self._running:
                start_thread(self._run, "orion-deadlines")
                self._running = True
            self._of_scope.setdefault(scope, []).append(entry)
            heapq.heappush(self._pending, entry)
            if self._pending[0] is entry:
                self._condition.notify()

    def forget(self, scope: CancelScope) -> None:
        """Stop watching `scope`: its request is over."""
        with self._lock:
            for entry in self._of_scope.pop(scope, ()):
                entry.scope = None
                self._forgotten += 1
            if self._forgotten > max(_FORGOTTEN, len(self._pending) // 2):
                self._pending = [one for one in self._pending if one.scope is not None]
                heapq.heapify(self._pending)
                self._forgotten = 0
            if self._running and not self._of_scope:
                self._condition.notify()  # it need not wait for what was forgotten

    def _run(self) -> None:
        while self._fire_next():
            pass  # the call returns each time, so that waiting keeps no reference to a request

    def _fire_next(self) -> bool:
        due = self._next_due()
        if due is None:
            return False
        for scope, deadline_s in due:
            callbacks = scope.set_error(
                DeadlineExceededError(
                    f"the deadline of {deadline_s:g} s passed before the answer was complete; "
                    "allow more time or ask for fewer tokens (max_tokens)",
                    deadline_s=deadline_s,
                )
            )
            if callbacks:
                self._enders.add(callbacks)
        self._enders.hurry()
        return True

    def _next_due(self) -> "list[tuple[CancelScope, float]] | None":
        """Wait until something is due, or callbacks need another thread; None after a while without
        any deadline."""
        with self._lock:
            while True:
                self._drop_forgotten()
                now = time.monotonic()
                due = []
                while self._pending and self._pending[0].at_s <= now:
                    entry = heapq.heappop(self._pending)
                    if entry.scope is None:
                        self._forgotten -= 1
                    else:
                        due.append((entry.scope, entry.deadline_s))
                        self._take_off(entry, entry.scope)
                if due:
                    return due
                left_s = self._pending[0].at_s - now if self._pending else _IDLE_EXIT_S
                if self._enders.is_behind():
                    self._condition.wait(min(left_s, _HURRY_S))
                    return []
                is_told = self._condition.wait(min(left_s, threading.TIMEOUT_MAX))
                if not is_told and not self._pending:
                    self._running = False
                    return None

    def _take_off(self, entry: "_Deadline", scope: CancelScope) -> None:
        """Forget an entry that fires."""
        entries = self._of_scope[scope]
        entries.remove(entry)
        if not entries:
            del self._of_scope[scope]

    def _drop_forgotten(self) -> None:
        while self._pending and self._pending[0].scope is None:
            heapq.heappop(self._pending)
            self._forgotten -= 1


class _Deadline:
    """A scope to cancel at some time; without its scope once it is forgotten."""

    __slots__ = ("at_s", "deadline_s", "order", "scope")

    def __init__(self, at_s: float, order: int, scope: CancelScope, deadline_s: float) -> None:
        self.at_s = at_s
        self.order = order
        self.scope: CancelScope | None = scope
        self.deadline_s = deadline_s

    def __lt__(self, other: "_Deadline") -> bool:
        return (self.at_s, self.order) < (other.at_s, other.order)


class _Enders:
    """Threads that run the callbacks of cancelled scopes: one, and more behind slow ones."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Sequence[Callable[[], None]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._began = 0  # callbacks that a thread has taken
        self._seen = -1  # of those, when the timer looked last
        self._looked_at = -math.inf

    def add(self, callbacks: Sequence[Callable[[], None]]) -> None:
        """Have callbacks run."""
        self._jobs.put(callbacks)

    def is_behind(self) -> bool:
        """True while callbacks wait for a thread."""
        return not self._jobs.empty()

    def hurry(self) -> None:
        """Start a thread if callbacks wait for one: the first, or another if none was taken for
        `_HURRY_S`. Called by the timer."""
        if self._jobs.empty():
            return
        with self._lock:
            now = time.monotonic()
            if self._threads and self._began != self._seen:
                self._seen, self._looked_at = self._began, now
                return
            if self._threads and now - self._looked_at < _HURRY_S:
                return
            if self._threads >= _ENDERS:
                return
            self._looked_at = now
            try:
                threading.Thread(target=self._run, name="orion-deadline-end", daemon=True).start()
            except RuntimeError:  # the system gives none now: the timer comes back
                return
            self._threads += 1

    def _run(self) -> None:
        while self._run_next():
            pass  # as in the timer: waiting keeps no reference to a request

    def _run_next(self) -> bool:
        try:
            callbacks = self._jobs.get(timeout=_IDLE_EXIT_S)
        except Empty:
            with self._lock:
                if not self._jobs.empty():
                    return True
                self._threads -= 1
                return False
        self._began += 1
        run_callbacks(callbacks)
        return True
