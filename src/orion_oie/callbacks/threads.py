"""Threads for code of the application: each runs one job at a time, and no job waits for another.

They exist only while there is something to do, and a little longer.
"""

import os
from collections import deque
from collections.abc import Callable

from orion_oie.threads import Condition, start_thread

Job = Callable[[], None]

_IDLE_EXIT_S = 1.0


class CallbackThreads:
    """Runs each job at once, on an idle thread or on a new one. Jobs must not raise.

    An interrupt of `run` may lose its job, and nothing else.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._jobs: deque[Job] = deque()  # each is for one of those who wait
        self._idle = 0  # threads that wait; they alone count

    def run(self, job: Job) -> None:
        """Run a job. Raises `WorkerError` if the system gives no thread for it."""
        with self._changed:
            if self._idle > len(self._jobs):
                self._changed.notify()  # first: an interrupt behind it does no harm
                self._jobs.append(job)
                return
        start_thread(lambda: self._work(job), "orion-callback")

    def _work(self, job: Job | None) -> None:
        while job is not None:
            job()
            job = None  # an idle thread keeps nothing
            job = self._next()

    def _next(self) -> Job | None:
        """The next job; None when the thread should end."""
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: bool(self._jobs), _IDLE_EXIT_S)
            self._idle -= 1
            return self._jobs.popleft() if self._jobs else None


_threads = CallbackThreads()


def run(job: Job) -> None:
    """Run a job on a thread of this process; see `CallbackThreads.run`."""
    _threads.run(job)


def _begin_anew() -> None:
    global _threads
    _threads = CallbackThreads()


if hasattr(os, "register_at_fork"):  # a fork has none of the threads
    os.register_at_fork(after_in_child=_begin_anew)
