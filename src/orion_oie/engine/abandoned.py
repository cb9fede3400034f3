"""Notices streams that nobody has any more, and has their requests ended.

Destructors run anywhere: under a lock of this library, or of `threading`, which a thread takes to
start another one. So all that they do is to put a note into a queue that takes no such lock. A
thread reads it; it runs as long as there are streams.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from orion_oie.errors import WorkerError
from orion_oie.threads import start_thread

_IDLE_EXIT_S = 5.0

End = Callable[[], object]


class AbandonedStreams:
    """The notes of destructors, for the whole process. Thread-safe."""

    def __init__(self) -> None:
        self._notes: SimpleQueue[End] = SimpleQueue()
        self._gone: SimpleQueue[None] = SimpleQueue()  # wakes nobody
        self._lock = threading.Lock()
        self._streams = 0
        self._is_running = False

    def expect(self) -> None:
        """Note that there is one more stream. If the system gives no thread, it is noticed with the
        next one."""
        with self._lock:
            self._streams += 1
            if not self._is_running:
                with contextlib.suppress(WorkerError):
                    start_thread(self._run, "orion-streams")
                    self._is_running = True

    def note(self, end: End | None, *, is_gone: bool) -> None:
        """Have a request ended by `end`, if it is given, soon and on another thread; `is_gone`:
        there is one stream less. For destructors."""
        if is_gone:
            self._gone.put(None)
        if end is not None:
            self._notes.put(end)

    def _run(self) -> None:
        while self._read_next():
            pass  # the call returns each time, so that waiting keeps no reference to a request

    def _read_next(self) -> bool:
        try:
            end = self._notes.get(timeout=_IDLE_EXIT_S)
        except Empty:
            with self._lock:
                self._streams -= self._taken_gone()
                self._is_running = self._streams > 0 or not self._notes.empty()
                return self._is_running
        # It may call anybody, for any time. No thread, no end: it ends by itself then.
        with contextlib.suppress(WorkerError):
            start_thread(end, "orion-abandoned")
        return True

    def _taken_gone(self) -> int:
        count = 0
        with contextlib.suppress(Empty):
            while True:
                self._gone.get_nowait()
                count += 1
        return count


streams = AbandonedStreams()
# A fork has no such thread, and its requests belong to its parent.
os.register_at_fork(after_in_child=lambda: AbandonedStreams.__init__(streams))
