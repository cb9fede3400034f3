"""Items on their way to one callback: whoever puts one never waits for it.

The callback runs on a callback thread, for one item at a time, in the order in which they came. One
that blocks holds back its own items alone.
"""

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from orion_oie.callbacks.threads import run
from orion_oie.errors import WorkerError
from orion_oie.threads import Condition

T = TypeVar("T")

LIMIT = 10_000
_AT_EXIT_S = 1.0


class Delivery(Generic[T]):
    """Hands items to `take`, and what that raises to `on_error`, which must not raise.

    `limit` items may wait; then the oldest are lost, and counted.
    """

    def __init__(
        self,
        take: Callable[[T], Any],
        on_error: Callable[[BaseException], None],
        *,
        limit: int = LIMIT,
    ) -> None:
        self._take = take
        self._on_error = on_error
        self._limit = limit
        self._lock = self._changed = Condition()  # a signal handler may call the library, anywhere
        self._items: deque[T] = deque()
        self._put = self._done = self._lost = 0
        self._is_running = self._is_stopped = False
        self._thread: int | None = None
        _all.add(self)

    @property
    def lost(self) -> int:
        """The number of items that were lost because too many waited."""
        return self._lost

    def put(self, item: T) -> None:
        """Add an item. Nothing happens after `stop`."""
        with self._lock:
            if self._is_stopped:
                return
            if len(self._items) >= self._limit:
                self._items.popleft()
                self._lost += 1
                self._done += 1
            self._items.append(item)
            self._put += 1
            if self._is_running:
                return
            self._is_running = True
        self._start()

    def flush(self, timeout_s: float) -> bool:
        """Wait until `take` is through with everything that was put before, for `timeout_s` seconds
        at most; False if it is not. A call from within `take` does not wait."""
        with self._lock:
            if self._done == self._put or self._thread == threading.get_ident():
                return self._done == self._put
            wanted = self._put
            must_start = not self._is_running  # there was no thread for it
            self._is_running = True
        if must_start:
            self._start()
        with self._lock:
            return self._changed.wait_for(lambda: self._done >= wanted, timeout_s)

    def stop(self) -> None:
        """Hand over nothing more: what waits is dropped."""
        with self._lock:
            self._is_stopped = True
            self._done += len(self._items)
            self._items.clear()
            self._changed.notify_all()

    def _start(self) -> None:
        try:
            run(self._run)
        except WorkerError:  # the system gives no thread: the next item, or `flush`, tries again
            with self._lock:
                self._is_running = False

    def _run(self) -> None:
        done = 0
        while True:
            with self._lock:
                self._done += done
                if done:
                    self._changed.notify_all()
                if not self._items:
                    self._is_running, self._thread = False, None
                    return
                self._thread = threading.get_ident()
                item = self._items.popleft()
            try:
                self._take(item)
            except BaseException as error:  # noqa: BLE001 (code of the application)
                self._on_error(error)
            del item
            done = 1


_all: "weakref.WeakSet[Delivery[Any]]" = weakref.WeakSet()


def flush_all(deliveries: "Iterable[Delivery[Any]]", timeout_s: float) -> bool:
    """`Delivery.flush` of several, `timeout_s` seconds at most for all of them together."""
    ends_at = time.monotonic() + timeout_s
    is_through = True
    for one in deliveries:
        is_through = one.flush(max(0.0, ends_at - time.monotonic())) and is_through
    return is_through


def _flush_at_exit() -> None:
    flush_all(list(_all), _AT_EXIT_S)


atexit.register(_flush_at_exit)
if hasattr(os, "register_at_fork"):  # those of its parent are not the fork's to wait for
    os.register_at_fork(after_in_child=_all.clear)
