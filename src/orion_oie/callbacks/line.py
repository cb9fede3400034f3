"""Callbacks that need not wait for each other: begun in their order, each on a callback thread."""

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
        self._is_starting = False

    def put(self, callback: Callable[[], None]) -> None:
        """Call `callback` soon; returns at once."""
        with self._changed:
            self._waiting.append(callback)
            must_start = self._must_start()
        if must_start:
            self._start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all have returned, for `timeout_s` seconds at most; False if they have not. A
        callback that calls this does not wait for itself."""
        own = threading.get_ident()
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._waiting and self._running <= {own}, timeout_s
            )

    def _must_start(self) -> bool:
        """Note that a thread is started, if one is needed."""
        is_needed = self._waiting and not self._is_starting and len(self._running) < self._limit
        self._is_starting = self._is_starting or bool(is_needed)
        return bool(is_needed)

    def _start(self) -> None:
        try:
            run(self._run)
        except WorkerError:  # the system gives no thread: the next callback tries again
            with self._changed:
                self._is_starting = False

    def _run(self) -> None:
        own = threading.get_ident()
        with self._changed:
            self._is_starting = False
            self._running.add(own)
        while True:
            with self._changed:
                if not self._waiting:
                    self._running.discard(own)
                    self._changed.notify_all()
                    return
                callback = self._waiting.popleft()
                must_start = self._must_start()
            if must_start:
                self._start()
            callback()
            del callback
