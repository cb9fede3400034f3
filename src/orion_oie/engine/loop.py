"""Wakes asynchronous callers from the threads that answer.

Every `call_soon_threadsafe` writes to the socket of its event loop. When many requests end at the
same time, one such call is enough for all of them.
"""

import asyncio
import threading
import weakref
from collections import deque
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class LoopWaker:
    """Ends futures of one event loop. Thread-safe."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._ended: deque[asyncio.Future[None]] = deque()
        self._lock = threading.RLock()  # a signal handler may call the library, anywhere
        self._is_called = False

    def wake(self, waiter: "asyncio.Future[None]") -> None:
        """End a future of the loop soon; may be called by any thread."""
        loop = self._loop()
        with self._lock:
            self._ended.append(waiter)
            if self._is_called or loop is None:
                return
            try:
                loop.call_soon_threadsafe(self._end_all)
            except RuntimeError:  # it was closed while the answer came: nobody waits any more
                self.forget()
            else:
                self._is_called = True  # not before: an interrupt may come between the two

    def waiter(self) -> "asyncio.Future[None]":
        """A new future of the loop; called by its thread."""
        loop = asyncio.get_running_loop()
        if self._is_called:  # an interrupt of the loop may have lost the call
            loop.call_soon(self._end_all)
        return loop.create_future()

    def forget(self) -> None:
        """Let go of all futures: each holds its loop."""
        with self._lock:
            self._ended.clear()

    def _end_all(self) -> None:
        with self._lock:
            self._is_called = False
        while self._ended:
            waiter = self._ended[0]
            if not waiter.done():  # it was cancelled
                waiter.set_result(None)
            self._ended.popleft()  # here alone, and last: an interrupt loses none


_wakers: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWaker]"
_wakers = weakref.WeakKeyDictionary()
_making = threading.Lock()


async def wait_for(future: "Future[T]") -> T:
    """The result of a future that a thread ends; raises its error. A cancelled task leaves the
    future as it is."""
    await until_done(future)
    return future.result()


async def until_done(future: "Future[T]") -> None:
    """Wait until a thread has ended a future, with a result or an error."""
    if not future.done():
        loop = asyncio.get_running_loop()
        with _making:
            waker = _wakers.get(loop)
            if waker is None:
                for other, its_waker in list(_wakers.items()):
                    if other.is_closed():  # before it could end its futures
                        its_waker.forget()
                waker = _wakers[loop] = LoopWaker(loop)
        waiter = waker.waiter()
        future.add_done_callback(lambda _future: waker.wake(waiter))
        await waiter
