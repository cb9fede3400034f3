"""The memory of one engine: the budget, the measured sizes, and the relief of memory pressure.

    before a load:  size the model, read the available memory
    every 2 s:      measure the workers -> the pool's sizes, the ledger; the level of pressure
    high:           unload idle models even if no request needs their memory
    critical:       unload all idle models, each after it wrote its snapshots; begin no load

It watches, and decides when to unload; the pool and `eviction.py` decide what.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from orion_oie.backends.base import (
    LoadSpec,
    LocalBackend,
    LocalModel,
)
from orion_oie.cancellation import CancelScope
from orion_oie.config import EngineConfig
from orion_oie.errors import OrionError, described
from orion_oie.hardware import probe
from orion_oie.hardware.monitor import MemoryMonitor
from orion_oie.hardware.pressure import (
    DEFAULT_THRESHOLDS,
    PressureLevel,
)
from orion_oie.hardware.probe import (
    ProcessMemory,
    SystemMemory,
)
from orion_oie.hardware.sample import MemorySample
from orion_oie.pool.budget import MemoryBudget
from orion_oie.pool.files import ModelFiles
from orion_oie.pool.footprint_ledger import (
    FILE_NAME,
    FootprintLedger,
)
from orion_oie.pool.pool import (
    Load,
    ModelPool,
)
from orion_oie.pool.sizes import ModelSizes
from orion_oie.schemas.loading import OnProgress
from orion_oie.telemetry.event_log import EventLog
from orion_oie.telemetry.events import MemoryPressure, MemoryRelieved, MemoryTrouble, PoolEvicted

_EVERYTHING = 2**62
_STALE_S = 2.0
_LAST_SAVE_S = 1.0


class MemoryManager:
    """The budget, the sizes and the monitor of one engine, and the pool that keeps to them.

    The monitor runs while there are workers, and while memory is short. `files` are looked at again
    with each of its samples. `cache_dir` holds fetched models and measurements. `on_evicted(key)`
    and `on_changed()` are called like those of the pool. The readers and the seconds between two
    samples are the monitor's.
    """

    def __init__(
        self,
        config: EngineConfig,
        backend: LocalBackend,
        load: Load,
        events: EventLog,
        cache_dir: Path,
        *,
        files: ModelFiles | None = None,
        on_evicted: Callable[[str], None] = lambda _key: None,
        on_changed: Callable[[], None] = lambda: None,
        interval_s: float = 2.0,
        read_system: Callable[[], SystemMemory] = probe.system_memory,
        read_process: Callable[[int], ProcessMemory | None] = probe.process_memory,
    ) -> None:
        self._events = events
        self._files = files
        self._on_evicted = on_evicted
        self._is_closed = False
        self._ledger = FootprintLedger(cache_dir / FILE_NAME, self._warn)
        self.sizes = ModelSizes(backend.footprint, self._ledger)
        self.monitor = MemoryMonitor(
            self._pids,
            idle=self._idle,
            cache_dir=cache_dir,
            interval_s=interval_s,
            read_system=read_system,
            read_process=read_process,
            on_error=lambda error: self._warn(described(error)),
            on_sample=self._on_sample,
            on_level=self._on_level,
        )
        self.budget = MemoryBudget(config.memory.budget, self._held_bytes, read_system=read_system)
        self._load = load
        self.pool = ModelPool(
            self._timed_load,
            config.memory.max_models,
            on_evicted=self._note_evicted,
            on_changed=on_changed,
            size_of=self._size_of,
            budget_bytes=self.budget.bytes,
            has_memory=self.has_memory,
        )

    def has_memory(self) -> bool:
        """False while the system may end processes for want of memory: no load begins then."""
        return self.monitor.level is not PressureLevel.CRITICAL

    def may_take(self, size_bytes: int) -> bool:
        """True while the budget has `size_bytes` left."""
        return self.pool.reserved_bytes + size_bytes <= self.budget.bytes()

    def can_hold(self, sizes_bytes: Mapping[str, int]) -> bool:
        """See `ModelPool.can_hold`; reads the available memory first."""
        self._look()
        self.budget.refresh()
        return self.pool.can_hold(sizes_bytes)

    def is_calm(self) -> bool:
        """True while something may be loaded ahead of need."""
        return self.monitor.level is PressureLevel.LOW

    def close(self) -> None:
        """Stop watching, and save the measurements."""
        self._is_closed = True
        self.monitor.stop()
        self._ledger.save(_LAST_SAVE_S)

    # -- before a load

    def _size_of(self, spec: LoadSpec) -> int:
        self._look()
        self.budget.refresh()
        try:
            return self.sizes.max_bytes(spec)
        except OrionError:  # the load reports the problem of its files
            return 0

    def _look(self) -> None:
        """Sample the memory, unless the last sample is recent."""
        latest = self.monitor.latest
        if latest is not None and time.monotonic() - latest.at_s < _STALE_S:
            return
        try:
            self.monitor.sample_now()
        except OSError as error:
            self._warn(described(error))

    def _timed_load(
        self, spec: LoadSpec, scope: CancelScope, on_progress: OnProgress
    ) -> LocalModel:
        self._watch()
        started = time.monotonic()
        model = self._load(spec, scope, on_progress)
        if spec.source is None:  # otherwise the network would be timed
            load_s = time.monotonic() - started
            self._keep(spec, partial(self.sizes.note_load, spec, load_s))
        return model

    def _keep(self, spec: LoadSpec, note: Callable[[], None]) -> None:
        try:
            note()
        except OrionError as error:  # its files were replaced under it
            self._warn(f"what {spec.key} takes cannot be kept: {error.message}")

    def _note_evicted(self, key: str) -> None:
        self._events.publish(PoolEvicted(key=key))
        self._on_evicted(key)

    def _held_bytes(self) -> int:
        sample = self.monitor.latest
        if sample is None:
            return 0
        there = self._pids()  # what has ended since is available already
        return sum(one.private_bytes for key, one in sample.workers.items() if key in there)

    # -- every two seconds, on the monitor's thread

    def _watch(self) -> None:
        if self._is_closed:
            return
        try:
            self.monitor.start()
        except RuntimeError as error:  # the system gives no thread: the next load tries again
            self._warn(f"memory is not watched: {error}")

    def _is_needed(self, level: PressureLevel) -> bool:
        if level >= PressureLevel.HIGH:  # a request may wait until it is over
            return not self._is_closed
        residents = self.pool.residents().values()
        is_anything_there = any(one.is_loading or one.pid is not None for one in residents)
        return is_anything_there and not self._is_closed

    def _pids(self) -> Mapping[str, int]:
        residents = self.pool.residents()
        return {key: one.pid for key, one in residents.items() if one.pid is not None}

    def _idle(self) -> list[str]:
        return [key for key, one in self.pool.residents().items() if not one.users]

    def _on_sample(self, sample: MemorySample) -> None:
        if not self._is_needed(sample.level):
            self.monitor.stop(0.0)
        if self._is_needed(sample.level):  # a load may have begun meanwhile
            self._watch()
        self.budget.note(sample.system, _held_bytes(sample))
        for key, has_answered in self.pool.settled().items():
            memory, spec = sample.workers.get(key), self.pool.spec(key)
            if memory is None or spec is None:
                continue
            self.pool.note_size(key, memory.resident_bytes)
            if has_answered:
                self._keep(spec, partial(self.sizes.note_peak, spec, memory.resident_bytes))
        self._ledger.save()
        if not self.budget.is_automatic:  # otherwise the pressure decides, not the sizes
            self.pool.trim()
        if sample.level >= PressureLevel.HIGH:
            self._relieve(sample)
        if self._files is not None:  # last: a slow file system must not delay the relief
            self._files.look_again()

    def _relieve(self, sample: MemorySample) -> None:
        system = sample.system
        enough = DEFAULT_THRESHOLDS[PressureLevel.MEDIUM].of(system.total_bytes)
        is_critical = sample.level is PressureLevel.CRITICAL
        wanted = _EVERYTHING if is_critical else enough - system.available_bytes
        keys = self.pool.relieve(wanted)
        if keys:
            self._events.publish(MemoryRelieved(pressure=sample.level.value, keys=keys))

    def _on_level(self, old: PressureLevel, new: PressureLevel, sample: MemorySample) -> None:
        self._events.publish(
            MemoryPressure(
                level="info" if new < PressureLevel.HIGH else "warning",
                old=old.value,
                new=new.value,
                available_bytes=sample.system.available_bytes,
                total_bytes=sample.system.total_bytes,
                limited_by=sample.system.limited_by,
                workers_bytes=sample.workers_bytes,
                advice=self.monitor.recommendations(),
            )
        )

    def _warn(self, text: str) -> None:
        self._events.publish(MemoryTrouble(error=text))


def _held_bytes(sample: MemorySample) -> int:
    """The memory that would be freed without the workers; pages of files count as available
    anyway."""
    return sum(memory.private_bytes for memory in sample.workers.values())
