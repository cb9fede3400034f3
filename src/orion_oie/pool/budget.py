"""The memory budget of all loaded models: a fixed number of bytes, or what the machine can spare.

Frees nothing and loads nothing; the pool keeps within it.
"""

import threading
import time
from collections.abc import Callable
from typing import Literal

from orion_oie.hardware import probe
from orion_oie.hardware.probe import SystemMemory

_KEPT_SHARE = 0.10
_KEPT_AT_LEAST_BYTES = 512 * 2**20
_KEPT_AT_MOST_SHARE = 0.5
_STALE_S = 1.0


def spared_bytes(system: SystemMemory, held_bytes: int) -> int:
    """The memory that models may take, of which they hold `held_bytes` already.

    It is the memory that would be available without them, less a reserve for everybody else: a
    tenth of the machine's memory, at least 512 MiB, at most half of it. Pages of files in the
    system's cache count as available anyway, so they are not part of `held_bytes`.
    """
    kept = max(_KEPT_SHARE * system.total_bytes, _KEPT_AT_LEAST_BYTES)
    kept = min(kept, _KEPT_AT_MOST_SHARE * system.total_bytes)
    return max(0, int(system.available_bytes + held_bytes - kept))


class MemoryBudget:
    """The budget of one engine. With "auto", `note` and `refresh` adapt it to the machine.

    `held_bytes()` is the memory of the workers that would be freed if they ended.
    """

    def __init__(
        self,
        setting: int | Literal["auto"],
        held_bytes: Callable[[], int] = lambda: 0,
        *,
        read_system: Callable[[], SystemMemory] = probe.system_memory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setting = setting
        self._held_bytes = held_bytes
        self._read_system = read_system
        self._clock = clock
        self._lock = threading.Lock()
        self._spared_bytes: int | None = None
        self._noted_at = 0.0

    @property
    def is_automatic(self) -> bool:
        return self._setting == "auto"

    def bytes(self) -> int:
        """The latest budget. Reads the state of the machine the first time only."""
        if self._setting != "auto":
            return self._setting
        if self._spared_bytes is None:
            return self.note(self._read_system(), self._held_bytes())
        return self._spared_bytes

    def refresh(self) -> None:
        """Read the state of the machine again, unless the last reading is recent."""
        if self._setting != "auto":
            return
        with self._lock:
            now = self._clock()
            if self._spared_bytes is not None and now - self._noted_at < _STALE_S:
                return
            self._noted_at = now
        self.note(self._read_system(), self._held_bytes())

    def note(self, system: SystemMemory, held_bytes: int) -> int:
        """Take over a reading of the machine; returns the automatic budget that follows from it."""
        with self._lock:
            self._spared_bytes = spared = spared_bytes(system, held_bytes)
            self._noted_at = self._clock()
        return spared
