"""The lock of a queue, and the places where its threads sleep.

Both are made so that threads of one interpreter stop each other as little as possible.
"""

import contextlib
import threading
import time
from _thread import RLock

_TRIES = 200


class Mutex(RLock):  # type: ignore[misc] # it is final for type checkers only
    """A reentrant lock for `with`, which only a thread that runs Python takes, if it can.

    A thread that blocks in `RLock.acquire` gets the lock before it has the interpreter's own. Until
    it has both, all others that need the lock stop, and block in their turn: a convoy, in which
    each request changes threads several times. So a thread tries, and lets others run in between;
    where somebody has the lock for longer than that, it blocks all the same.

    An interrupt (Ctrl-C) leaves it as it was: `__exit__` is that of the lock, in C, and nothing
    comes in between.
    """

    def __enter__(self) -> bool:  # type: ignore[override]
        was_owned = self._is_owned()  # type: ignore[attr-defined]
        try:
            for _ in range(_TRIES):
                if self.acquire(blocking=False):
                    return True
                time.sleep(0)
            return self.acquire()
        except BaseException:
            if not was_owned and self._is_owned():  # type: ignore[attr-defined] # the interrupt came after it was taken
                self.release()
            raise

    take = __enter__


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
