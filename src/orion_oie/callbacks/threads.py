"""Threads for code of the application: each runs one job at a time, and no job waits for another.

They exist only while there is something to do, and a little longer.
"""

import os
import queue
import threading
from collections.abc import Callable

from orion_oie.threads import start_thread

Job = Callable[[], None]

_IDLE_EXIT_S = 1.0


class CallbackThreads:
    """Runs each job at once, on an idle thread or on a new one. Jobs must not raise."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may call the library, anywhere
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._idle = 0  # threads that wait, less the jobs that are on their way to them

    def run(self, job: Job) -> None:
        """Run a job. Raises `WorkerError` if the system gives no thread for it."""
        with self._lock:
            is_taken = self._idle > 0
            self._idle -= is_taken
        if is_taken:
            self._jobs.put(job)
        else:
            start_thread(lambda: self._work(job), "orion-callback")

    def _work(self, job: Job | None) -> None:
        while job is not None:
            job()
            job = None  # an idle thread keeps nothing
            job = self._next()

    def _next(self) -> Job | None:
        """The next job; None when the thread should end."""
        with self._lock:
            self._idle += 1
        try:
            return self._jobs.get(timeout=_IDLE_EXIT_S)
        except queue.Empty:
            with self._lock:
                if self._idle > 0:
                    self._idle -= 1
                    return None
        return self._jobs.get()  # one is on its way


_threads = CallbackThreads()


def run(job: Job) -> None:
    """Run a job on a thread of this process; see `CallbackThreads.run`."""
    _threads.run(job)


def _begin_anew() -> None:
    global _threads
    _threads = CallbackThreads()


if hasattr(os, "register_at_fork"):  # a fork has none of the threads
    os.register_at_fork(after_in_child=_begin_anew)
