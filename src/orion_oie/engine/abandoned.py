"""Notices streams that nobody has any more, and has their requests ended.

Destructors run anywhere: under a lock of this library, or of `threading`, which a thread takes to
start another one. So all that they do is to put a note into a queue that takes no such lock. A
thread reads it; it runs as long as there are streams.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

from orion_oie.errors import WorkerError
from orion_oie.threads import start_thread

_IDLE_EXIT_S = 5.0
_FEW = 1000  # more are swept out at times

End = Callable[[], object]


class _Stream(Protocol):
    def done(self) -> bool: ...


class AbandonedStreams:
    """The notes of destructors, for the whole process. Thread-safe."""

    def __init__(self) -> None:
        self._notes: SimpleQueue[End] = SimpleQueue()
        self._lock = threading.RLock()  # a signal handler may call the library, anywhere
        self._streams: list[weakref.ref[_Stream]] = []
        self._sweep_at = _FEW
        self._is_running = False

    def expect(self, stream: _Stream) -> None:
        """Have notes read until `stream` is over. If the system gives no thread, they are
        read with the next one."""
        with self._lock:
            self._streams.append(weakref.ref(stream))
            if len(self._streams) > self._sweep_at:
                self._sweep()
            if not self._is_running:
                with contextlib.suppress(WorkerError):
                    start_thread(self._run, "orion-streams")
                    self._is_running = True

    def note(self, end: End) -> None:
        """Call `end` soon, on another thread. For destructors."""
        self._notes.put(end)

    def _run(self) -> None:
        while self._read_next():
            pass  # the call returns each time, so that waiting keeps no reference to a request

    def _read_next(self) -> bool:
        try:
            end = self._notes.get(timeout=_IDLE_EXIT_S)
        except Empty:
            with self._lock:
                self._sweep()
                self._is_running = bool(self._streams) or not self._notes.empty()
                return self._is_running
        # It may call anybody, for any time. No thread, no end: it ends by itself then.
        with contextlib.suppress(WorkerError):
            start_thread(end, "orion-abandoned")
        return True

    def _sweep(self) -> None:
        """Forget the streams that are over or gone."""
        there = ((reference, reference()) for reference in self._streams)
        self._streams = [ref for ref, stream in there if stream is not None and not stream.done()]
        self._sweep_at = max(_FEW, 2 * len(self._streams))


streams = AbandonedStreams()
# A fork has no such thread, and its requests belong to its parent.
os.register_at_fork(after_in_child=lambda: AbandonedStreams.__init__(streams))
