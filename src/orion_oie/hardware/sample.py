"""A sample of memory, as data only; `monitor` takes it."""

from collections.abc import Mapping
from dataclasses import dataclass

from orion_oie.hardware.pressure import PressureLevel
from orion_oie.hardware.probe import (
    ProcessMemory,
    SystemMemory,
)


@dataclass(frozen=True, slots=True)
class MemorySample:
    """The state of memory at one moment.

    at_s: seconds of the monitor's clock. wall_s: seconds since 1970. host: this process.
    workers: by key of the model, without dead ones. cache_bytes: size of the cache on the disk when
    last measured; None before that, if it could not be read, and without a cache.
    """

    at_s: float
    wall_s: float
    system: SystemMemory
    host: ProcessMemory
    workers: Mapping[str, ProcessMemory]
    cache_bytes: int | None
    level: PressureLevel

    @property
    def workers_bytes(self) -> int:
        """The resident bytes of all workers. A file that several of them map counts for each."""
        return sum(memory.resident_bytes for memory in self.workers.values())
