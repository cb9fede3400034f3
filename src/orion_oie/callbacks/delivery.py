"""Items on their way to one callback: whoever puts one never waits for it.

The callback runs on a callback thread, for one item at a time, in the order in which they came. One
that blocks holds back its own items alone.
"""

import atexit
import contextlib
import itertools
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
        self._items: deque[tuple[int, T]] = deque()
        self._numbers = itertools.count()
        self._current: int | None = None  # the number of the item that `take` has
        self._lost = 0
        self._is_stopped = False
        self._is_coming = False
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
            self._items.append((next(self._numbers), item))
            self._have_handed_on()

    def flush(self, timeout_s: float) -> bool:
        """Wait until `take` is through with everything that was put before, for `timeout_s` seconds
        at most; False if it is not. A call from within `take` does not wait."""
        with self._lock:
            last = self._items[-1][0] if self._items else self._current
            if last is None:
                return True
            if self._thread == threading.get_ident():
                return False
            self._have_handed_on()
            return self._changed.wait_for(lambda: self._is_through(last), timeout_s)

    def stop(self) -> None:
        """Hand over nothing more: what waits is dropped."""
        with self._lock:
            self._is_stopped = True
            self._items.clear()
            self._changed.notify_all()

    def _is_through(self, last: int) -> bool:
        return (not self._items or self._items[0][0] > last) and (
            self._current is None or self._current > last
        )

    def _have_handed_on(self) -> None:
        """See to it that a thread hands the items on. If the system gives none, the next item or
        `flush` tries again. So it is after an interrupt: only what is there by then is noted."""
        if self._items and self._thread is None and not self._is_coming:
            with contextlib.suppress(WorkerError):
                run(self._run)
                self._is_coming = True

    def _run(self) -> None:
        with self._lock:
            self._is_coming = False
            if self._thread is not None:
                return
            self._thread = threading.get_ident()
        try:
            while self._hand_on_next():
                pass  # the call returns each time, so that no item is kept
        except BaseException:  # of `on_error`, which must not raise: others go on
            with self._lock:
                self._thread = self._current = None
                self._changed.notify_all()
            raise

    def _hand_on_next(self) -> bool:
        with self._lock:
            if self._current is not None:
                self._current = None
                self._changed.notify_all()
            if not self._items:
                self._thread = None
                return False
            self._current, item = self._items.popleft()
        try:
            self._take(item)
        except BaseException as error:  # noqa: BLE001 (code of the application)
            self._on_error(error)
        return True


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
