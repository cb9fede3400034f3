"""Who is served next: a bounded queue with priorities, and the threads that serve it.

Higher priority first, then first come, first served. Threads are started when there is work and
end after a while without, so an engine that nobody uses has none.
"""

import heapq
import itertools
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from orion_oie.errors import EngineClosedError, QueueFullError

T = TypeVar("T")

_IDLE_EXIT_S = 5.0


class RequestQueue(Generic[T]):
    """Runs `serve(item)` for every item, at most `concurrency` at the same time.

    `limit` items may wait for one of the served to end. `serve` must not raise.
    """

    def __init__(self, serve: Callable[[T], None], *, limit: int, concurrency: int) -> None:
        self._serve = serve
        self._limit = limit
        self._concurrency = concurrency
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, T]] = []
        self._order = itertools.count()
        self._threads = 0
        self._idle = 0
        self._busy = 0
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, item: T, priority: int = 0) -> None:
        """Add an item. Raises `QueueFullError` with the numbers, or `EngineClosedError`."""
        with self._changed:
            if self._is_closed:
                raise EngineClosedError("the engine was shut down")
            # An item that a free thread is about to take does not wait.
            waiting = len(self._waiting) - (self._concurrency - self._busy)
            if waiting >= self._limit:
                raise QueueFullError(
                    f"{waiting} requests are waiting and the limit is {self._limit}; "
                    "try again later or raise EngineConfig(max_queue=...)",
                    waiting=waiting,
                    limit=self._limit,
                )
            if self._idle > len(self._waiting):
                self._changed.notify()
            elif self._threads < self._concurrency:
                name = f"orion-request-{self._threads + 1}"
                threading.Thread(
                    target=_run,
                    args=(self._next, self._serve, self._served),
                    name=name,
                    daemon=True,
                ).start()
                self._threads += 1
            heapq.heappush(self._waiting, (-priority, next(self._order), item))

    def remove(self, item: T) -> bool:
        """Take back an item that is still waiting; False when it is not."""
        with self._changed:
            kept = [entry for entry in self._waiting if entry[2] is not item]
            if len(kept) == len(self._waiting):
                return False
            heapq.heapify(kept)
            self._waiting = kept
            return True

    def close(self) -> list[T]:
        """Refuse new items and return those that will not be served."""
        with self._changed:
            self._is_closed = True
            left = [item for _, _, item in sorted(self._waiting)]
            self._waiting.clear()
            self._changed.notify_all()
        return left

    def _next(self) -> T | None:
        """The next item; None when the thread should end."""
        with self._changed:
            self._idle += 1
            try:
                while not self._waiting:
                    if self._is_closed or not self._changed.wait(_IDLE_EXIT_S):
                        if self._waiting:
                            break
                        self._threads -= 1
                        return None
                self._busy += 1
                return heapq.heappop(self._waiting)[2]
            finally:
                self._idle -= 1

    def _served(self) -> None:
        with self._changed:
            self._busy -= 1


def _run(
    next_item: Callable[[], T | None], serve: Callable[[T], None], served: Callable[[], None]
) -> None:
    while (item := next_item()) is not None:
        serve(item)
        del item
        served()
