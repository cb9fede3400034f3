"""How busy the cores are, from the counters of the system. Linux only; other systems tell nothing.

Keeps the last reading, and makes no judgement.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_IDLE, _IOWAIT = 3, 4  # columns of a line of /proc/stat; see proc_stat(5)
_SHORTEST_S = 0.05  # the counters advance in steps of a hundredth of a second
_LONGEST_S = 1.0  # what was true on average for longer says little about now


@dataclass(frozen=True, slots=True)
class CoreLoad:
    """The cores that this process may use, and how many of them others used, on average since the
    last reading: other processes, or other virtual machines."""

    cores: int
    others: float


class CoreLoadMeter:
    """Measures the load between one call and the next. `clock` and `own_time` give seconds: the
    time, and the processor time of this process."""

    def __init__(
        self,
        stat: Path = Path("/proc/stat"),
        clock: Callable[[], float] = time.perf_counter,
        own_time: Callable[[], float] = time.process_time,
    ) -> None:
        self._stat = stat
        self._clock = clock
        self._own_time = own_time
        self._last: tuple[float, float, float] | None = None

    @property
    def is_supported(self) -> bool:
        """False on systems that do not tell how busy their cores are."""
        try:
            self._idle_time()
        except (OSError, ValueError, IndexError):
            return False
        return True

    def read(self) -> CoreLoad | None:
        """The load since the last call. None after the first call, after a long or a very short
        time, and on systems that do not tell it."""
        now, own = self._clock(), self._own_time()
        if self._last is not None and now - self._last[0] < _SHORTEST_S:
            return None
        try:
            cores, idle = self._idle_time()
        except (OSError, ValueError, IndexError):
            return None
        last, self._last = self._last, (now, own, idle)
        if last is None or now - last[0] > _LONGEST_S:
            return None
        elapsed = now - last[0]
        unused = (idle - last[2] + own - last[1]) / elapsed  # by others
        return CoreLoad(cores, min(float(cores), max(0.0, cores - unused)))

    def _idle_time(self) -> tuple[int, float]:
        """The number of cores that this process may use, and the seconds that they were idle."""
        affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        cores, ticks = 0, 0
        for line in self._stat.read_bytes().splitlines()[1:]:
            if not line.startswith(b"cpu"):
                break
            name, *columns = line.split()
            if affinity is None or int(name[3:]) in affinity:
                cores += 1
                ticks += int(columns[_IDLE]) + int(columns[_IOWAIT])
        if not cores:
            raise ValueError("no line of a core")
        return cores, ticks / _TICKS_PER_S
