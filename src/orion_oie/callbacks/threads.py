"""Threads for code of the application: each runs one job at a time, and no job waits for another.

They exist only while there is something to do, and a little longer.
"""

import os
import queue
from collections import deque
from collections.abc import Callable

from orion_oie.threads import start_thread

Job = Callable[[], None]

_IDLE_EXIT_S = 1.0


class CallbackThreads:
    """Runs each job at once, on an idle thread or on a new one. Jobs must not raise.

    It has no lock, which its threads would hold while the caller waits.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._idle: deque[None] = deque()  # an entry for each thread that has no job on its way

    def run(self, job: Job) -> None:
        """Run a job. Raises `WorkerError` if the system gives no thread for it."""
        try:
            self._idle.pop()
        except IndexError:
            start_thread(lambda: self._work(job), "orion-callback")
            return
        except BaseException:  # an interrupt, and they come behind a call
            self._idle.append(None)
            raise
        self._jobs.put(job)

    def _work(self, job: Job | None) -> None:
        while job is not None:
            job()
            job = None  # an idle thread keeps nothing
            job = self._next()

    def _next(self) -> Job | None:
        """The next job; None when the thread should end."""
        self._idle.append(None)
        try:
            return self._jobs.get(timeout=_IDLE_EXIT_S)
        except queue.Empty:
            pass
        try:
            self._idle.pop()
        except IndexError:
            return self._jobs.get()  # one is on its way
        return None


_threads = CallbackThreads()


def run(job: Job) -> None:
    """Run a job on a thread of this process; see `CallbackThreads.run`."""
    _threads.run(job)


def _begin_anew() -> None:
    global _threads
    _threads = CallbackThreads()


if hasattr(os, "register_at_fork"):  # a fork has none of the threads
    os.register_at_fork(after_in_child=_begin_anew)
