"""Cancellation of requests: the `CancelScope` is the single way to stop one.

A cancel by the caller, a deadline and a shutdown all call `scope.cancel(error)`. The stage that the
request is in (waiting in the queue, waiting for a load, generating) has registered a callback for
that. No thread is interrupted.
"""

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from orion_oie.errors import DeadlineExceededError, OrionError
from orion_oie.threads import Condition, start_thread

_IDLE_EXIT_S = 5.0


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
        with self._lock:
            if self._error is not None:
                return False
            self._error = error
            callbacks = list(self._callbacks.values())
            self._callbacks.clear()
        for callback in callbacks:
            try:
                callback()
            except Exception:
                # The other callbacks must still run, and the cancelling thread must not fail.
                logging.getLogger("orion_oie").exception("a cancel callback failed")
        return True

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


class DeadlineTimer:
    """Cancels scopes when their time is up. Its thread runs only while deadlines are pending."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._pending: list[tuple[float, int, CancelScope, float]] = []
        self._order = itertools.count()
        self._running = False

    def watch(self, scope: CancelScope, deadline_s: float) -> None:
        """Cancel `scope` with `DeadlineExceededError` after `deadline_s` seconds."""
        entry = (time.monotonic() + deadline_s, next(self._order), scope, deadline_s)
        with self._condition:
            if not self._running:
                start_thread(self._run, "orion-deadlines")
                self._running = True
            heapq.heappush(self._pending, entry)
            self._condition.notify()

    def forget(self, scope: CancelScope) -> None:
        """Stop watching `scope`: its request is over."""
        with self._condition:
            kept = [entry for entry in self._pending if entry[2] is not scope]
            if len(kept) != len(self._pending):
                self._pending = kept
                heapq.heapify(self._pending)
                self._condition.notify()

    def _run(self) -> None:
        while self._fire_next():
            pass  # the call returns each time, so that waiting keeps no reference to a request

    def _fire_next(self) -> bool:
        due = self._next_due()
        if due is None:
            return False
        scope, deadline_s = due
        scope.cancel(
            DeadlineExceededError(
                f"the deadline of {deadline_s:g} s passed before the answer was complete; "
                "allow more time or ask for fewer tokens (max_tokens)",
                deadline_s=deadline_s,
            )
        )
        return True

    def _next_due(self) -> tuple[CancelScope, float] | None:
        """Wait for the next scope that is due; None after a while without any deadline."""
        with self._condition:
            while True:
                if not self._pending:
                    if not self._condition.wait(_IDLE_EXIT_S) and not self._pending:
                        self._running = False
                        return None
                    continue
                left_s = self._pending[0][0] - time.monotonic()
                if left_s <= 0:
                    _, _, scope, deadline_s = heapq.heappop(self._pending)
                    return scope, deadline_s
                self._condition.wait(min(left_s, threading.TIMEOUT_MAX))
