"""Speed of a download: a limit and a measurement, shared by the threads of the download."""

import threading
import time
from collections import deque

_WINDOW_S = 3.0
_BURST_S = 0.05


class Pace:
    """A limit of `bytes_per_s` on the bytes that come through; None sets no limit."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, count: int) -> float:
        """Let `count` bytes through; return the seconds to wait for them, 0 or less for none."""
        if self._bytes_per_s is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - _BURST_S) + count / self._bytes_per_s
            return self._free_at - now


class Meter:
    """A measurement of bytes per second over the last seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, count: int) -> None:
        """Count bytes that came just now."""
        now = time.monotonic()
        with self._lock:
            self._seen.append((now, count))
            self._sum += count
            self._drop_old(now)

    @property
    def bytes_per_s(self) -> float:
        now = time.monotonic()
        with self._lock:
            self._drop_old(now)
            if not self._seen:
                return 0.0
            return self._sum / max(now - self._seen[0][0], 0.1)

    def _drop_old(self, now: float) -> None:
        while self._seen and self._seen[0][0] < now - _WINDOW_S:
            self._sum -= self._seen.popleft()[1]
