"""Callbacks that need not wait for each other: begun in their order, each on a callback thread."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable

from orion_oie.callbacks.threads import run
from orion_oie.errors import WorkerError
from orion_oie.threads import Condition

LIMIT = 256


class CallbackLine:
    """Calls callbacks, `limit` of them at the same time at most. They must not raise.

    A thread that takes one starts the next thread before it calls it, so one that blocks holds back
    none of the others.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._changed = Condition()  # reentrant: a signal handler may call the library
        self._waiting: deque[Callable[[], None]] = deque()
        self._running: set[int] = set()  # threads
        self._is_coming = False  # a thread

    def put(self, callback: Callable[[], None]) -> None:
        """Call `callback` soon; returns at once."""
        with self._changed:
            self._waiting.append(callback)
            self._have_taken()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all have returned, for `timeout_s` seconds at most; False if they have not. A
        callback that calls this does not wait for itself."""
        own = threading.get_ident()
        with self._changed:
            self._have_taken()
            return self._changed.wait_for(
                lambda: not self._waiting and self._running <= {own}, timeout_s
            )

    def _have_taken(self) -> None:
        """See to it that a thread takes the next one. If the system gives none, the next callback
        tries again. So it is after an interrupt: only what is there by then is noted."""
        if self._waiting and not self._is_coming and len(self._running) < self._limit:
            with contextlib.suppress(WorkerError):
                run(self._run)
                self._is_coming = True

    def _run(self) -> None:
        own = threading.get_ident()
        with self._changed:
            self._is_coming = False
            self._running.add(own)
        try:
            while self._call_next():
                pass  # the call returns each time, so that no callback is kept
        finally:
            with self._changed:
                self._running.discard(own)
                self._changed.notify_all()

    def _call_next(self) -> bool:
        with self._changed:
            if not self._waiting:
                self._running.discard(threading.get_ident())  # before anything else may be put
                return False
            callback = self._waiting.popleft()
            self._have_taken()
        callback()
        return True
