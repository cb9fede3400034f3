"""Threads, conditions, events and futures that the handler of a signal cannot break.

Python runs such a handler between two instructions of the main thread. It may raise there, as
Ctrl-C does, and whatever it calls finds the locks taken that its own thread holds. So what must be
done as a whole is done by `unbroken`, on another thread. It knows nothing of what is done.
"""

import concurrent.futures
import contextlib
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Generic, TypeVar

from orion_oie.errors import WorkerError

T = TypeVar("T")

_LOOK_S = 0.2
_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
# The commands are an application of the library, like others.
_COMMANDS = os.path.join(_PACKAGE, "cli") + os.sep, os.path.join(_PACKAGE, "__main__.py")


class Condition:
    """Like `threading.Condition` with a lock of its own, but `with` takes and releases the lock in
    one step each. That one does so in Python functions: Ctrl-C there leaves it taken for ever.

    May be entered again by its thread, but waited for only by one that entered it once.
    """

    __slots__ = ("__dict__", "__enter__", "__exit__")  # those of the lock, not functions of ours

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()  # its type has no public name
        self.__enter__: Callable[[], bool] = self._lock.__enter__
        self.__exit__: Callable[..., None] = self._lock.__exit__
        self._waiters: deque[threading.Lock] = deque()

    def acquire(self) -> None:
        """Take the lock; `with` is safer."""
        self._lock.acquire()

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for a notification, with the lock released; False after `timeout` seconds."""
        gate = threading.Lock()
        gate.acquire()
        self._waiters.append(gate)
        is_released = False
        try:
            is_released = True  # no call stands between this and the next step
            self._lock.release()
            return _acquired(gate, timeout)
        finally:
            if is_released:
                try:
                    self._lock.acquire()
                except BaseException:  # a signal came before, or after
                    if not self._lock._is_owned():
                        self._lock.acquire()
                    raise
            with contextlib.suppress(ValueError):  # it was notified
                self._waiters.remove(gate)

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until `predicate()` is true; False after `timeout` seconds."""
        ends_at = None if timeout is None else time.monotonic() + timeout
        while not predicate():
            left = None if ends_at is None else ends_at - time.monotonic()
            if left is not None and left <= 0:
                return False
            self.wait(left)
        return True

    def notify_all(self) -> None:
        """End the wait of all who wait."""
        while self._waiters:
            self._waiters.popleft().release()

    notify = notify_all


class Event:
    """Like `threading.Event`, which keeps the lock of its condition if Ctrl-C comes there: then
    whoever sets it waits for ever."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        """End the wait of all who wait, and of those who come."""
        with self._changed:
            self._changed.notify_all()  # first: an interrupt behind it does no harm
            self._is_set = True

    def clear(self) -> None:
        """Have those who come wait again."""
        with self._changed:
            self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(self.is_set, timeout)


def _acquired(gate: threading.Lock, timeout: float | None) -> bool:
    """Take a lock; False after `timeout` seconds.

    A signal ends the wait of the main thread only if it comes during it. One that comes a moment
    before, or that the system gives to another thread, is seen at the next look.
    """
    if not is_main():
        return gate.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
    ends_at = math.inf if timeout is None else time.monotonic() + timeout
    while not gate.acquire(timeout=min(_LOOK_S, max(0.0, ends_at - time.monotonic()))):
        if time.monotonic() >= ends_at:
            return False
    return True


class Future(concurrent.futures.Future[T], Generic[T]):
    """A future that nobody may cancel, and whose waiting no signal can break."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = Condition()  # type: ignore[assignment]
        self.set_running_or_notify_cancel()


def wait_for_all(
    futures: Iterable[concurrent.futures.Future[Any]], timeout: float | None = None
) -> bool:
    """Wait until all have ended, each in whatever way; False after `timeout` seconds."""
    ends_at = None if timeout is None else time.monotonic() + timeout
    for future in futures:
        left = None if ends_at is None else max(0.0, ends_at - time.monotonic())
        try:
            future.exception(left)
        except TimeoutError:
            return False
    return True


def start_thread(run: Callable[[], object], name: str) -> None:
    """Call `run` on a daemon thread of this name.

    Raises `WorkerError` when the system gives no more threads. Ctrl-C may come out of it although
    `run` is called: `run` must find out whether it is still wanted.
    """
    thread = threading.Thread(target=run, name=name, daemon=True)
    handled = sys.exc_info()[1]
    try:
        thread.start()
    except RuntimeError as error:
        signalled = error.__context__
        if signalled is not None and signalled is not handled:  # it broke the lock of `start`
            raise signalled from None
        raise WorkerError(
            f"the system gives no more threads: {error}; end other programs, or raise the limits "
            "on processes (ulimit -u) and on memory"
        ) from error


def run_in_background(function: Callable[[], T], name: str) -> Future[T]:
    """Call `function` on a daemon thread of this name. The future gets its result or its error, or
    `WorkerError` when the system gives no more threads."""
    future: Future[T] = Future()
    try:
        start_thread(lambda: _complete(future, function), name)
    except WorkerError as error:
        future.set_exception(error)
    return future


def unbroken(function: Callable[[], T], name: str) -> Future[T]:
    """Call `function` on a daemon thread of this name, where no handler of a signal runs; here,
    when the system gives no more threads. The future gets its result or its error."""
    future: Future[T] = Future()
    try:
        start_thread(lambda: _complete(future, function), name)
    except WorkerError:
        _complete(future, function)
    return future


def _complete(future: Future[T], function: Callable[[], T]) -> None:
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001 (handed to those who wait)
        future.set_exception(error)
    else:
        future.set_result(result)


def is_main() -> bool:
    """True on the thread that runs the handlers of signals."""
    return threading.get_ident() == threading.main_thread().ident


def is_nested() -> bool:
    """True for a call of the library from within another one: by a callback, or by the handler of a
    signal. The thread may hold locks then, and must not wait for other threads."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame):  # the call itself
        frame = frame.f_back
    while frame is not None and not _is_ours(frame):
        frame = frame.f_back
    return frame is not None


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(_PACKAGE) and not name.startswith(_COMMANDS)
