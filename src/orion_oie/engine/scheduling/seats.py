"""The lock of a queue, and the places where its threads sleep.

Both are made so that threads of one interpreter stop each other as little as possible.
"""

import contextlib
import threading
import time


class Mutex:
    """A reentrant lock that only a thread which runs Python takes.

    A thread that blocks in `RLock.acquire` gets the lock before it has the interpreter's own. Until
    it has both, all others that need the lock stop, and block in their turn: a convoy, in which
    each request changes threads several times. So a thread tries, and lets others run in between.
    The lock is never held for longer than a decision takes.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def acquire(self) -> None:
        """Take the lock, as soon as it is free."""
        while not self._lock.acquire(blocking=False):
            time.sleep(0)

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Seat:
    """The place where one thread sleeps: until there is work, or news while it is the decider.

    It sleeps on a gate of its own. A condition of the queue's lock would have it take that lock on
    waking, before it has Python's own, and whoever needs the queue in between would stop for it.
    """

    def __init__(self) -> None:
        self.awaits_news = False  # is the decider, and is to be woken by news
        self.is_asleep = False  # waits for news, or did until another thread took its place
        self._gate = threading.Lock()
        self._gate.acquire()

    def sleep(self, timeout_s: float) -> bool:
        """Wait for `wake`, or for one that came since the last sleep; False after `timeout_s`
        seconds."""
        return self._gate.acquire(timeout=timeout_s)

    def wake(self) -> None:
        """End the sleep, this one or the next."""
        with contextlib.suppress(RuntimeError):  # it was woken before, and has not seen it yet
            self._gate.release()
